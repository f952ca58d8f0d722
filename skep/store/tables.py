"""The merged objects of one kind in memory, with their indexes.

An object is stored under several keys with one writer each.  ``ObjectTable`` merges them, and keeps the revision of the
last write of each key, which transactions compare.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import structlog

from skep.errors import NotFound, SkepError, Unavailable
from skep.model.service import Service
from skep.model.values.unknown import NOTHING, Unknown
from skep.store.codec import codecs_of, head_decoder, values_of
from skep.store.interface import Created, Deleted, Event, KindSchema, Object, Updated
from skep.store.keys import HEAD

log = structlog.get_logger()

_set = msgspec.structs.force_setattr

NAME = "name"

META = ("version", "created_at", "updated_at")
"""Fields of heads that the store itself sets."""


class KeyChange(msgspec.Struct, frozen=True, gc=False):
    """The current state of one key, with its decrypted value.

    Attributes:
        value: None if the key was deleted.
        damage: Why the stored value cannot be decrypted.  ``value`` is then undefined.
    """

    key: str
    value: bytes | None
    revision: int
    create_revision: int = 0
    damage: str = ""


class FieldIndex:
    """The sorted ids of the objects with an index value.

    Most values of the largest index have a single id, so these have a dictionary of their own.  The lists of 100,000
    slots would take most of the time of a garbage collection and of a copy.
    """

    def __init__(self) -> None:
        self.single: dict[str, str] = {}
        self.several: dict[str, list[str]] = {}
        self._shared: set[str] = set()
        """Values whose list a copy uses as well.  It is copied before its first change."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FieldIndex) and (self.single, self.several) == (other.single, other.several)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def ids(self, value: str) -> Sequence[str]:
        """Return the ids with a value.  Do not change them."""
        id = self.single.get(value)
        return (id,) if id is not None else self.several.get(value, ())

    def add(self, value: str, id: str) -> None:
        """Add an id that does not have the value yet."""
        if (ids := self._own(value)) is not None:
            if ids[-1] < id:
                ids.append(id)
            else:
                insort(ids, id)
        elif (other := self.single.pop(value, None)) is not None:
            self.several[value] = sorted((other, id))
        else:
            self.single[value] = id

    def remove(self, value: str, id: str) -> None:
        """Remove an id that has the value."""
        ids = self._own(value)
        if ids is None:
            del self.single[value]
            return
        del ids[bisect_left(ids, id)]
        if len(ids) == 1:
            self.single[value] = ids[0]
            del self.several[value]

    def _own(self, value: str) -> list[str] | None:
        """Return the list of a value, which may be changed, or None without a list."""
        ids = self.several.get(value)
        if ids is not None and value in self._shared:
            self._shared.remove(value)
            ids = self.several[value] = ids[:]
        return ids

    def copied(self) -> "FieldIndex":
        """Return a copy.  Changes of one of both do not affect the other."""
        copy = FieldIndex()
        copy.single, copy.several = self.single.copy(), self.several.copy()
        self._shared, copy._shared = set(self.several), set(self.several)
        return copy


