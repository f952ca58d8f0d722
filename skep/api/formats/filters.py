"""The ``filters`` parameter of list and prune requests.

It has two forms: ``{"name": {"web": true}}`` and the older ``{"name": ["web"]}``.

Source: moby 20.10, api/types/filters/parse.go, daemon/prune.go.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from skep.api.formats.bodies import parse
from skep.api.formats.timestamps import parse_time
from skep.errors import InvalidArgument
from skep.model.values.times import unix_ns


class Filters:
    """The filters of a list request.  Each key has one or more values, and an object matches if it has any of them."""

    def __init__(self, values: Mapping[str, Iterable[str]] | None = None) -> None:
        self._values = {key: tuple(sorted(set(wanted))) for key, wanted in (values or {}).items()}

    @classmethod
    def of(cls, request: web.Request) -> "Filters":
        """Return the filters of ``request``.  Raises: InvalidArgument: they have neither form."""
        return cls.from_json(request.query.get("filters", ""))

    @classmethod
    def from_json(cls, text: str) -> "Filters":
        """Parse filters in JSON.  An empty text has none.  Raises: InvalidArgument."""
        if not text:
            return cls()
        fields = parse(text.encode(errors="surrogateescape"))
        if fields is None:
            return cls()
        if not isinstance(fields, dict):
            raise _unfit(fields, "map[string]map[string]bool")
        return cls({key: _wanted(values) for key, values in fields.items()})

    def refuse_unknown(self, *known: str) -> None:
        """Refuse keys that are not in ``known``.  Raises: InvalidArgument."""
        for key in sorted(self._values):
            if key not in known:
                raise InvalidArgument(f"Invalid filter '{key}'")

    def json(self, *without: str) -> str:
        """Return the filters as a client writes them, except the keys ``without``.  Empty without filters."""
        kept = {
            key: dict.fromkeys(wanted, True) for key, wanted in self._values.items() if key not in without
        }
        return msgspec.json.encode(kept).decode() if kept else ""

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> tuple[str, ...]:
        """Return the values wanted for ``key``, sorted, or none without such a filter."""
        return self._values.get(key, ())

    def __bool__(self) -> bool:
        return bool(self._values)

    def matches(self, key: str, *found: str) -> bool:
        """Return whether one of ``found`` is wanted exactly, or ``key`` is not a filter."""
        return not self[key] or any(value in self[key] for value in found)

    def matches_prefix(self, key: str, *found: str) -> bool:
        """Return whether one of ``found`` starts with a wanted value, or ``key`` is not a filter."""
        return not self[key] or any(value.startswith(wanted) for value in found for wanted in self[key])

    def matches_labels(self, key: str, labels: Mapping[str, str]) -> bool:
        """Return whether ``labels`` have all wanted labels, each ``name`` or ``name=value``."""
        for wanted in self[key]:
            name, has_value, value = wanted.partition("=")
            if name not in labels or (has_value and labels[name] != value):
                return False
        return True


def until_of(filters: Filters, now_ns: int) -> int | None:
    """Return the filter ``until`` of a prune request, the latest time of creation.  None without one.

    Call it before you look at any object, so that a wrong filter is refused even if nothing would be removed.

    Raises: InvalidArgument: it is not a time, or there are several.
    """
    match filters["until"]:
        case ():
            return None
        case (moment,):
            return parse_time(moment, now_ns)
        case _:
            raise InvalidArgument("more than one until filter specified")


def is_prunable(created_at: str, labels: Mapping[str, str], filters: Filters, until_ns: int | None) -> bool:
    """Return whether an unused object matches.  ``until_ns``: See ``until_of``."""
    return (until_ns is None or unix_ns(created_at) < until_ns) and has_prunable_labels(labels, filters)


def has_prunable_labels(labels: Mapping[str, str], filters: Filters) -> bool:
    """Return whether an object has all labels of ``label``, and not all of ``label!``.

    Source: moby, daemon/prune.go (matchLabels), volume/service/by.go (byLabelFilter).
    """
    is_kept = "label!" in filters and filters.matches_labels("label!", labels)
    return filters.matches_labels("label", labels) and not is_kept


def _wanted(values: Any) -> list[str]:
    match values:
        case None:
            return []
        case dict():
            if not all(flag is None or isinstance(flag, bool) for flag in values.values()):
                odd = next(
                    flag for flag in values.values() if flag is not None and not isinstance(flag, bool)
                )
                raise _unfit(odd, "bool")
            return list(values)
        case list():
            if not all(isinstance(value, str) for value in values):
                raise _unfit(values, "map[string]bool")
            return values
        case _:
            raise _unfit(values, "map[string]bool")


def _unfit(value: Any, wanted: str) -> InvalidArgument:
    kinds = {bool: "bool", int: "number", list: "array", dict: "object"}
    found = kinds.get(type(value), "string")
    return InvalidArgument(f"json: cannot unmarshal {found} into Go value of type {wanted}")
