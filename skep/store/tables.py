"""The merged objects of one kind in memory, with their indexes.

An object is several keys, one writer each; ``Table`` puts them together and remembers at which revision each
key was last written, which is what transactions compare.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import structlog

from skep.model.service import Service
from skep.store.codec import codecs_of, values_of
from skep.store.interface import Created, Deleted, Event, KindSchema, Object, Updated
from skep.store.keys import HEAD

log = structlog.get_logger()

NAME = "name"

META = ("version", "created_at", "updated_at")
"""What the store itself writes into heads."""

NO_ANSWERS: Mapping[str, int] = {}


class PartChange(msgspec.Struct, frozen=True, gc=False):
    """One key of an object as the store now has it.  ``value`` None: deleted."""

    part: str
    value: bytes | None
    revision: int
    create_revision: int = 0


class Marks(msgspec.Struct, frozen=True, gc=False):
    """Where the keys of one object stand.  ``revisions``: part -> modification revision, existing keys only.

    ``answers``: part -> spec version it answers, for parts that answer one.
    """

    create_revision: int
    revisions: Mapping[str, int]
    answers: Mapping[str, int] = {}


class Table:
    """All objects of one kind.  ``objects`` by id, ``ids`` sorted, ``indexes`` name -> value -> sorted ids.

    In an index one id alone stands for itself: a list for each of 100,000 slots would be most of what a garbage
    collection has to walk through.
    """

    def __init__(self, schema: KindSchema) -> None:
        self.schema = schema
        self.codecs = codecs_of(schema)
        own = {*META, "spec_version"} if schema.type is Service else set(META)
        self.wish = values_of(name for name in self.codecs[HEAD].fields if name not in own)
        """The head of an object but for what the store itself writes into it."""
        self.objects: dict[str, Any] = {}
        self.ids: list[str] = []
        self.marks: dict[str, Marks] = {}
        self.unreadable: dict[str, str] = {}
        """Id -> why its head cannot be read.  Such an object is not there, or is what it was before."""
        self.indexes: dict[str, dict[str, str | list[str]]] = {name: {} for name in schema.indexes}
        self._places = [(value_of, self.indexes[name]) for name, value_of in schema.indexes.items()]
        self._head_fields = frozenset(self.codecs[HEAD].fields)

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

    def apply(self, id: str, changes: Iterable[PartChange]) -> Event | None:
        """Merge what one revision changed in one object; None when nothing that can be seen did.

        A value that cannot be read leaves its part as it was: one bad key must not stop a manager.
        """
        old = self.objects.get(id)
        marks = self.marks.get(id)
        changes = tuple(changes)
        head: PartChange | None = None
        for change in changes:
            if change.part == HEAD:
                head = change
        if head is not None and head.value is None:
            return self._removed(id, old)
        if head is None and old is None:
            return None  # a part that outlived its object, or came from a newer version of Skep
        fields, answers = self._read(id, changes, marks)
        if old is None and not self._head_fields <= fields.keys():
            return None  # the head could not be read
        revisions = dict(marks.revisions) if marks is not None else {}
        for change in changes:
            if change.value is None:
                revisions.pop(change.part, None)
            else:
                revisions[change.part] = change.revision
        created = (
            head.create_revision if head is not None else marks.create_revision if marks is not None else 0
        )
        self.marks[id] = Marks(created, revisions, answers)
        merged = self.schema.type(**fields) if old is None else msgspec.structs.replace(old, **fields)
        if self.schema.answers:
            merged = self.without_stale_answers(merged, answers)
        return self.store(id, old, merged)

    def without_stale_answers(self, merged: Any, answers: Mapping[str, int]) -> Any:
        """``merged`` without the parts that answer another version of its spec."""
        if not self.schema.answers or merged.spec_version is None:
            return merged
        stale: dict[str, Any] = {}
        for part in self.schema.answers:
            if answers.get(part, merged.spec_version.index) != merged.spec_version.index:
                stale |= self.codecs[part].defaults
        return msgspec.structs.replace(merged, **stale) if stale else merged

    def store(self, id: str, old: Any, new: Any) -> Event | None:
        """Keep ``new`` in place of ``old`` and say what that means to an observer."""
        if old is None:
            if self.ids and id < self.ids[-1]:
                insort(self.ids, id)
            else:
                self.ids.append(id)
        elif old == new:
            return None
        self.objects[id] = new
        self._index(id, old, new)
        return Created(new) if old is None else Updated(old, new)

    def _removed(self, id: str, old: Any) -> Event | None:
        self.marks.pop(id, None)
        self.unreadable.pop(id, None)
        if old is None:
            return None
        del self.objects[id]
        del self.ids[bisect_left(self.ids, id)]
        self._index(id, old, None)
        return Deleted(old)

    def _read(
        self, id: str, changes: Iterable[PartChange], marks: Marks | None
    ) -> tuple[dict[str, Any], Mapping[str, int]]:
        fields: dict[str, Any] = {}
        answers: Mapping[str, int] = marks.answers if marks is not None else NO_ANSWERS
        for change in changes:
            codec = self.codecs.get(change.part)
            if codec is None:
                continue  # a part that only newer versions of Skep know
            if change.value is None:
                fields = {**fields, **codec.defaults}  # what was decoded is not ours to change
                answers = {part: answered for part, answered in answers.items() if part != change.part}
                continue
            try:
                values, answered = codec.decode(change.value)
            except msgspec.MsgspecError as error:
                log.error(
                    "stored value cannot be read",
                    kind=self.schema.name,
                    id=id,
                    part=change.part,
                    error=str(error),
                )
                if change.part == HEAD:
                    self.unreadable[id] = str(error)
                continue
            if change.part == HEAD:
                self.unreadable.pop(id, None)
            fields = {**fields, **values} if fields else values
            if codec.is_answer:
                answers = {**answers, change.part: answered}
        return fields, answers

    def _index(self, id: str, old: Object | None, new: Object | None) -> None:
        for value_of, index in self._places:
            before = value_of(old) if old is not None else None
            after = value_of(new) if new is not None else None
            if before == after:
                continue
            if before is not None:
                _take_out(index, before, id)
            if after is not None:
                _put_in(index, after, id)


def _put_in(index: dict[str, str | list[str]], value: str, id: str) -> None:
    found = index.get(value)
    if found is None:
        index[value] = id
    elif isinstance(found, str):
        index[value] = sorted((found, id))
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
