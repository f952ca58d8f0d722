"""Keeps one network namespace in its desired state."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path

from skep.dataplane.netns.desired_state import DesiredState
from skep.dataplane.netns.diff import AddLink, DeleteLink, Operation, difference
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.nft_table import NftTable
from skep.dataplane.netns.observation import NamespaceObserver, Scope
from skep.dataplane.netns.repair_counts import Repairs, kind_of
from skep.dataplane.netns.state import Link, NamespaceState
from skep.dataplane.netns.table_writer import TableWriter
from skep.dataplane.netns.write import KernelRefused, apply_operations

Remake = Callable[[str], Awaitable[None]]
"""Recreates the link of this name together with its other end, which is in the namespace of another reconciler."""


class NetnsReconciler:
    """Keeps a namespace in its desired state, and remembers which state it is assumed to have.

    The desired state consists of parts (a network, the gateway, published ports).  ``apply`` changes the namespace from
    the assumed to the desired state, and reads it only if its state is unknown.  ``heal`` always reads it.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        namespaces: Namespaces,
        repairs: Repairs,
        scope: Scope,
        remake: Remake | None = None,
    ) -> None:
        """``name`` is for the log.

        ``remake`` recreates links that this reconciler cannot create, because their bridge is in another namespace.
        """
        self.name = name
        self.path = path
        self.scope = scope
        self.is_exclusive = scope.is_exclusive
        self._namespaces = namespaces
        self._repairs = repairs
        self._remake = remake
        self._changing = asyncio.Lock()
        self._states = DesiredState(has_own_routes=scope.has_own_routes)
        self._tables = TableWriter(name, path, namespaces)
        self._observer = NamespaceObserver(path, namespaces, scope)

    @property
    def needs_recheck(self) -> bool:
        """Whether the last ``heal`` left something to do, so that another one must follow soon."""
        return self._observer.needs_recheck

    @property
    def indices(self) -> frozenset[int] | None:
        """Indices of the links that are compared, or None if unknown at present."""
        return self._observer.indices

    @property
    def writer(self) -> str:
        """Name of the threads that write here, as nftables reports it."""
        return self._namespaces.writer

    def set_part(self, part: str, state: NamespaceState, *tables: NftTable) -> None:
        """Set the desired state of ``part``, replacing an earlier one."""
        self._states.set_part(part, state, tables)

    def remove_part(self, part: str, tables: Collection[str] = ()) -> None:
        """Remove the desired state of ``part``.

        ``tables`` are removed from the namespace even if an earlier process wrote them.
        """
        self._states.remove_part(part)
        self._tables.remove(tables)

    def has_part(self, part: str) -> bool:
        """Return whether ``part`` has a desired state."""
        return self._states.has_part(part)

    @property
    def wanted(self) -> NamespaceState:
        """The desired state of all parts together."""
        return self._states.wanted

    @property
    def wanted_tables(self) -> Mapping[str, NftTable]:
        """The desired tables of all parts, by name."""
        return self._states.wanted_tables

    async def apply(self) -> None:
        """Apply the present desired state.

        Tables are written before links, so that nothing is unfiltered for a moment.  In a container they are written
        last, because they mark packets for routes.
        Raises: KernelRefused, NftFailed: part of the state could not be applied.  The next ``heal`` retries it.
        """
        async with self._changing:
            wanted = self.wanted
            self._aim()
            if not self.scope.is_container:
                await self._tables.apply()
            assumed = self._states.assumed
            if assumed is None or not wanted.sysctls.keys() <= assumed.sysctls.keys():
                assumed = self._observer.without_departing(await self._read_state(wanted))
            self._states.assumed = None
            wanted = self._states.goal or wanted  # without the links that have disappeared meanwhile
            await self._carry_out(difference(wanted, assumed, is_exclusive=self.is_exclusive))
            if self.scope.is_container:
                await self._tables.apply()
            self._states.assumed = self._states.goal  # without the links that have disappeared meanwhile

    async def heal(self, *, is_thorough: bool = True) -> int:
        """Compare the namespace with the state that was applied last, and repair deviations.

        Returns the number of repairs, in which completing a failed ``apply`` does not count.  With ``is_thorough``,
        nftables are listed and compared.  Otherwise only tables that another writer has changed are written.
        Raises: KernelRefused, NftFailed, OSError.
        """
        async with self._changing:
            wanted, was_applied = self._states.goal, self._states.assumed is not None
            if wanted is None:
                return 0
            repaired = await self._tables.heal(is_thorough=is_thorough)
            found = await self._read_state(wanted)
            wanted = self._states.goal or wanted  # without the links that have disappeared meanwhile
            found = self._observer.without_departing(found)
            operations = self._observer.confirmed(difference(wanted, found, is_exclusive=self.is_exclusive))
            if operations:
                self._states.assumed = None
                await self._carry_out(operations)
                repaired += [kind_of(one) for one in operations]
            self._states.assumed = self._states.goal
        self._repairs.comparisons += 1
        if not was_applied:
            return 0
        if repaired:
            self._repairs.record(self.name, repaired)
        return len(repaired)

    async def remake(self, name: str) -> None:
        """Remove whatever link has the name ``name``, and create the wanted one.  Raises: KernelRefused; OSError."""
        async with self._changing:
            self._states.assumed = None
            await apply_operations(self._namespaces, self.path, [DeleteLink(name)])
            found = self._observer.without_departing(
                await self._read_state(self._states.goal or NamespaceState())
            )
            await self._carry_out(
                difference(self._states.goal or NamespaceState(), found, is_exclusive=self.is_exclusive)
            )
            self._states.assumed = self._states.goal

    async def remove(self, name: str) -> None:
        """Remove the link ``name``.  If it is wanted, the next ``apply`` creates it again.  Raises: KernelRefused."""
        async with self._changing:
            self._states.assumed = None
            await self._carry_out([DeleteLink(name)])

    def adopt(self) -> None:
        """Assume that an earlier process applied the desired state.  The next ``heal`` checks that."""
        self._aim()

    def assume(self, state: NamespaceState) -> None:
        """Assume, without reading it, that the namespace was just created with ``state`` and no tables."""
        self._states.assumed = state
        self._tables.is_new = True

    def expect_removal(self, link: str) -> None:
        """Expect the link to disappear with its peer's namespace, and do not delete it.

        The link is also removed from the desired state.  Otherwise a change of another part would report it as missing
        before its own part is set again.
        """
        if self._states.drop_link(link):
            self._observer.expect_removal(link)

    def invalidate(self) -> None:
        """Make the next change read the namespace first, because it may contain more than this process has put
        there.
        """
        self._states.assumed = None

    def reset(self) -> None:
        """Forget everything known about the namespace, because it was created again."""
        self._states.assumed = None
        self._observer.indices = None
        self._tables.reset()

    def note_foreign(self, tables: Collection[str]) -> bool:
        """Record that another writer has changed ``tables``.  Return whether this reconciler keeps any of them."""
        return self._tables.note_foreign(tables)

    def _aim(self) -> None:
        """Start to apply the present desired state."""
        self._states.goal = self.wanted
        self._tables.aim_for(self.wanted_tables)

    async def _read_state(self, wanted: NamespaceState) -> NamespaceState:
        return await self._observer.read(wanted, self._selects)

    def _selects(self, link: Link) -> bool:
        return self._states.selects(link) or (self.scope.selects is not None and self.scope.selects(link))

    async def _carry_out(self, operations: Sequence[Operation]) -> None:
        added = [one.link for one in operations if isinstance(one, AddLink)]
        missing = [link.name for link in added if link.parent is None]
        if added or any(isinstance(one, DeleteLink) for one in operations):
            self._observer.indices = None
        if missing and self._remake is not None:
            for name in missing:
                await self._remake(name)
            # The links now exist but are not configured.
            goal = self._states.goal or NamespaceState()
            operations = difference(goal, await self._read_state(goal), is_exclusive=self.is_exclusive)
            if any(isinstance(one, AddLink) and one.link.parent is None for one in operations):
                raise KernelRefused(f"cannot recreate an interface of {self.name}")
        await apply_operations(self._namespaces, self.path, operations)