class ObjectTable:
    """All objects of one kind.  ``objects`` are by id, ``ids`` are sorted, and ``indexes`` are by name."""

    def __init__(self, schema: KindSchema) -> None:
        self.schema = schema
        self.codecs = codecs_of(schema)
        self.is_versioned = "version" in self.codecs[HEAD].fields
        own = {*META, "spec_version"} if schema.type is Service else set(META)
        self.head_values = values_of(name for name in self.codecs[HEAD].fields if name not in own)
        """Returns the fields of an object's head, except the fields that the store itself sets."""
        self.objects: dict[str, Any] = {}
        self.ids: list[str] = []
        self.fill_in: Callable[[Any], Any] | None = None
        """Completes a merged object with data of another object.  Only tasks need that, for their spec."""
        self.created: dict[str, int] = {}
        """Revision at which the head was created, by id."""
        self.revisions: dict[str, dict[str, int]] = {part: {} for part in self.codecs}
        """Revision at which a key was last written, by part and id.  It contains existing keys only."""
        self.status_versions: dict[str, dict[str, int]] = {part: {} for part in schema.spec_statuses}
        """Spec version that a status reports on, by part and id."""
        self.unreadable: dict[str, str] = {}
        """Reason why a head is unreadable, by id.

        Such an object is missing, has a placeholder as its head, or keeps its last readable state.  The revisions of
        its keys are known.
        """
        self.damaged: dict[str, dict[str, str]] = {}
        """Reason why a part is unreadable, by id and part.  Such a part is missing, or keeps its last readable
        value.
        """
        self.extras: dict[tuple[str, str], Unknown] = {}
        """Fields that this version does not know, by part (or head) and id."""
        self._never_read: dict[str, set[str]] = {}
        """Damaged parts (or heads) that never had a readable value, by id."""
        self.indexes = {name: FieldIndex() for name in schema.indexes}
        self._decode_head = head_decoder(schema.type)
        self._elsewhere = tuple(field for part in schema.parts.values() for field in part)
        """The fields of all parts except the head."""

    def copied(self) -> "ObjectTable":
        """Return a copy to which changes can be applied with ``store`` and ``drop``.  It has no revisions of keys."""
        copy = ObjectTable(self.schema)
        copy.objects, copy.ids = self.objects.copy(), self.ids.copy()
        copy.unreadable = self.unreadable.copy()
        copy.damaged = {id: dict(parts) for id, parts in self.damaged.items()}
        copy.indexes = {name: index.copied() for name, index in self.indexes.items()}
        return copy

    def find(self, by: Mapping[str, str]) -> list[Any]:
        """Return the objects in order of id: all, or with ``by`` (one index and a value) only the matching ones."""
        return [self.objects[id] for id in self.found_ids(by)]

    def found_ids(self, by: Mapping[str, str]) -> Sequence[str]:
        """Return the ids of the objects that ``find`` returns.  Raises KeyError for an unknown index."""
        if not by:
            return self.ids
        ((index, value),) = by.items()
        return self.indexes[index].ids(value.lower() if index == NAME else value)

    def with_prefix(self, prefix: str) -> Sequence[str]:
        """Return the ids that begin with ``prefix``, in order."""
        first = bisect_left(self.ids, prefix)
        last = first
        while last < len(self.ids) and self.ids[last].startswith(prefix):
            last += 1
        return self.ids[first:last]

    def missing(self, id: str) -> SkepError:
        """Return the error for an object that is not in ``objects``: not found, or unreadable."""
        if id in self.unreadable:
            return Unavailable(f"{self.schema.name} {id} cannot be read: {self.unreadable[id]}")
        return NotFound(f"{self.schema.name} {id} not found")

    def revision(self, id: str, part: str) -> int:
        """Return the revision of the last write of this key, or 0 if it does not exist."""
        return self.revisions[part].get(id, 0)

    def apply(self, id: str, changes: Mapping[str, KeyChange]) -> Event | None:
        """Merge the changes of one revision to one object, by part.  Returns None if no visible field changed.

        An unreadable value leaves its part unchanged, because one damaged key must not stop a manager.
        """
        old: Any = self.objects.get(id)
        if old is not None:
            # All dictionaries use the same string object, so that lookups can compare by identity.
            id = old.id
        merged = old
        fields: dict[str, Any] = {}
        for part, change in changes.items():
            revisions = self.revisions.get(part)
            if revisions is None:
                continue  # a part of a newer version of Skep
            value = change.value
            if value is None:
                if part == HEAD:
                    return self._removed(id, old)
                fields |= self._part_removed(id, part)
                continue
            is_first = id not in revisions
            revisions[id] = change.revision
            if part == HEAD:
                self.created[id] = change.create_revision
                merged = self._read_head(id, old, change)
            else:
                fields |= self._read(id, part, change, is_first=is_first)
        if merged is None:
            if id not in self.unreadable:
                self._unmark(id)  # a part without its head
            return None
        if merged is not old:
            self._complete(merged, id, old, fields)
        elif fields:
            merged = msgspec.structs.replace(merged, **fields)
        if self.status_versions:
            merged = self._without_stale_statuses(id, merged)
        if self.fill_in is not None:
            merged = self.fill_in(merged)
        if self._never_read and (parts := self._never_read.get(id)):
            merged = self.schema.safe_fallback(merged, parts)
        return self.store(id, old, merged, moves=self.schema.indexed_part in changes)

    def _complete(self, head: Any, id: str, old: Any, fields: Mapping[str, Any]) -> None:
        """Set the fields of the other parts in ``head``, from ``fields`` or else from ``old``.

        The head was just decoded and is not shared yet, so it is changed in place.  A copy would take twice as long.
        """
        _set(head, "id", id)
        for name, value in fields.items():
            _set(head, name, value)
        if old is not None:
            for name in self._elsewhere:
                if name not in fields:
                    _set(head, name, getattr(old, name))

    def _part_removed(self, id: str, part: str) -> Mapping[str, Any]:
        """Remove a part.  Returns the default values of its fields."""
        self.revisions[part].pop(id, None)
        if self.extras:
            self.extras.pop((part, id), None)
        if part in self.status_versions:
            self.status_versions[part].pop(id, None)
        if self.damaged:
            self._repaired(id, part)
        return self.codecs[part].defaults

    def _read_head(self, id: str, old: Any, change: KeyChange) -> Any:
        """Decode a head into an object whose other parts have their defaults.  If it is unreadable, return ``old`` or a
        placeholder.

        The caller copies the fields of the other parts into it.  The head has more fields, so copying these into
        ``old`` would take twice as long.
        """
        try:
            head, extras = self._decode_head(_intact(change))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._log_unreadable(id, HEAD, error)
            self.unreadable[id] = str(error)
            if old is not None or not self.schema.has_placeholder:
                return old
            self._never_read.setdefault(id, set()).add(HEAD)
            return self.schema.type(id=id)
        if self.unreadable and self.unreadable.pop(id, None) is not None:
            self._now_readable(id, HEAD)
        if extras is not NOTHING or self.extras:
            self._keep_extras(id, HEAD, extras)
        return head

    def _read(self, id: str, part: str, change: KeyChange, *, is_first: bool) -> Mapping[str, Any]:
        """Return the fields of a part other than the head, or nothing if it is unreadable.

        ``is_first``: whether the part had no value before.
        """
        codec = self.codecs[part]
        try:
            fields, spec_version, extras = codec.decode(_intact(change))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._log_unreadable(id, part, error)
            self.damaged.setdefault(id, {})[part] = str(error)
            if is_first:
                self._never_read.setdefault(id, set()).add(part)
            return {}
        if self.damaged:
            self._repaired(id, part)
        if codec.is_spec_status:
            self.status_versions[part][id] = spec_version
        if extras is not NOTHING or self.extras:
            self._keep_extras(id, part, extras)
        return fields

    def _keep_extras(self, id: str, part: str, extras: Unknown) -> None:
        if extras is not NOTHING:
            self.extras[part, id] = extras
        else:
            self.extras.pop((part, id), None)

    def was_never_read(self, id: str, part: str) -> bool:
        """Return whether the part is damaged and never had a readable value, so that the object shows its default."""
        return part in self._never_read.get(id, ())

    def encoded(self, part: str, id: str, object: Any) -> bytes | None:
        """Return the stored form of a part of ``object``, or None if it needs no key.

        Fields that only a newer version of Skep knows are kept.
        """
        value = self.codecs[part].encode(object)
        extras = self.extras.get((part, id)) if self.extras else None
        return self.codecs[part].with_unknown(value, extras) if extras is not None else value

    def unknown_in(self, id: str, field: str) -> Unknown:
        """Return the unknown fields inside one field of a head, for a copy of that field.  ``field``: its name in
        JSON.
        """
        extras = self.extras.get((HEAD, id), NOTHING)
        return Unknown(inside={field: extras.inside[field]}) if field in extras.inside else NOTHING

    def _log_unreadable(self, id: str, part: str, error: Exception) -> None:
        kind = self.schema.name
        log.error("stored value cannot be read", kind=kind, id=id, part=part, error=str(error))

    def _without_stale_statuses(self, id: str, merged: Any) -> Any:
        """Return ``merged`` without statuses that report on another version of its spec."""
        if merged.spec_version is None:
            return merged
        current = merged.spec_version.index
        stale: dict[str, Any] = {}
        for part, versions in self.status_versions.items():
            if versions.get(id, current) != current:
                stale |= self.codecs[part].defaults
        return msgspec.structs.replace(merged, **stale) if stale else merged

    def store(self, id: str, old: Any, new: Any, *, moves: bool = True) -> Event | None:
        """Replace ``old`` by ``new`` and return the event for watchers.

        ``moves``: whether its index values may have changed.
        """
        if old is None:
            if self.ids and id < self.ids[-1]:
                insort(self.ids, id)
            else:
                self.ids.append(id)
            self.objects[id] = new
            self._enter(id, new)
            return Created(new)
        if old == new:
            return None
        self.objects[id] = new
        if moves:
            self._move(id, old, new)
        return Updated(old, new)

    def keep_unreadable(self, before: "ObjectTable") -> None:
        """Keep the last readable values from ``before``, an earlier state of the table, for values that are unreadable
        now.
        """
        for id in self.unreadable:
            old = before.objects.get(id)
            if old is not None:
                head = {name: getattr(old, name) for name in self.codecs[HEAD].fields}
                now = self.objects.get(id)
                self._now_readable(id, HEAD)
                self.store(id, now, old if now is None else msgspec.structs.replace(now, **head))
        for id, parts in self.damaged.items():
            old, now = before.objects.get(id), self.objects.get(id)
            if old is None or now is None:
                continue
            fields = {name: getattr(old, name) for part in parts for name in self.schema.parts[part]}
            for part in parts:
                self._now_readable(id, part)
            self.store(id, now, msgspec.structs.replace(now, **fields))

    def _removed(self, id: str, old: Any) -> Event | None:
        self._unmark(id)
        self.unreadable.pop(id, None)
        self.damaged.pop(id, None)
        self._never_read.pop(id, None)
        return self.drop(id, old) if old is not None else None

    def drop(self, id: str, old: Any) -> Event:
        """Remove ``old``, and return the event for watchers."""
        del self.objects[id]
        del self.ids[bisect_left(self.ids, id)]
        self._leave(id, old)
        return Deleted(old)

    def _unmark(self, id: str) -> None:
        for revisions in (self.created, *self.revisions.values(), *self.status_versions.values()):
            revisions.pop(id, None)
        for part in self.codecs if self.extras else ():
            self.extras.pop((part, id), None)

    def _repaired(self, id: str, part: str) -> None:
        """Record that a damaged part was written again or removed."""
        parts = self.damaged.get(id, {})
        parts.pop(part, None)
        if not parts:
            self.damaged.pop(id, None)
        self._now_readable(id, part)

    def _now_readable(self, id: str, part: str) -> None:
        """Record that the part (or head) has a readable value, so that it needs no safe fallback."""
        parts = self._never_read.get(id)
        if parts is not None:
            parts.discard(part)
            if not parts:
                del self._never_read[id]

    def _enter(self, id: str, new: Object) -> None:
        for name, value_of in self.schema.indexes.items():
            if value := value_of(new):
                self.indexes[name].add(value, id)

    def _move(self, id: str, old: Object, new: Object) -> None:
        for name, value_of in self.schema.indexes.items():
            before, after = value_of(old), value_of(new)
            if before == after:
                continue
            if before:
                self.indexes[name].remove(before, id)
            if after:
                self.indexes[name].add(after, id)

    def _leave(self, id: str, old: Object) -> None:
        for name, value_of in self.schema.indexes.items():
            if value := value_of(old):
                self.indexes[name].remove(value, id)


def _intact(change: KeyChange) -> bytes:
    """Return the decrypted value.  Raises msgspec.DecodeError if it cannot be decrypted."""
    if change.damage:
        raise msgspec.DecodeError(change.damage)
    assert change.value is not None, "a removal has no value to read"
    return change.value
