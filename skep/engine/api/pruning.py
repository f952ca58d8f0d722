"""Filters of the ``prune`` commands."""

from collections.abc import Mapping

from skep.api.formats.filters import Filters
from skep.api.formats.timestamps import parse_time
from skep.errors import InvalidArgument
from skep.model.values.times import unix_ns


def until_of(filters: Filters, now_ns: int) -> int | None:
    """Return the filter ``until``, the latest time of creation.  None without one.

    It is read before any object is looked at, so that a wrong filter is refused even if nothing would be removed.

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
