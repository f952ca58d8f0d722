"""The merged objects of one kind in memory, with their indexes.

An object is several keys, one writer each; ``Table`` puts them together and remembers at which revision each
key was last written, which is what transactions compare.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import structlog

from skep.errors import NotFound, SkepError, Unavailable
from skep.model.service import Service
from skep.model.unknown import NOTHING, Unknown
from skep.store.codec import codecs_of, head_decoder, values_of
from skep.store.interface import Created, Deleted, Event, KindSchema, Object, Updated
from skep.store.keys import HEAD

log = structlog.get_logger()

_set = msgspec.structs.force_setattr

NAME = "name"

META = ("version", "created_at", "updated_at")
"""What the store itself writes into heads."""


class KeyChange(msgspec.Struct, frozen=True, gc=False):
    """One key as the store now has it, its value in clear.

    ``value`` None: deleted.  ``damage``: why the stored value cannot be decrypted; then ``value`` means nothing.
    """

    key: str
    value: bytes | None
    revision: int
    create_revision: int = 0
    damage: str = ""


class Table:
    """All objects of one kind.  ``objects`` by id, ``ids`` sorted, ``indexes`` name -> value -> sorted ids.

    In an index one id alone stands for itself: a list for each of 100,000 slots would be most of what a garbage
    collection has to walk through.
    """

    def __init__(self, schema: KindSchema) -> None:
        self.schema = schema
        self.codecs = codecs_of(schema)
        self.is_versioned = "version" in self.codecs[HEAD].fields
        own = {*META, "spec_version"} if schema.type is Service else set(META)
        self.wish = values_of(name for name in self.codecs[HEAD].fields if name not in own)
        """The head of an object but for what the store itself writes into it."""
        self.objects: dict[str, Any] = {}
        self.ids: list[str] = []
        self.completed: Callable[[Any], Any] | None = None
        """Gives an object that was put together from its keys what it has from another one (a task: its spec)."""
        self.created: dict[str, int] = {}
        """Id -> revision at which its head was created."""
        self.revisions: dict[str, dict[str, int]] = {part: {} for part in self.codecs}
        """Part -> id -> revision at which that key was last written; existing keys only."""
        self.answers: dict[str, dict[str, int]] = {part: {} for part in schema.answers}
        """Part -> id -> spec version that it answers."""
        self.unreadable: dict[str, str] = {}
        """Id -> why its head cannot be read.  Such an object is not there, has a stand-in for its head, or is what it
        was before.  The revisions of its keys are known all the same."""
        self.damaged: dict[str, dict[str, str]] = {}
        """Id -> part -> why that cannot be read.  Such a part is not there, or is what it was before."""
        self._extras: dict[tuple[str, str], Unknown] = {}
        """Part (or head) and id -> its fields that this version does not know."""
        self._never_read: dict[str, set[str]] = {}
        """Id -> damaged parts (or the head) of which no earlier value is known either."""
        self.indexes: dict[str, dict[str, str | list[str]]] = {name: {} for name in schema.indexes}
        self._places = [(value_of, self.indexes[name]) for name, value_of in schema.indexes.items()]
        self._decode_head = head_decoder(schema.type)
        self._elsewhere = tuple(field for part in schema.parts.values() for field in part)
        """The fields of the other parts."""

    def find(self, by: Mapping[str, str]) -> list[Any]:
        """Objects in order of id, all or those with one value of one index."""
        return [self.objects[id] for id in self.found_ids(by)]

    def found_ids(self, by: Mapping[str, str]) -> Sequence[str]:
        """Their ids.  Raises: KeyError: there is no such index."""
        if not by:
            return self.ids
        ((index, value),) = by.items()
        found = self.indexes[index].get(value.lower() if index == NAME else value, ())
        return (found,) if isinstance(found, str) else found

    def with_prefix(self, prefix: str) -> Sequence[str]:
        """Ids that begin with ``prefix``, in order."""
        first = bisect_left(self.ids, prefix)
        last = first
        while last < len(self.ids) and self.ids[last].startswith(prefix):
            last += 1
        return self.ids[first:last]

    def missing(self, id: str) -> SkepError:
        """What to say of an object that is not in ``objects``: not found, or it cannot be read."""
        if id in self.unreadable:
            return Unavailable(f"{self.schema.name} {id} cannot be read: {self.unreadable[id]}")
        return NotFound(f"{self.schema.name} {id} not found")

    def revision(self, id: str, part: str) -> int:
        """When this key was last written; 0: it does not exist."""
        return self.revisions[part].get(id, 0)

    def apply(self, id: str, changes: Mapping[str, KeyChange]) -> Event | None:
        """Merge what one revision changed in one object, by part; None when nothing that can be seen did.

        A value that cannot be read leaves its part as it was: one bad key must not stop a manager.
        """
        old: Any = self.objects.get(id)
        if old is not None:
            # One and the same string wherever the object is filed: it is found without a comparison.
            id = old.id
        merged = old
        fields: dict[str, Any] = {}
        for part, change in changes.items():
            revisions = self.revisions.get(part)
            if revisions is None:
                continue  # only newer versions of Skep know it
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
                self._unmark(id)  # a part that outlived its object
            return None
        if merged is not old:
            self._complete(merged, id, old, fields)
        elif fields:
            merged = msgspec.structs.replace(merged, **fields)
        if self.answers:
            merged = self._without_stale_answers(id, merged)
        if self.completed is not None:
            merged = self.completed(merged)
        if self._never_read and (parts := self._never_read.get(id)):
            merged = self.schema.assumed(merged, parts)
        return self.store(id, old, merged, moves=self.schema.indexed_part in changes)

    def _complete(self, head: Any, id: str, old: Any, fields: Mapping[str, Any]) -> None:
        """Lay over ``head`` what the other parts say now (``fields``) or have said (``old``).

        It was decoded just now and nobody else has it, so it is changed in place: a copy takes twice as long.
        """
        _set(head, "id", id)
        for name, value in fields.items():
            _set(head, name, value)
        if old is not None:
            for name in self._elsewhere:
                if name not in fields:
                    _set(head, name, getattr(old, name))

    def _part_removed(self, id: str, part: str) -> Mapping[str, Any]:
        """What the fields of a part are without it."""
        self.revisions[part].pop(id, None)
        if self._extras:
            self._extras.pop((part, id), None)
        if part in self.answers:
            self.answers[part].pop(id, None)
        if self.damaged:
            self._mended(id, part)
        return self.codecs[part].defaults

    def _read_head(self, id: str, old: Any, change: KeyChange) -> Any:
        """A head as an object whose other parts hold their defaults; ``old``, or a stand-in, when it cannot be read.

        That takes half as long as to read its fields and lay them over ``old``: there are more of them than of others.
        """
        try:
            head, extras = self._decode_head(_intact(change))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._complain(id, HEAD, error)
            self.unreadable[id] = str(error)
            if old is not None or not self.schema.has_stand_in:
                return old
            self._never_read.setdefault(id, set()).add(HEAD)
            return self.schema.type(id=id)
        if self.unreadable and self.unreadable.pop(id, None) is not None:
            self._read_at_last(id, HEAD)
        if extras is not NOTHING or self._extras:
            self._keep_extras(id, HEAD, extras)
        return head

    def _read(self, id: str, part: str, change: KeyChange, *, is_first: bool) -> Mapping[str, Any]:
        """The fields of a part that is not the head; none when it cannot be read.

        ``is_first``: nothing was known of it before.
        """
        codec = self.codecs[part]
        try:
            fields, answered, extras = codec.decode(_intact(change))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._complain(id, part, error)
            self.damaged.setdefault(id, {})[part] = str(error)
            if is_first:
                self._never_read.setdefault(id, set()).add(part)
            return {}
        if self.damaged:
            self._mended(id, part)
        if codec.is_answer:
            self.answers[part][id] = answered
        if extras is not NOTHING or self._extras:
            self._keep_extras(id, part, extras)
        return fields

    def _keep_extras(self, id: str, part: str, extras: Unknown) -> None:
        if extras is not NOTHING:
            self._extras[part, id] = extras
        else:
            self._extras.pop((part, id), None)

    def encoded(self, part: str, id: str, object: Any) -> bytes | None:
        """A part of ``object`` as it is to be stored; None: it needs no key.

        What a newer version has written there, and this one does not know, stays.
        """
        value = self.codecs[part].encode(object)
        extras = self._extras.get((part, id)) if self._extras else None
        return self.codecs[part].with_unknown(value, extras) if extras is not None else value

    def unknown_in(self, id: str, field: str) -> Unknown:
        """What of one field of a head (its name in JSON) this version does not know, for copies of it elsewhere."""
        extras = self._extras.get((HEAD, id), NOTHING)
        return Unknown(inside={field: extras.inside[field]}) if field in extras.inside else NOTHING

    def _complain(self, id: str, part: str, error: Exception) -> None:
        kind = self.schema.name
        log.error("stored value cannot be read", kind=kind, id=id, part=part, error=str(error))

    def _without_stale_answers(self, id: str, merged: Any) -> Any:
        """``merged`` without the parts that answer another version of its spec."""
        if merged.spec_version is None:
            return merged
        current = merged.spec_version.index
        stale: dict[str, Any] = {}
        for part, answered in self.answers.items():
            if answered.get(id, current) != current:
                stale |= self.codecs[part].defaults
        return msgspec.structs.replace(merged, **stale) if stale else merged

    def store(self, id: str, old: Any, new: Any, *, moves: bool = True) -> Event | None:
        """Keep ``new`` in place of ``old`` and say what that means to an observer.

        ``moves``: whether that may change its places in the indexes.
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

    def keep_unreadable(self, before: "Table") -> None:
        """Take what cannot be read here from ``before``, an earlier state of the same table, as far as that had it."""
        for id in self.unreadable:
            old = before.objects.get(id)
            if old is not None:
                head = {name: getattr(old, name) for name in self.codecs[HEAD].fields}
                now = self.objects.get(id)
                self._read_at_last(id, HEAD)
                self.store(id, now, old if now is None else msgspec.structs.replace(now, **head))
        for id, parts in self.damaged.items():
            old, now = before.objects.get(id), self.objects.get(id)
            if old is None or now is None:
                continue
            fields = {name: getattr(old, name) for part in parts for name in self.schema.parts[part]}
            for part in parts:
                self._read_at_last(id, part)
            self.store(id, now, msgspec.structs.replace(now, **fields))

    def _removed(self, id: str, old: Any) -> Event | None:
        self._unmark(id)
        self.unreadable.pop(id, None)
        self.damaged.pop(id, None)
        self._never_read.pop(id, None)
        if old is None:
            return None
        del self.objects[id]
        del self.ids[bisect_left(self.ids, id)]
        self._leave(id, old)
        return Deleted(old)

    def _unmark(self, id: str) -> None:
        for revisions in (self.created, *self.revisions.values(), *self.answers.values()):
            revisions.pop(id, None)
        for part in self.codecs if self._extras else ():
            self._extras.pop((part, id), None)

    def _mended(self, id: str, part: str) -> None:
        """The part was written anew, or removed."""
        parts = self.damaged.get(id, {})
        parts.pop(part, None)
        if not parts:
            self.damaged.pop(id, None)
        self._read_at_last(id, part)

    def _read_at_last(self, id: str, part: str) -> None:
        """A value of the part (or head) is known; nothing has to be assumed for it any more."""
        parts = self._never_read.get(id)
        if parts is not None:
            parts.discard(part)
            if not parts:
                del self._never_read[id]

    def _enter(self, id: str, new: Object) -> None:
        for value_of, index in self._places:
            if value := value_of(new):
                _put_in(index, value, id)

    def _move(self, id: str, old: Object, new: Object) -> None:
        for value_of, index in self._places:
            before, after = value_of(old), value_of(new)
            if before == after:
                continue
            if before:
                _take_out(index, before, id)
            if after:
                _put_in(index, after, id)

    def _leave(self, id: str, old: Object) -> None:
        for value_of, index in self._places:
            if value := value_of(old):
                _take_out(index, value, id)


def _intact(change: KeyChange) -> bytes:
    """The value that was written.  Raises: msgspec.DecodeError: it cannot be decrypted."""
    if change.damage:
        raise msgspec.DecodeError(change.damage)
    assert change.value is not None, "a removal has no value to read"
    return change.value


def _put_in(index: dict[str, str | list[str]], value: str, id: str) -> None:
    found = index.get(value)
    if found is None:
        index[value] = id
    elif isinstance(found, str):
        index[value] = sorted((found, id))
    elif found[-1] < id:
        found.append(id)
    else:
        insort(found, id)


def _take_out(index: dict[str, str | list[str]], value: str, id: str) -> None:
    found = index[value]
    if isinstance(found, str):
        del index[value]
        return
    del found[bisect_left(found, id)]
    if len(found) == 1:
        index[value] = found[0]
