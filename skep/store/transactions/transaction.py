"""Runs a transaction function on a state, and turns its reads and writes into a proposal.

The transaction sees its own writes, which are an overlay over the state.  The state is not copied, and only touched
objects are compared with their stored values.
"""

from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import msgspec

from skep.errors import NotFound, ResourceExhausted, SkepError, Unreadable
from skep.model.options.labels import disconnect_labels, disconnect_policy
from skep.model.service import PastDisconnect, Service
from skep.model.task import Task
from skep.model.values.meta import Version
from skep.model.values.times import ZERO_TIME, Timestamp, timestamp
from skep.model.values.unknown import Unknown
from skep.store import keys
from skep.store.codec import values_of
from skep.store.interface import Event, InUse, KindSchema, Object, nothing
from skep.store.keys import HEAD
from skep.store.kinds import SpecVersion, filled, spec_version_id, spec_version_of
from skep.store.state import Owner, State, resolved
from skep.store.tables import META, NAME, ObjectTable
from skep.store.transactions.proposal import (
    MAX_BYTES,
    MAX_OPERATIONS,
    Compare,
    Exists,
    NothingSince,
    Proposal,
    Unchanged,
)

T = TypeVar("T", bound=msgspec.Struct)

_meta_of = values_of(META)

KEPT_MAX = 4
"""Earlier labels kept for a service.  If they change more often while a node is disconnected, the oldest are lost."""


def past_disconnects(
    before: Service, labels: Mapping[str, str], now: Timestamp
) -> tuple[PastDisconnect, ...]:
    """Return the past disconnect labels of a service whose labels change from those in ``before`` to ``labels``."""
    past = before.past_disconnects
    if disconnect_policy(before.spec.labels) == disconnect_policy(labels):
        return past
    return (*past, PastDisconnect(labels=disconnect_labels(before.spec.labels), until=now))[-KEPT_MAX:]


