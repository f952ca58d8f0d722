"""The whole replicated state: a table for each kind, the owners of claims, and the references.

``State.apply`` applies the keys of one revision and returns the events, which ``replica`` publishes.  It uses neither
clock nor network.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import msgspec
import structlog
from msgspec.structs import replace

from skep.errors import InvalidArgument, NotFound, Unavailable
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.meta import Version
from skep.store import keys
from skep.store.interface import Created, Deleted, Event, Updated, nothing
from skep.store.kinds import SpecVersion, filled, present_spec, spec_version_id, spec_version_of
from skep.store.level import LOWEST
from skep.store.schema import SCHEMAS
from skep.store.tables import KeyChange, ObjectTable

log = structlog.get_logger()

T = TypeVar("T", bound=msgspec.Struct)

Owner = tuple[str, str]
"""(kind name, id) of an object."""


class Claim(msgspec.Struct, frozen=True, gc=False):
    """The owner of a unique name or port, and the revision of the claim.

    ``is_damaged``: its value is unreadable, and ``owner`` is the last known owner, or None.
    """

    owner: Owner | None
    revision: int
    is_damaged: bool = False


class State:
    """All objects at one revision.  Implements ``interface.View``."""

    def __init__(self) -> None:
        self.revision = 0
        self.level = LOWEST
        self.level_revision = 0
        self.tables = [ObjectTable(schema) for schema in SCHEMAS]
        self.table_by_name: Final = {table.schema.name: table for table in self.tables}
        self.table_by_type: Final = {table.schema.type: table for table in self.tables}
        self.table_by_type[Task].fill_in = partial(
            _filled, self.table_by_type[SpecVersion], self.table_by_type[Service].objects
        )
        self.claims: dict[str, Claim] = {}
        self.sharers: dict[str, list[Owner]] = {}
        """The objects that share a claim, sorted, by claim."""
        self.users: dict[Owner, list[Owner]] = {}
        """The objects that refer to an object, sorted, by that object."""

    # -- View ------------------------------------------------------------------------------------------------

    def lookup(self, kind: type[T], id: str) -> T | None:
        found: T | None = self.table_by_type[kind].objects.get(id)
        return found

    def get(self, kind: type[T], id: str) -> T:
        found = self.lookup(kind, id)
        if found is None:
            raise self.table_by_type[kind].missing(id)
        return found

    def find(self, kind: type[T], **by: str) -> Sequence[T]:
        return self.table_by_type[kind].find(by)

    def ids(self, kind: type[msgspec.Struct]) -> Sequence[str]:
        return self.table_by_type[kind].ids.copy()

    def unreadable(self, kind: type[msgspec.Struct]) -> Mapping[str, str]:
        """Return the errors of unreadable objects of a kind, by id.  The mapping is shared: do not change it."""
        return self.table_by_type[kind].unreadable

    def why_unreadable(self, kind: type[msgspec.Struct], name: str) -> str:
        """Return the error of the unreadable object that has this unique name, or an empty string without one."""
        table = self.table_by_type[kind]
        held = self.claims.get(keys.name_claim(table.schema.name, name))
        return table.unreadable.get(held.owner[1], "") if held is not None and held.owner is not None else ""

    def damaged(self, kind: type[msgspec.Struct]) -> Mapping[str, Mapping[str, str]]:
        return self.table_by_type[kind].damaged

    def resolve(self, kind: type[T], word: str, among: Callable[[T], bool] | None = None) -> T:
        found: T = resolved(self, self.table_by_type[kind], word, among)
        return found

    def ids_with_prefix(self, kind: type[msgspec.Struct], prefix: str) -> Sequence[str]:
        """Ids of ``kind`` that begin with ``prefix``, in order."""
        return self.table_by_type[kind].with_prefix(prefix)

    # -- for transactions ----------------------------------------------------------------------------------------

    def holder(self, claim: str) -> Claim | None:
        """Return the exclusive owner of ``claim``.  If the claim is damaged, find the object whose fields imply it.

        Raises:
            Unavailable: That object cannot be determined, because some objects are unreadable as well.
        """
        held = self.claims.get(claim)
        if held is None or held.owner is not None:
            return held
        claiming = [table for table in self.tables if table.schema.claims is not nothing]
        for table in claiming:
            for id, object in table.objects.items():
                if claim in set(table.schema.claims(object)):
                    return Claim((table.schema.name, id), held.revision, is_damaged=True)
        if any(table.unreadable for table in claiming):
            raise Unavailable(f"{claim} is taken, and its owner cannot be read")
        return held

    # -- changes -----------------------------------------------------------------------------------------------

    def copied(self) -> "State":
        """Return a copy that only ``adopt`` changes.  Later changes of this state do not affect it."""
        copy = State()
        copy.revision, copy.level, copy.level_revision = self.revision, self.level, self.level_revision
        copy.tables = [table.copied() for table in self.tables]
        copy.table_by_name.update((table.schema.name, table) for table in copy.tables)
        copy.table_by_type.update((table.schema.type, table) for table in copy.tables)
        copy.claims = self.claims.copy()
        copy.sharers = {claim: list(owners) for claim, owners in self.sharers.items()}
        copy.users = {used: list(owners) for used, owners in self.users.items()}
        return copy

    def adopt(self, written: Mapping[Owner, Any], claimed: Mapping[str, Owner | None]) -> tuple[Event, ...]:
        """Apply the writes of one transaction without encoding them, and return the events.

        Args:
            written: New objects, or None for deleted ones, as the transaction has stamped them.
            claimed: Owners of claims, or None for released ones.
        """
        self.revision += 1
        for claim, owner in claimed.items():
            if owner is None:
                self.claims.pop(claim, None)
            else:
                self.claims[claim] = Claim(owner, self.revision)
        events: list[Event | None] = []
        for owner, new in written.items():
            table = self.table_by_name[owner[0]]
            old = table.objects.get(owner[1])
            _move_members(self.users, table.schema.references, owner, old, new)
            _move_members(self.sharers, table.schema.shared_claims, owner, old, new)
            if new is not None:
                events.append(table.store(owner[1], old, new))
            elif old is not None:
                events.append(table.drop(owner[1], old))
        return tuple(event for event in events if event is not None)

    def apply(self, revision: int, changes: Iterable[KeyChange]) -> tuple[Event, ...]:
        """Apply all changes of ``revision``, and return the events."""
        objects: dict[str, dict[str, KeyChange]] = {}
        """Changes by key of the head and by part."""
        for change in changes:
            key = change.key
            match key[:2]:
                case "o/":
                    head, _, part = keys.parted(key)
                    parts = objects.get(head)
                    if parts is None:
                        parts = objects[head] = {}
                    parts[part] = change
                case "me" if key == keys.LEVEL and change.value is not None:
                    self.level, self.level_revision = int(change.value), change.revision
                case "s/":
                    claim, owner = keys.parsed_shared_key(key)
                    _set_member(self.sharers, claim, owner, present=change.value is not None)
                case "r/":
                    used, user = keys.parsed_reference_key(key)
                    _set_member(self.users, used, user, present=change.value is not None)
                case start if start in keys.CLAIMS:
                    self._apply_claim(change)
        self.revision = max(self.revision, revision)
        by_kind: dict[str, dict[str, dict[str, KeyChange]]] = {}
        for head, parts in objects.items():
            kind, id = keys.parsed_head_key(head)
            by_kind.setdefault(kind, {})[id] = parts
        return tuple(self._merged(by_kind))

    def _apply_claim(self, change: KeyChange) -> None:
        if change.value is None:
            self.claims.pop(change.key, None)
            return
        kind, _, id = change.value.decode(errors="replace").partition("/")
        if not change.damage and kind in self.table_by_name:
            self.claims[change.key] = Claim((kind, id), change.revision)
            return
        log.error("stored value cannot be read", key=change.key, error=change.damage or "it names no object")
        before = self.claims.get(change.key)
        self.claims[change.key] = Claim(before.owner if before else None, change.revision, is_damaged=True)

    def keep_unreadable(self, before: "State") -> None:
        """Keep the last readable values from ``before``, the state that this one replaces, for values that are
        unreadable now.
        """
        for table, old in zip(self.tables, before.tables, strict=True):
            table.keep_unreadable(old)
        versions = self.table_by_type[SpecVersion]
        kept = {id for id in versions.unreadable if id in versions.objects}
        # Only the effect matters. The difference of the two states produces the events.
        deque(self._refilled(kept, ()), maxlen=0)

    def _merged(self, by_kind: dict[str, dict[str, dict[str, KeyChange]]]) -> Iterable[Event]:
        specs: set[str] = set()
        for table in self.tables:  # other kinds have no table, because they belong to newer versions
            kind = table.schema.type
            for id, changes in by_kind.get(table.schema.name, {}).items():
                event = table.apply(id, changes)
                if event is None:
                    continue
                if kind is SpecVersion and not isinstance(event, Updated):
                    specs.add(id)
                yield event
                if isinstance(event, Updated) and isinstance(event.old, Service):
                    assert isinstance(event.new, Service)
                    yield from self._last_spec(event.old, event.new.spec_version)
        if specs:
            yield from self._refilled(specs, by_kind.get("task", {}).keys())

    def _last_spec(self, service: Service, present: Version | None) -> Iterable[Event]:
        """Keep the previous spec of a service that gets a new one, if the stored version of the previous spec is
        unreadable.
        """
        versions, last = self.table_by_type[SpecVersion], service.spec_version
        if not versions.unreadable or last is None or last == present:
            return
        id = spec_version_id(service.id, last)
        if id in versions.unreadable and id not in versions.objects:
            kept = SpecVersion(id=id, service_id=service.id, index=last.index, spec=service.spec)
            event = versions.store(id, None, kept)
            if event is not None:
                yield event

    def _refilled(self, spec_ids: set[str], done: Collection[str]) -> Iterable[Event]:
        """Yield the events of tasks whose spec changes because their spec version was stored or removed."""
        tasks = self.table_by_type[Task]
        for service_id in sorted({id.rpartition("/")[0] for id in spec_ids}):
            for task in tasks.find({"service_id": service_id}):
                if task.id in done or task.spec_version is None:
                    continue
                if spec_version_id(service_id, task.spec_version) not in spec_ids:
                    continue
                version = spec_version_of(self, task)
                spec = version.spec.task_template if version else tasks.codecs["spec"].defaults["spec"]
                event = tasks.store(task.id, task, msgspec.structs.replace(task, spec=spec), moves=False)
                if event is not None:
                    yield event


def _filled(versions: ObjectTable, services: Mapping[str, Service], task: Task) -> Task:
    """Return ``task`` with the spec of its spec version, if that is stored."""
    if task.spec_version is None:
        return task
    id = spec_version_id(task.service_id, task.spec_version)
    version = versions.objects.get(id)
    if version is None and id in versions.unreadable:
        spec = present_spec(services.get(task.service_id), task)
        if spec is not None:
            return replace(task, spec=spec.task_template)
    return filled(task, version)


def differences(old: State, new: State) -> Iterator[Event]:
    """Yield the events that lead from ``old`` to ``new``.  Removals come first, then the others by kind and id.

    It is a generator so that the caller can let other tasks run.  Neither state may change meanwhile.
    """
    for before, after in zip(old.tables, new.tables, strict=True):
        for id in before.ids:
            if id not in after.objects:
                yield Deleted(before.objects[id])
    for before, after in zip(old.tables, new.tables, strict=True):
        for id in after.ids:
            one, other = before.objects.get(id), after.objects[id]
            if one is None:
                yield Created(other)
            elif one != other:
                yield Updated(one, other)


def _set_member(lists: dict[Any, list[Owner]], key: Any, member: Owner, *, present: bool) -> None:
    members = lists.get(key, [])
    index = bisect_left(members, member)
    is_member = index < len(members) and members[index] == member
    if present and not is_member:
        insort(lists.setdefault(key, members), member)
    elif is_member and not present:
        del members[index]
        if not members:
            del lists[key]


def _move_members(
    lists: dict[Any, list[Owner]], of: Callable[[Any], Iterable[Any]], owner: Owner, old: Any, new: Any
) -> None:
    """Move ``owner`` from the lists of its old references, or shared claims, to the lists of its new ones."""
    if of is nothing:
        return
    before, after = set(of(old)) if old is not None else set(), set(of(new)) if new is not None else set()
    for key in before - after:
        _set_member(lists, key, owner, present=False)
    for key in after - before:
        _set_member(lists, key, owner, present=True)


def resolved(view: Any, table: ObjectTable, word: str, among: Callable[[Any], bool] | None = None) -> Any:
    """Return the object that ``word`` names: by id, name, or unique prefix of an id.

    Args:
        view: The state, or a transaction on it, with ``lookup``, ``find`` and ``ids_with_prefix``.
        among: See ``interface.View.resolve``.

    Raises:
        NotFound: No object matches.
        InvalidArgument: Several objects match.
        Unavailable: The object is unreadable.

    Source: moby, daemon/cluster/helpers.go.
    """
    schema = table.schema
    kind: type[Any] = schema.type

    def is_found(one: Any) -> bool:
        return one is not None and not schema.is_hidden(one) and (among is None or among(one))

    exact = view.lookup(kind, word)
    if is_found(exact):
        return exact
    found: list[Any] = []
    if kind is Task:
        found = _tasks_named(view, word)
    elif "name" in schema.indexes:
        found = list(view.find(kind, name=word))
    if among is not None:
        found = list(filter(among, found))
    if not found and word:
        candidates = (view.lookup(kind, id) for id in view.ids_with_prefix(kind, word))
        found = list(filter(is_found, candidates))
    match found:
        case []:
            raise table.missing(word) if among is None else NotFound(f"{schema.name} {word} not found")
        case [one]:
            return one
    raise InvalidArgument(f"{schema.name} {word} is ambiguous ({len(found)} matches found)")


def _tasks_named(view: Any, word: str) -> list[Task]:
    """Return the task called ``service.slot.id``.  Source: swarmkit, api/naming/naming.go."""
    task: Task | None = view.lookup(Task, word.rpartition(".")[2])
    if task is None:
        return []
    service: Service | None = view.lookup(Service, task.service_id)
    if service is None:
        return []
    name = task.container_name(service.spec.name)
    return [task] if name.lower() == word.lower() else []
