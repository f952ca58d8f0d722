"""The catalog as keys of etcd, with revisions.  Pure.

=======================================  ==================================================
``/skep/services/NAME/INSTANCE``         ``ADDRESS:PORT``, or ``ADDRESS`` without a port
``/skep/weights/NAME/INSTANCE``          its weight among the instances, a whole number
``/skep/tags/NAME/INSTANCE``             the tags of the instance, as a JSON list
``/skep/nodes/NAME``                     the address of a node
=======================================  ==================================================

Each change of the catalog is a revision.  The last ones are kept, for readers that ask for several ranges of one
revision, and for watches that begin in the past.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from skep.catalog.following import KnownCatalog
from skep.model.networks.addresses import joined

PREFIX: Final = "/skep"
KEPT_MAX: Final = 32
"""Number of revisions that are kept.  confd reads its ranges, 128 at a time, within seconds."""
EVERYTHING: Final = b"\0"
"""The end of a range that has all keys from its begin on."""


class StoredKey(msgspec.Struct, frozen=True):
    """The value of a key, with etcd's numbers."""

    value: bytes
    created: int
    modified: int
    version: int


class ChangedKey(msgspec.Struct, frozen=True):
    """A key that a revision has changed.  ``new`` is None if it was deleted."""

    key: bytes
    old: StoredKey | None
    new: StoredKey | None


class KeysRevision(msgspec.Struct, frozen=True):
    """All keys at a revision, in order, and the changes of that revision."""

    number: int
    keys: Mapping[bytes, StoredKey]
    changes: tuple[ChangedKey, ...]


class KeyHistory:
    """The last revisions of the catalog's keys.

    Args:
        first: Number of the empty revision before the first catalog.
    """

    def __init__(self, first: int) -> None:
        self._revisions: deque[KeysRevision] = deque([KeysRevision(first, {}, ())], maxlen=KEPT_MAX)

    @property
    def last(self) -> KeysRevision:
        """The newest revision."""
        return self._revisions[-1]

    @property
    def compacted(self) -> int:
        """The newest revision without known changes.  Watches that begin there or earlier lack events."""
        oldest = self._revisions[0]
        return oldest.number - 1 if oldest.changes else oldest.number

    def advance(self, number: int, values: Mapping[str, str]) -> bool:
        """Add a revision if the values differ.  Return whether they do."""
        before, after = self.last.keys, {}
        changes = []
        for name in sorted(values):
            key, value = name.encode(), values[name].encode()
            old = before.get(key)
            if old is not None and old.value == value:
                after[key] = old
                continue
            created, version = (old.created, old.version + 1) if old is not None else (number, 1)
            after[key] = StoredKey(value, created, number, version)
            changes.append(ChangedKey(key, old, after[key]))
        changes += [ChangedKey(key, old, None) for key, old in before.items() if key not in after]
        if changes:
            self._revisions.append(
                KeysRevision(
                    number, dict(sorted(after.items())), tuple(sorted(changes, key=lambda one: one.key))
                )
            )
        return bool(changes)

    def at(self, number: int) -> KeysRevision | None:
        """Return the revision that was the newest at ``number``, or None if it is no longer kept."""
        found = None
        for one in self._revisions:
            if one.number <= number:
                found = one
        return found

    def after(self, number: int) -> Iterator[KeysRevision]:
        """Yield the kept revisions with higher numbers, in order."""
        return (one for one in self._revisions if one.number > number)


def values_of(known: KnownCatalog) -> dict[str, str]:
    """Return the values of all keys."""
    found = {f"{PREFIX}/nodes/{name}": address for name, address in known.nodes.items()}
    for service in known.services.values():
        for one in service.instances:
            own = f"{service.name}/{one.id}"
            found[f"{PREFIX}/services/{own}"] = joined(one.address, one.port) if one.port else one.address
            found[f"{PREFIX}/weights/{own}"] = str(one.weight)
            found[f"{PREFIX}/tags/{own}"] = msgspec.json.encode(one.tags).decode()
    return found


def is_within(key: bytes, begin: bytes, end: bytes) -> bool:
    """Return whether a key is in etcd's range.  An empty ``end`` means the key ``begin`` alone."""
    if not end:
        return key == begin
    return key >= begin and (end == EVERYTHING or key < end)