class LocalTransaction:
    """One run of a transaction function on the local replica.  Implements ``interface.Transaction``.

    ``now_ns`` is the timestamp of objects that it creates and changes.
    """

    def __init__(self, state: State, now_ns: int) -> None:
        self._state = state
        self.revision = state.revision
        self._now_ns = now_ns
        self._written: dict[Owner, Any] = {}
        """Objects that this transaction has put, or None if it deleted them, by kind name and id, in the order of the
        first write.
        """
        self._relied: dict[Owner, set[str] | None] = {}
        """Objects whose concurrent change makes the commit fail, with the parts that matter, or None for all parts."""
        self._relied_kinds: set[str] = set()
        """Kinds for which any concurrent change makes the commit fail."""
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
        """Record what the proposal has to compare.  Once a caller has relied on all parts, it compares all."""
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

    def rely_on_all(self, kind: type[msgspec.Struct]) -> None:
        name = self._state.table_by_type[kind].schema.name
        assert name in keys.KINDS_COMPARED, name
        self._relied_kinds.add(name)

    def find(self, kind: type[T], **by: str) -> Sequence[T]:
        """Return objects of the state with the changes of this transaction.  The commit does not depend on them."""
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

    def why_unreadable(self, kind: type[msgspec.Struct], name: str) -> str:
        return self._state.why_unreadable(kind, name)

    def damaged(self, kind: type[msgspec.Struct]) -> Mapping[str, Mapping[str, str]]:
        return self._state.damaged(kind)

    def resolve(self, kind: type[T], word: str, among: Callable[[T], bool] | None = None) -> T:
        found: T = resolved(self, self._state.table_by_type[kind], word, among)
        return found

    def ids_with_prefix(self, kind: type[msgspec.Struct], prefix: str) -> Sequence[str]:
        """Return the ids of ``kind`` that begin with ``prefix``, in order.  They may include deleted ones."""
        table = self._state.table_by_type[kind]
        added = {id for name, id in self._written if name == table.schema.name and id.startswith(prefix)}
        return sorted(added.union(table.with_prefix(prefix)))

    # -- Transaction -------------------------------------------------------------------------------------------

    def put(self, object: T) -> T:
        """Put an object, and set its version and times.  A task gets its spec from its spec version."""
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
        """Delete an object and release its claims.  A service's spec versions are deleted with it."""
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

    # -- helpers -----------------------------------------------------------------------------------------------

    def _current(self, table: ObjectTable, id: str) -> Any:
        return self._written.get((table.schema.name, id), table.objects.get(id))

    def _stamped(self, table: ObjectTable, base: Any, current: Any, object: Any) -> Any:
        """Return ``object`` with version and timestamps as the store sets them.

        The version grows once in a transaction and only if the head changes, so that a status report never makes a
        user's update "out of sequence".
        """
        if current is None:
            now = self._now
            meta = {
                "version": Version(index=max(1, self.revision)),
                "created_at": now if object.created_at == ZERO_TIME else object.created_at,
                "updated_at": now,
            }
        elif base is not None and table.head_values(base) == table.head_values(object):
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
            if base is not None:
                meta["past_disconnects"] = past_disconnects(base, object.spec.labels, self._now)
        else:
            meta["spec_version"] = base.spec_version
        stamped = msgspec.structs.replace(object, service_status=None, **meta)
        return self._without_old_statuses(table, base, stamped)

    @cached_property
    def _now(self) -> Timestamp:
        return timestamp(self._now_ns)

    def _without_old_statuses(self, table: ObjectTable, base: Any, stamped: Any) -> Any:
        """Drop statuses of the previous spec that this transaction did not write, because the merge will drop them
        too.
        """
        if base is None or base.spec_version == stamped.spec_version:
            return stamped
        stale: dict[str, Any] = {}
        for part in table.schema.spec_statuses:
            if table.codecs[part].is_same(base, stamped):
                stale |= table.codecs[part].defaults
        return msgspec.structs.replace(stamped, **stale) if stale else stamped

    def _keep_spec(self, service: Service) -> None:
        assert service.spec_version is not None, "stamped with the spec"
        id = spec_version_id(service.id, service.spec_version)
        self.put(
            SpecVersion(id=id, service_id=service.id, index=service.spec_version.index, spec=service.spec)
        )
        # If the transaction writes the spec twice, tasks that it has put may refer to this version.
        for owner, object in self._written.items():
            if isinstance(object, Task) and object.service_id == service.id:
                self._written[owner] = filled(object, spec_version_of(self, object))

    def _claim(self, table: ObjectTable, owner: Owner, current: Any, new: Any) -> None:
        """Take the claims that only ``new`` has, and release the claims that only ``current`` has.  Raises the error of
        ``taken``.
        """
        schema = table.schema
        wanted = set(schema.claims(new))
        before = set(schema.claims(current)) if current is not None else set()
        shared = set(schema.shared_claims(new))
        for claim in sorted(wanted):
            holder = self._holder(claim)
            if holder is not None and holder != owner and not self._is_stale(claim, holder):
                if claim in before:
                    wanted.discard(
                        claim
                    )  # both objects existed before such claims did, so neither is refused
                    continue
                raise self._taken(schema, claim, new, holder)
            others = [sharer for sharer in self._sharers(claim) if sharer != owner]
            if others:
                raise self._taken(schema, claim, new, others[0])
        for claim in sorted(shared):
            holder = self._holder(claim)
            if holder is not None and holder != owner:
                raise self._taken(schema, claim, new, holder)
        # Sorted, so that every process writes a transaction in the same way.
        for claim in sorted(before.difference(schema.claims(new))):
            self._release(claim, owner)
        for claim in sorted(wanted):
            self._claimed[claim] = owner

    def _release(self, claim: str, owner: Owner) -> None:
        if self._holder(claim) == owner:
            self._claimed[claim] = None

    def _is_stale(self, claim: str, holder: Owner) -> bool:
        """Return whether ``holder`` was deleted or no longer claims it.  A version that does not know such claims
        leaves them behind.
        """
        table = self._state.table_by_name[holder[0]]
        held_by = self._object(holder)
        if held_by is None:
            return holder[1] not in table.unreadable
        return claim not in set(table.schema.claims(held_by)) and holder[1] not in table.damaged

    def _taken(self, schema: KindSchema, claim: str, new: Any, holder: Owner) -> SkepError:
        held_by = self._object(holder)
        if held_by is not None:
            return schema.taken(claim, new, held_by)
        # The error has the same type as if the object were readable, because a client acts on the status.
        unread = self._state.table_by_name[holder[0]].schema.type(id=holder[1])
        kind = type(schema.taken(claim, new, unread))
        return kind(f"{claim} belongs to {holder[0]} {holder[1]}, which cannot be read")

    def _refer(self, table: ObjectTable, current: Any, new: Any) -> None:
        """Check that the objects exist to which ``new`` refers and ``current`` does not.  Raises NotFound."""
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

    def _members(self, stored: Iterable[Owner], belongs: Callable[[ObjectTable, Any], bool]) -> list[Owner]:
        """Return ``stored`` with the changes of this transaction.  A changed object is included if ``belongs`` is
        true.
        """
        members = {owner for owner in stored if owner not in self._written}
        for owner, object in self._written.items():
            if object is not None and belongs(self._state.table_by_name[owner[0]], object):
                members.add(owner)
        return sorted(members)

    # -- the result --------------------------------------------------------------------------------------------

    def adopt_into(self, copy: State) -> tuple[Event, ...]:
        """Apply the writes to ``copy``, a copied state on which the transaction has run, and return the events."""
        if self._level is not None:
            copy.level = self._level
        return copy.adopt(self._written, self._claimed) if self._written else ()

    def proposal(self) -> Proposal:
        """Return the transaction's compares and writes.

        Raises:
            ResourceExhausted: The transaction has too many operations, or an object is too large.
        """
        builder = ProposalBuilder(self._state)
        for owner, object in self._written.items():
            table = self._state.table_by_name[owner[0]]
            base = table.objects.get(owner[1])
            if object is None:
                builder.remove(table, owner, base)
            else:
                builder.write(table, owner, base, object)
                if base is None and isinstance(object, Task):
                    self._rely_on_spec(builder, object)
        for claim, claimant in self._claimed.items():
            builder.claim(claim, claimant)
        if self._level is not None:
            builder.raise_level(self._level)
        if not builder.writes:
            return Proposal()
        for owner, parts in self._relied.items():
            builder.rely_on(self._state.table_by_name[owner[0]], owner[1], parts)
        for kind in sorted(self._relied_kinds):
            builder.rely_on_all(kind)
        for used in self._existing:
            builder.expect(used)
        return builder.proposal()

    def _rely_on_spec(self, builder: "ProposalBuilder", task: Task) -> None:
        """Compare that the spec of a new task is not removed concurrently.

        The current spec is never removed.  To compare that the spec exists would not be enough, because the next
        transaction could remove it if its view does not show the task yet.  So the compare is that the spec is still
        the current one.
        """
        version = spec_version_of(self, task)
        service = self.lookup(Service, task.service_id)
        if service is not None and service.spec_version == task.spec_version:
            builder.rely_on(self._state.table_by_type[Service], service.id, {HEAD})
        elif version is not None:
            builder.expect(("spec", version.id))


