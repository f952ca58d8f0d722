"""From what a transaction changed to what is asked of the store: the keys to write, and what must still hold."""

from collections.abc import Callable, Iterable
from typing import Any

from skep.errors import ResourceExhausted
from skep.model.service import Service
from skep.model.task import Task
from skep.model.unknown import Unknown
from skep.store import keys
from skep.store.interface import nothing
from skep.store.keys import HEAD
from skep.store.kinds import SpecVersion, spec_version_id
from skep.store.proposal import Compare, Exists, NothingSince, Proposal, Unchanged
from skep.store.state import Owner, State
from skep.store.tables import Table

MAX_OPERATIONS = 1000
"""Compares or writes of one proposal: two compares for each published port, one for each secret used."""

MAX_BYTES = 1_500_000
"""One proposal, as ``Proposal.size_bytes`` counts; what goes around it fits below etcd's 1.5 MiB per request."""


class Draft:
    """Collects the compares and writes of one proposal, each once."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._compares: dict[Compare, None] = {}
        self._puts: dict[str, bytes] = {}
        self._deletes: dict[str, None] = {}

    @property
    def writes(self) -> bool:
        return bool(self._puts or self._deletes)

    def write(self, table: Table, owner: Owner, base: Any, object: Any) -> None:
        """The parts of ``object`` that differ from ``base``, its references and shared claims."""
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
        """What a newer version has written into the spec that this one is a copy of."""
        return self._state.table_by_type[Service].unknown_in(version.service_id, "Spec")

    def _is_spec_stored(self, task: Task) -> bool:
        """Whether the task's spec need not be written: it is found under its version."""
        if task.spec_version is None:
            return False
        id = spec_version_id(task.service_id, task.spec_version)
        return keys.object_key("spec", id) in self._puts or self._state.lookup(SpecVersion, id) is not None

    def remove(self, table: Table, owner: Owner, base: Any) -> None:
        """All keys of an object; nothing if it was created by this very transaction."""
        if base is None:
            return
        kind, id = owner
        for part in table.codecs:
            # A part first written meanwhile would outlive its object, so absent ones are compared too.
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
        """Give ``claim`` to ``claimant``, or free it, if that is a change."""
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

    def rely_on(self, table: Table, id: str, parts: set[str] | None) -> None:
        """The object has not changed (in these parts); if there was none, there is none."""
        kind = table.schema.name
        if id not in table.objects:
            self._compares[Unchanged(keys.object_key(kind, id), 0)] = None
            return
        for part in table.codecs if parts is None else sorted(parts):
            self._compares[Unchanged(keys.object_key(kind, id, part), table.revision(id, part))] = None
        if parts is not None and HEAD not in parts:
            self.expect((kind, id))

    def expect(self, owner: Owner) -> None:
        """The object still exists; one that this transaction creates needs no asking."""
        table = self._state.table_by_name[owner[0]]
        created = table.created.get(owner[1])
        if created is not None:
            self._compares[Exists(keys.object_key(*owner), created)] = None

    def proposal(self) -> Proposal:
        """The whole.  Raises: ResourceExhausted."""
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
        """Write the keys that say ``owner`` is a member of something, delete those that no longer hold."""
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
