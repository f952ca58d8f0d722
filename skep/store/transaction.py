"""Run a transaction function against a state, and turn what it did into a proposal.

The transaction sees its own writes.  Nothing is copied: what it put lies in a small overlay beside the state,
and only the touched objects are compared with what they were.
"""

from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import msgspec

from skep.errors import AlreadyExists, NotFound, SkepError
from skep.model.meta import Version
from skep.model.service import Service
from skep.model.task import Task
from skep.model.times import ZERO_TIME, Timestamp, timestamp
from skep.store.codec import values_of
from skep.store.draft import Draft
from skep.store.interface import InUse, KindSchema, Object, nothing
from skep.store.kinds import SpecVersion, filled, spec_version_id, spec_version_of
from skep.store.proposal import Proposal
from skep.store.state import Owner, State, resolved
from skep.store.tables import META, NAME, Table

T = TypeVar("T", bound=msgspec.Struct)

_meta_of = values_of(META)


class Writing:
    """One run of a transaction function.  Implements ``interface.Transaction``.

    ``now_ns``: stamped on what is created and changed.
    """

    def __init__(self, state: State, now_ns: int) -> None:
        self._state = state
        self.revision = state.revision
        self._now_ns = now_ns
        self._written: dict[Owner, Any] = {}
        """What this transaction put (None: deleted), by kind name and id, in the order of the first write."""
        self._relied: dict[Owner, set[str] | None] = {}
        """Objects whose change in between fails the commit; the parts that count, None: all."""
        self._claimed: dict[str, Owner | None] = {}
        self._existing: set[Owner] = set()
        self._level: int | None = None

    # -- View ------------------------------------------------------------------------------------------------

    def lookup(self, kind: type[T], id: str) -> T | None:
        found: T | None = self._current(self._state.table_by_type[kind], id)
        return found

    def get(self, kind: type[T], id: str) -> T:
        found = self.rely_on(kind, id)
        if found is None:
            raise self._state.table_by_type[kind].missing(id)
        return found

    def rely_on(self, kind: type[T], id: str, *parts: str) -> T | None:
        table = self._state.table_by_type[kind]
        owner = (table.schema.name, id)
        if not parts:
            self._relied[owner] = None
        elif owner not in self._relied:
            self._relied[owner] = set(parts)
        elif (counted := self._relied[owner]) is not None:
            counted |= set(parts)
        found: T | None = self._current(table, id)
        if found is None and id in table.unreadable and owner not in self._written:
            raise table.missing(id)
        return found

    def find(self, kind: type[T], **by: str) -> Sequence[T]:
        table = self._state.table_by_type[kind]
        ids = table.found_ids(by)
        written = {id: object for (name, id), object in self._written.items() if name == table.schema.name}
        if not written:
            return [table.objects[id] for id in ids]
        found = [id for id in ids if id not in written]
        for id, object in written.items():
            if object is not None and _is_found(table, object, by):
                insort(found, id)
        return [written[id] if id in written else table.objects[id] for id in found]

    def ids(self, kind: type[msgspec.Struct]) -> Sequence[str]:
        return [object.id for object in self.find(kind)]  # type: ignore[attr-defined]

    def unreadable(self, kind: type[msgspec.Struct]) -> Mapping[str, str]:
        return self._state.unreadable(kind)

    def damaged(self, kind: type[msgspec.Struct]) -> Mapping[str, Mapping[str, str]]:
        return self._state.damaged(kind)

    def resolve(self, kind: type[T], word: str) -> T:
        found: T = resolved(self, self._state.table_by_type[kind], word)
        return found

    def ids_with_prefix(self, kind: type[msgspec.Struct], prefix: str) -> Sequence[str]:
        """Ids of ``kind`` that begin with ``prefix``, in order; deleted ones may be among them."""
        table = self._state.table_by_type[kind]
        added = {id for name, id in self._written if name == table.schema.name and id.startswith(prefix)}
        return sorted(added.union(table.with_prefix(prefix)))

    # -- Transaction -------------------------------------------------------------------------------------------

    def put(self, object: T) -> T:
        table = self._state.table_by_type[type(object)]
        schema = table.schema
        id: str = object.id  # type: ignore[attr-defined]
        owner = (schema.name, id)
        base = table.objects.get(id)
        current = self._written.get(owner, base)
        stored: Any = self._stamped(table, base, current, object) if table.is_versioned else object
        if isinstance(stored, Task) and stored.spec_version is not None:
            stored = filled(stored, spec_version_of(self, stored))
        if schema.claims is not nothing or schema.shared_claims is not nothing:
            self._claim(table, owner, current, stored)
        if schema.references is not nothing:
            self._refer(table, current, stored)
        self._written[owner] = stored
        if isinstance(stored, Service) and (current is None or current.spec != stored.spec):
            self._keep_spec(stored)
        result: T = stored
        return result

    @property
    def level(self) -> int:
        return self._level or self._state.level

    def raise_level(self, level: int) -> None:
        if level > self._state.level:
            self._level = level

    def delete(self, kind: type[T], id: str) -> None:
        table = self._state.table_by_type[kind]
        current = self._current(table, id)
        owner = (table.schema.name, id)
        if current is None:
            raise table.missing(id)
        users = [user for user in self._users(owner) if user != owner]
        if users:
            raise InUse(f"{table.schema.name} {id} is in use", users)
        for claim in table.schema.claims(current):
            self._release(claim, owner)
        self._written[owner] = None
        if kind is Service:
            for version in self.find(SpecVersion, service_id=id):
                self.delete(SpecVersion, version.id)

    # -- inside ------------------------------------------------------------------------------------------------

    def _current(self, table: Table, id: str) -> Any:
        return self._written.get((table.schema.name, id), table.objects.get(id))

    def _stamped(self, table: Table, base: Any, current: Any, object: Any) -> Any:
        """``object`` with version and stamps as the store sets them.

        The version moves once per transaction and only with the head, so that a status report never makes a
        user's update "out of sequence".
        """
        if current is None:
            now = self._now
            meta = {
                "version": Version(index=max(1, self.revision)),
                "created_at": now if object.created_at == ZERO_TIME else object.created_at,
                "updated_at": now,
            }
        elif base is not None and table.wish(base) == table.wish(object):
            if (
                base.version is object.version
                and table.schema.type is not Service
                and _meta_of(base) == _meta_of(object)
            ):
                return object
            meta = dict(zip(META, _meta_of(base), strict=True))
        else:
            previous = (base or current).version.index
            meta = {
                "version": current.version
                if base is None
                else Version(index=max(previous + 1, self.revision)),
                "created_at": current.created_at,
                "updated_at": self._now,
            }
        if not isinstance(object, Service):
            return msgspec.structs.replace(object, **meta)
        if base is None or base.spec != object.spec:
            meta["spec_version"] = meta["version"]
        else:
            meta["spec_version"] = base.spec_version
        stamped = msgspec.structs.replace(object, service_status=None, **meta)
        return self._without_old_answers(table, base, stamped)

    @cached_property
    def _now(self) -> Timestamp:
        return timestamp(self._now_ns)

    def _without_old_answers(self, table: Table, base: Any, stamped: Any) -> Any:
        """Answers that nobody touched speak of the spec before: the merge will drop them, so drop them here."""
        if base is None or base.spec_version == stamped.spec_version:
            return stamped
        stale: dict[str, Any] = {}
        for part in table.schema.answers:
            if table.codecs[part].is_same(base, stamped):
                stale |= table.codecs[part].defaults
        return msgspec.structs.replace(stamped, **stale) if stale else stamped

    def _keep_spec(self, service: Service) -> None:
        assert service.spec_version is not None, "stamped with the spec"
        id = spec_version_id(service.id, service.spec_version)
        self.put(
            SpecVersion(id=id, service_id=service.id, index=service.spec_version.index, spec=service.spec)
        )
        for (
            owner,
            object,
        ) in self._written.items():  # a version that this transaction changes for the second time
            if isinstance(object, Task) and object.service_id == service.id:
                self._written[owner] = filled(object, spec_version_of(self, object))

    def _claim(self, table: Table, owner: Owner, current: Any, new: Any) -> None:
        """Take what ``new`` claims and ``current`` did not, release the rest.  Raises: what ``taken`` says."""
        schema = table.schema
        wanted = set(schema.claims(new))
        before = set(schema.claims(current)) if current is not None else set()
        shared = set(schema.shared_claims(new))
        for claim in sorted(wanted):
            holder = self._holder(claim)
            if holder is not None and holder != owner and not self._is_stale(claim, holder):
                if claim in before:
                    wanted.discard(claim)  # both have had it since before it was claimed: neither is stopped
                    continue
                raise self._taken(schema, claim, new, holder)
            others = [sharer for sharer in self._sharers(claim) if sharer != owner]
            if others:
                raise self._taken(schema, claim, new, others[0])
        for claim in sorted(shared):
            holder = self._holder(claim)
            if holder is not None and holder != owner:
                raise self._taken(schema, claim, new, holder)
        for claim in before.difference(schema.claims(new)):
            self._release(claim, owner)
        for claim in wanted:
            self._claimed[claim] = owner

    def _release(self, claim: str, owner: Owner) -> None:
        if self._holder(claim) == owner:
            self._claimed[claim] = None

    def _is_stale(self, claim: str, holder: Owner) -> bool:
        """Whether ``holder`` is gone, or has given it up: a manager that knows no such claims has changed it."""
        table = self._state.table_by_name[holder[0]]
        held_by = self._object(holder)
        if held_by is None:
            return holder[1] not in table.unreadable
        return claim not in set(table.schema.claims(held_by)) and holder[1] not in table.damaged

    def _taken(self, schema: KindSchema, claim: str, new: Any, holder: Owner) -> SkepError:
        held_by = self._object(holder)
        if held_by is None:
            return AlreadyExists(f"{claim} belongs to {holder[0]} {holder[1]}, which cannot be read")
        return schema.taken(claim, new, held_by)

    def _refer(self, table: Table, current: Any, new: Any) -> None:
        """Check that what ``new`` refers to, and ``current`` did not, exists.  Raises: NotFound."""
        used_now = table.schema.references(new)
        if used_now == ():
            return
        before = set(table.schema.references(current)) if current is not None else set()
        for used in sorted(set(used_now) - before):
            if self._object(used) is None:
                raise NotFound(f"{used[0]} {used[1]} not found")
            self._existing.add(used)

    def _object(self, owner: Owner) -> Any:
        return self._current(self._state.table_by_name[owner[0]], owner[1])

    def _holder(self, claim: str) -> Owner | None:
        if claim in self._claimed:
            return self._claimed[claim]
        held = self._state.holder(claim)
        return held.owner if held is not None else None

    def _sharers(self, claim: str) -> list[Owner]:
        return self._members(
            self._state.sharers.get(claim, ()),
            lambda table, other: claim in set(table.schema.shared_claims(other)),
        )

    def _users(self, used: Owner) -> list[Owner]:
        return self._members(
            self._state.users.get(used, ()),
            lambda table, other: used in set(table.schema.references(other)),
        )

    def _members(self, stored: Iterable[Owner], belongs: Callable[[Table, Any], bool]) -> list[Owner]:
        """``stored`` owners as this transaction leaves them: without the changed ones, with those that belong."""
        members = {owner for owner in stored if owner not in self._written}
        for owner, object in self._written.items():
            if object is not None and belongs(self._state.table_by_name[owner[0]], object):
                members.add(owner)
        return sorted(members)

    # -- the result --------------------------------------------------------------------------------------------

    def proposal(self) -> Proposal:
        """What to ask of the store.

        Raises: ResourceExhausted: more operations than one transaction may have, or an object too large.
        """
        draft = Draft(self._state)
        for owner, object in self._written.items():
            table = self._state.table_by_name[owner[0]]
            base = table.objects.get(owner[1])
            if object is None:
                draft.remove(table, owner, base)
            else:
                draft.write(table, owner, base, object)
                if base is None and isinstance(object, Task):
                    self._rely_on_spec(draft, object)
        for claim, claimant in self._claimed.items():
            draft.claim(claim, claimant)
        if self._level is not None:
            draft.raise_level(self._level)
        if not draft.writes:
            return Proposal()
        for owner, parts in self._relied.items():
            draft.rely_on(self._state.table_by_name[owner[0]], owner[1], parts)
        for used in self._existing:
            draft.expect(used)
        return draft.proposal()

    def _rely_on_spec(self, draft: Draft, task: Task) -> None:
        """A new task needs its spec: it may not be cleared away in the same moment."""
        version = spec_version_of(self, task)
        if version is not None:
            draft.expect(("spec", version.id))


def _is_found(table: Table, object: Object, by: dict[str, str]) -> bool:
    if not by:
        return True
    ((index, value),) = by.items()
    return table.schema.indexes[index](object) == (value.lower() if index == NAME else value)