def _is_found(table: ObjectTable, object: Object, by: dict[str, str]) -> bool:
    if not by:
        return True
    ((index, value),) = by.items()
    return table.schema.indexes[index](object) == (value.lower() if index == NAME else value)


class ProposalBuilder:
    """Collects the compares and writes of one transaction, each once."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._compares: dict[Compare, None] = {}
        self._puts: dict[str, bytes] = {}
        self._deletes: dict[str, None] = {}

    @property
    def writes(self) -> bool:
        """Whether anything is written or deleted.  A proposal with compares alone is not sent."""
        return bool(self._puts or self._deletes)

    def write(self, table: ObjectTable, owner: Owner, base: Any, object: Any) -> None:
        """Write the parts, references and shared claims of ``object`` that differ from ``base``."""
        kind, id = owner
        head_key = keys.object_key(kind, id)
        is_head_written = False
        for part, codec in table.codecs.items():
            if base is not None and codec.is_same(base, object):
                continue
            if part == "spec" and isinstance(object, Task) and self._is_spec_stored(object):
                continue
            value = table.encoded(part, id, object)
            if base is None and isinstance(object, SpecVersion):
                value = codec.with_unknown(value, self._unknown_in_spec(object))
            key = keys.part_key(head_key, part)
            known = table.revision(id, part)
            if value is None and not known:
                continue
            if value is not None and part in table.schema.irreplaceable and table.was_never_read(id, part):
                raise Unreadable(f"{part} of {kind} {id} cannot be read, so it is not written either")
            if value is not None and len(value) > table.schema.max_bytes:
                most = table.schema.max_bytes
                raise ResourceExhausted(f"{kind} {id} is too large: {len(value)} of at most {most} bytes")
            is_head_written |= part == HEAD
            if base is not None or part == HEAD:
                self._compares[Unchanged(key, known)] = None
            if value is None:
                self._deletes[key] = None
            else:
                self._puts[key] = value
        if base is not None and not is_head_written:
            self.expect(owner)
        schema = table.schema
        if schema.references is not nothing:
            self._members(owner, schema.references, base, object, keys.reference_key)
        if schema.shared_claims is nothing:
            return
        self._members(
            owner, schema.shared_claims, base, object, lambda claim, user: keys.shared_key(claim, *user)
        )
        before = set(schema.shared_claims(base)) if base is not None else set()
        for claim in sorted(set(schema.shared_claims(object)) - before):
            self._expect_unclaimed(claim, owner)

    def _unknown_in_spec(self, version: SpecVersion) -> Unknown:
        """Return the unknown fields of the service's spec, of which ``version`` is a copy."""
        return self._state.table_by_type[Service].unknown_in(version.service_id, "Spec")

    def _is_spec_stored(self, task: Task) -> bool:
        """Return whether the task's spec is stored as a ``SpecVersion``, so that it is not written with the task."""
        if task.spec_version is None:
            return False
        id = spec_version_id(task.service_id, task.spec_version)
        return keys.object_key("spec", id) in self._puts or self._state.lookup(SpecVersion, id) is not None

    def remove(self, table: ObjectTable, owner: Owner, base: Any) -> None:
        """Delete all keys of an object.  If this transaction created it, there is nothing to delete."""
        if base is None:
            return
        kind, id = owner
        for part in table.codecs:
            # Absent parts are compared as well, because a part that is first written concurrently would outlive its
            # object.
            known = table.revision(id, part)
            self._compares[Unchanged(keys.object_key(kind, id, part), known)] = None
            if known:
                self._deletes[keys.object_key(kind, id, part)] = None
        if table.schema.is_referable:
            self._compares[NothingSince(keys.reference_prefix(kind, id), self._state.revision)] = None
        self._members(owner, table.schema.references, base, None, keys.reference_key)
        self._members(
            owner, table.schema.shared_claims, base, None, lambda claim, user: keys.shared_key(claim, *user)
        )

    def claim(self, claim: str, claimant: Owner | None) -> None:
        """Assign ``claim`` to ``claimant``, or release it if that is None.  Do nothing if that changes nothing."""
        held = self._state.holder(claim)
        if (held.owner if held is not None else None) == claimant and not (held and held.is_damaged):
            return
        self._compares[Unchanged(claim, held.revision if held is not None else 0)] = None
        if claimant is None:
            self._deletes[claim] = None
        else:
            self._puts[claim] = "/".join(claimant).encode()
            if claim.startswith("p/"):
                self._compares[NothingSince(keys.shared_prefix(claim), self._state.revision)] = None

    def raise_level(self, level: int) -> None:
        """Write the level of the stored data."""
        self._compares[Unchanged(keys.LEVEL, self._state.level_revision)] = None
        self._puts[keys.LEVEL] = str(level).encode()

    def rely_on(self, table: ObjectTable, id: str, parts: set[str] | None) -> None:
        """Compare that the object has not changed (in these parts), or that it still does not exist."""
        kind = table.schema.name
        if id not in table.objects:
            self._compares[Unchanged(keys.object_key(kind, id), 0)] = None
            return
        for part in table.codecs if parts is None else sorted(parts):
            self._compares[Unchanged(keys.object_key(kind, id, part), table.revision(id, part))] = None
        if parts is not None and HEAD not in parts:
            self.expect((kind, id))

    def rely_on_all(self, kind: str) -> None:
        """Compare that no object of the kind was written."""
        self._compares[NothingSince(keys.kind_prefix(kind), self._state.revision)] = None

    def expect(self, owner: Owner) -> None:
        """Compare that the object still exists, unless this transaction creates it."""
        table = self._state.table_by_name[owner[0]]
        created = table.created.get(owner[1])
        if created is not None:
            self._compares[Exists(keys.object_key(*owner), created)] = None

    def proposal(self) -> Proposal:
        """Return the collected compares and writes.  Raises ResourceExhausted."""
        proposal = Proposal(
            compares=tuple(self._compares),
            puts=tuple(self._puts.items()),
            deletes=tuple(key for key in self._deletes if key not in self._puts),
        )
        if proposal.operations > MAX_OPERATIONS:
            raise ResourceExhausted(
                f"transaction too large: {proposal.operations} of {MAX_OPERATIONS} operations"
            )
        if proposal.size_bytes > MAX_BYTES:
            raise ResourceExhausted(f"transaction too large: {proposal.size_bytes} of {MAX_BYTES} bytes")
        return proposal

    def _members(
        self,
        owner: Owner,
        of: Callable[[Any], Iterable[Any]],
        base: Any,
        object: Any,
        key_of: Callable[[Any, Owner], str],
    ) -> None:
        """Write the keys of references or shared claims that only ``object`` has, and delete the keys that only
        ``base`` has.
        """
        held, holds = of(base) if base is not None else (), of(object) if object is not None else ()
        if held == holds:
            return
        before, after = set(held), set(holds)
        for member in sorted(after - before):
            self._puts[key_of(member, owner)] = b"1"
        for member in sorted(before - after):
            self._deletes[key_of(member, owner)] = None

    def _expect_unclaimed(self, claim: str, owner: Owner) -> None:
        held = self._state.holder(claim)
        if held is None:
            self._compares[Unchanged(claim, 0)] = None
        elif held.owner == owner:
            self._compares[Unchanged(claim, held.revision)] = None
