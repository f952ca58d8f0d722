"""Keeps one network namespace in its desired state."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import structlog

from skep.dataplane.netns import nft_table, read
from skep.dataplane.netns.diff import AddLink, DeleteLink, Operation, Put, difference
from skep.dataplane.netns.kernel import nft
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.kernel_made import RULES_4, RULES_6, completed, is_link_local
from skep.dataplane.netns.nft_table import Element, NftTable
from skep.dataplane.netns.read import Selection
from skep.dataplane.netns.repair_counts import Repairs, kind_of
from skep.dataplane.netns.state import Link, NamespaceState, Route, RoutingRule
from skep.dataplane.netns.write import KernelRefused, apply_operations

log = structlog.get_logger()

_DEPARTING_READS_MAX = 25
"""Number of reads (at least five seconds) for which a link may still be disappearing.

The kernel frees namespaces one by one, and slowly if they have many rules.
"""

_PASSES = 2
"""Number of passes over the tables of a namespace in one repair."""

Remake = Callable[[str], Awaitable[None]]
"""Recreates the link of this name together with its other end, which is in the namespace of another reconciler."""


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """Determines which items of a namespace are compared with the desired state.

    Args:
        selects: Links that are compared in addition to the wanted ones, or None.
        is_exclusive: Whether unwanted items are removed.
        has_own_routes: Whether all routes on these links, and the rules of a new namespace, belong to the desired
            state.
        is_container: Whether it is a container's namespace, where the container's processes may add items.
    """

    selects: Selection | None = None
    is_exclusive: bool = False
    has_own_routes: bool = True
    is_container: bool = False


def _is_not_loopback(link: Link) -> bool:
    return link.kind != "loopback"


EXCLUSIVE = Scope(selects=_is_not_loopback, is_exclusive=True)
"""A namespace that Skep owns, with all of its links."""
CONTAINER = Scope(is_container=True)


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
        self._own_rules = _first_rules() if scope.has_own_routes else frozenset[RoutingRule]()
        self._remake = remake
        self._changing = asyncio.Lock()
        self._parts: dict[str, tuple[NamespaceState, tuple[NftTable, ...]]] = {}
        self._wanted: NamespaceState | None = None
        self._goal: NamespaceState | None = None
        self._goal_tables: Mapping[str, NftTable] = {}
        self._assumed: NamespaceState | None = None
        self._departing: dict[str, int] = {}
        self._is_new = False
        self._tables: dict[str, NftTable] = {}
        """The tables as they were written last."""
        self._listings: dict[str, list[str]] = {}
        self._foreign: set[str] = set()
        """Tables that another writer has changed since they were written."""
        self._stale_tables: set[str] = set()
        """Tables of earlier processes that will be removed."""
        self._refused: dict[str, frozenset[Element]] = {}
        """Elements that the kernel has refused, by table.  They are left out as long as they are wanted."""
        self._missing: frozenset[object] = frozenset()
        self.needs_recheck = False
        """Whether the last ``heal`` left something to do, so that another one must follow soon."""
        self.indices: frozenset[int] | None = None
        """Indices of the links that are compared, or None if unknown at present."""

    @property
    def writer(self) -> str:
        """Name of the threads that write here, as nftables reports it."""
        return self._namespaces.writer

    def set_part(self, part: str, state: NamespaceState, *tables: NftTable) -> None:
        """Set the desired state of ``part``, replacing an earlier one."""
        self._parts[part] = (state, tables)
        self._wanted = None

    def remove_part(self, part: str, tables: Collection[str] = ()) -> None:
        """Remove the desired state of ``part``.

        ``tables`` are removed from the namespace even if an earlier process wrote them.
        """
        self._parts.pop(part, None)
        self._stale_tables.update(tables)
        self._wanted = None

    def has_part(self, part: str) -> bool:
        """Return whether ``part`` has a desired state."""
        return part in self._parts

    @property
    def wanted(self) -> NamespaceState:
        """The desired state of all parts together."""
        if self._wanted is None:
            together = _together([state for state, _ in self._parts.values()])
            self._wanted = completed(together, self._own_rules)
        return self._wanted

    @property
    def wanted_tables(self) -> Mapping[str, NftTable]:
        """The desired tables of all parts, by name.  Parts that share a table differ in its elements only."""
        found: dict[str, NftTable] = {}
        for _, tables in self._parts.values():
            for table in tables:
                if table.name in found:
                    elements = table.elements | found[table.name].elements
                    table = msgspec.structs.replace(table, elements=elements)
                found[table.name] = table
        return found

    async def apply(self) -> None:
        """Apply the present desired state.

        Tables are written before links, so that nothing is unfiltered for a moment.  In a container they are written
        last, because they mark packets for routes.
        Raises: KernelRefused, NftFailed: part of the state could not be applied.  The next ``heal`` retries it.
        """
        async with self._changing:
            wanted = self.wanted
            self._goal, self._goal_tables = wanted, self._possible_tables()
            if not self.scope.is_container:
                await self._apply_tables()
            assumed = self._assumed
            if assumed is None or not wanted.sysctls.keys() <= assumed.sysctls.keys():
                assumed = self._without_departing(await self._read_state(wanted))
            self._assumed = None
            wanted = self._goal  # without the links that have disappeared meanwhile
            await self._carry_out(difference(wanted, assumed, is_exclusive=self.is_exclusive))
            if self.scope.is_container:
                await self._apply_tables()
            self._assumed = self._goal  # without the links that have disappeared meanwhile

    async def heal(self, *, is_thorough: bool = True) -> int:
        """Compare the namespace with the state that was applied last, and repair deviations.

        Returns the number of repairs, in which completing a failed ``apply`` does not count.  With ``is_thorough``,
        nftables are listed and compared.  Otherwise only tables that another writer has changed are written.
        Raises: KernelRefused, NftFailed, OSError.
        """
        async with self._changing:
            wanted, was_applied = self._goal, self._assumed is not None
            if wanted is None:
                return 0
            repaired = await self._heal_tables(is_thorough=is_thorough)
            found = await self._read_state(wanted)
            wanted = self._goal or wanted  # without the links that have disappeared meanwhile
            found = self._without_departing(found)
            operations = self._confirmed(difference(wanted, found, is_exclusive=self.is_exclusive))
            if operations:
                self._assumed = None
                await self._carry_out(operations)
                repaired += [kind_of(one) for one in operations]
            self._assumed = self._goal
        self._repairs.comparisons += 1
        if not was_applied:
            return 0
        if repaired:
            self._repairs.record(self.name, repaired)
        return len(repaired)

    async def remake(self, name: str) -> None:
        """Remove whatever link has the name ``name``, and create the wanted one.  Raises: KernelRefused; OSError."""
        async with self._changing:
            self._assumed = None
            await apply_operations(self._namespaces, self.path, [DeleteLink(name)])
            found = self._without_departing(await self._read_state(self._goal or NamespaceState()))
            await self._carry_out(
                difference(self._goal or NamespaceState(), found, is_exclusive=self.is_exclusive)
            )
            self._assumed = self._goal

    async def remove(self, name: str) -> None:
        """Remove the link ``name``.  If it is wanted, the next ``apply`` creates it again.  Raises: KernelRefused."""
        async with self._changing:
            self._assumed = None
            await self._carry_out([DeleteLink(name)])

    def adopt(self) -> None:
        """Assume that an earlier process applied the desired state.  The next ``heal`` checks that."""
        self._goal, self._goal_tables = self.wanted, self._possible_tables()

    def assume(self, state: NamespaceState) -> None:
        """Assume, without reading it, that the namespace was just created with ``state`` and no tables."""
        self._assumed = state
        self._is_new = True

    def expect_removal(self, link: str) -> None:
        """Expect the link to disappear with its peer's namespace, and do not delete it.

        The link is also removed from the desired state.  Otherwise a change of another part would report it as missing
        before its own part is set again.
        """
        if self._goal is not None and link in self._goal.links:
            self._departing[link] = 0
        # usually all three are the same object, and the state of a large network takes long to change
        seen: dict[int, NamespaceState] = {}

        def left(state: NamespaceState) -> NamespaceState:
            if id(state) not in seen:
                seen[id(state)] = without(state, link) if link in state.links else state
            return seen[id(state)]

        self._parts = {part: (left(state), tables) for part, (state, tables) in self._parts.items()}
        self._wanted = left(self._wanted) if self._wanted is not None else None
        self._goal = left(self._goal) if self._goal is not None else None
        self._assumed = left(self._assumed) if self._assumed is not None else None

    def invalidate(self) -> None:
        """Make the next change read the namespace first, because it may contain more than this process has put
        there.
        """
        self._assumed = None

    def reset(self) -> None:
        """Forget everything known about the namespace, because it was created again."""
        self._assumed = None
        self.indices = None
        self._tables.clear()
        self._listings.clear()

    def note_foreign(self, tables: Collection[str]) -> bool:
        """Record that another writer has changed ``tables``.  Return whether this reconciler keeps any of them."""
        ours = self._goal_tables.keys() & set(tables)
        self._foreign |= ours
        return bool(ours)

    async def _read_state(self, wanted: NamespaceState) -> NamespaceState:
        found = await self._namespaces.run(self.path, read.read_namespace, self._selects, wanted)
        self.indices = frozenset(found.indices[name] for name in found.state.links)
        state = found.state
        if not self.scope.has_own_routes:
            state = msgspec.structs.replace(state, routes=state.routes & wanted.routes)
        # In these namespaces, others may use IPv6 on our links.
        if not self.scope.has_own_routes or self.scope.is_container:
            held = frozenset(
                one for one in state.addresses if one in wanted.addresses or not is_link_local(one)
            )
            state = msgspec.structs.replace(state, addresses=held)
        return state

    def _confirmed(self, operations: Sequence[Operation]) -> list[Operation]:
        """Return ``operations`` without IPv6 routes of the kernel that are missing for the first time.

        The kernel adds them a moment after their address (addrconf_dad_work).  Only a route that is missing twice was
        removed.
        """
        missing = {one: one.item for one in operations if isinstance(one, Put) and _is_made_late(one.item)}
        unconfirmed = set(missing.values()) - self._missing
        self._missing = frozenset(missing.values())
        self.needs_recheck = bool(unconfirmed)
        return [one for one in operations if one not in missing or missing[one] not in unconfirmed]

    def _without_departing(self, found: NamespaceState) -> NamespaceState:
        """Return ``found`` without links that disappear by themselves.

        A link that still exists after many reads is included again.
        """
        for link in tuple(self._departing):
            if link not in found.links or self._departing[link] >= _DEPARTING_READS_MAX:
                del self._departing[link]
            else:
                self._departing[link] += 1
                found = without(found, link)
        return found

    def _selects(self, link: Link) -> bool:
        is_wanted = self._goal is not None and link.name in self._goal.links
        return is_wanted or (self.scope.selects is not None and self.scope.selects(link))

    async def _carry_out(self, operations: Sequence[Operation]) -> None:
        added = [one.link for one in operations if isinstance(one, AddLink)]
        missing = [link.name for link in added if link.parent is None]
        if added or any(isinstance(one, DeleteLink) for one in operations):
            self.indices = None
        if missing and self._remake is not None:
            for name in missing:
                await self._remake(name)
            # The links now exist but are not configured.
            goal = self._goal or NamespaceState()
            operations = difference(goal, await self._read_state(goal), is_exclusive=self.is_exclusive)
            if any(isinstance(one, AddLink) and one.link.parent is None for one in operations):
                raise KernelRefused(f"cannot recreate an interface of {self.name}")
        await apply_operations(self._namespaces, self.path, operations)

    # --- nftables ---------------------------------------------------------------------------------------------

    async def _apply_tables(self) -> None:
        """Apply all changes of tables in one transaction.

        If it is refused, write each table in a separate transaction.
        """
        gone = sorted((self._tables.keys() | self._stale_tables) - self._goal_tables.keys())
        changed: list[NftTable] = []
        text = "".join(map(nft_table.absent, gone))
        for table in self._goal_tables.values():
            old = self._tables.get(table.name)
            if old is None:
                text += nft_table.fresh(table) if self._is_new else nft_table.whole(table)
            else:
                table = nft_table.with_spare_chains(old, table)
                text += nft_table.changes(old, table)
            if table != old:
                changed.append(table)
        try:
            if text:
                await self._run(text)
        except nft.NftFailed:  # another writer has interfered, or an element is refused
            for name in gone:
                await self._run(nft_table.absent(name))
            await self._write_tables(changed)
        else:
            for table in changed:
                self._note_written(table)
        for name in gone:
            self._tables.pop(name, None)
            self._listings.pop(name, None)
            self._stale_tables.discard(name)

    async def _heal_tables(self, *, is_thorough: bool) -> list[str]:
        repaired = []
        if is_thorough:
            for name, table in tuple(self._tables.items()):
                if name in self._goal_tables and not await self._is_as_written(table):
                    self._foreign.add(name)
        # Reports that arrive meanwhile belong to the same change, because a flush removes all tables at once.
        for _ in range(_PASSES):
            lacking = [
                table
                for name, table in self._goal_tables.items()
                if name in self._foreign or name not in self._tables
            ]
            await self._write_tables(lacking)
            repaired += ["rules"] * len(lacking)
        return repaired

    async def _is_as_written(self, table: NftTable) -> bool:
        """Return whether the kernel lists the table as it did when it was written.

        nft spells rules in its own way, so only listings can be compared.  The first listing after a write is accepted
        if it has as many rules and elements as were written.
        """
        try:
            text = await self._namespaces.run(self.path, nft.run, f"list table {table.name}")
        except nft.NftFailed:  # the table does not exist
            return False
        listing = nft.in_any_order(text)
        if table.name not in self._listings and nft_table.fits(text, table):
            self._listings[table.name] = listing
        return self._listings.get(table.name) == listing

    def _possible_tables(self) -> dict[str, NftTable]:
        """Return the wanted tables without refused elements.

        A refused element is tried again only after it was not wanted for a while.
        """
        tables = dict(self.wanted_tables)
        self._refused = {
            name: still
            for name, refused in self._refused.items()
            if name in tables and (still := refused & tables[name].elements)
        }
        for name, refused in self._refused.items():
            tables[name] = msgspec.structs.replace(tables[name], elements=tables[name].elements - refused)
        return tables

    def _note_written(self, table: NftTable) -> None:
        self._listings.pop(table.name, None)
        self._tables[table.name] = table

    async def _write_tables(self, tables: Iterable[NftTable]) -> None:
        """Write all tables.  Raises: NftFailed: the error of the first refused table, after all were tried."""
        refused: list[nft.NftFailed] = []
        for table in tables:
            try:
                await self._write_table(table)
                self._foreign.discard(table.name)
            except nft.NftFailed as error:
                refused.append(error)
        if refused:
            raise refused[0]

    async def _write_table(self, table: NftTable) -> None:
        """Write the whole table without the elements that the kernel refuses.  Raises: NftFailed."""
        self._tables.pop(table.name, None)
        try:
            await self._run(nft_table.whole(table))
        except nft.NftFailed as error:
            table = await self._without_refused(table, error)
            await self._run(nft_table.whole(table))
        self._note_written(table)

    async def _without_refused(self, table: NftTable, error: nft.NftFailed) -> NftTable:
        """Return ``table`` without the elements that the kernel refuses.  Raises: ``error``: it has another cause."""
        refused = frozenset([one async for one in self._refused_among(table, sorted(table.elements))])
        if not refused:
            raise error
        named = [" ".join(element) for element in sorted(refused)]
        log.error(
            "elements refused by nftables left out", namespace=self.name, table=table.name, elements=named
        )
        self._refused[table.name] = self._refused.get(table.name, frozenset()) | refused
        table = msgspec.structs.replace(table, elements=table.elements - refused)
        self._goal_tables = {**self._goal_tables, table.name: table}
        return table

    async def _refused_among(self, table: NftTable, elements: Sequence[Element]) -> AsyncIterator[Element]:
        """Yield the refused elements, found by bisection, because they are few."""
        try:
            await self._run(nft_table.trial(table, elements))
        except nft.NftFailed:
            if len(elements) < 2:
                for element in elements:
                    yield element
                return
            middle = len(elements) // 2
            for half in (elements[:middle], elements[middle:]):
                async for element in self._refused_among(table, half):
                    yield element

    async def _run(self, text: str) -> None:
        await self._namespaces.run(self.path, nft.run, text)


def _first_rules() -> frozenset[RoutingRule]:
    """Return the rules that a new namespace has, for the IP versions of this kernel."""
    return RULES_4 | RULES_6 if Path("/proc/sys/net/ipv6").exists() else RULES_4


def _together(states: Sequence[NamespaceState]) -> NamespaceState:
    if len(states) == 1:
        return states[0]
    links: dict[str, Link] = {}
    sysctls: dict[str, str] = {}
    for state in states:
        links |= state.links
        sysctls |= state.sysctls
    return NamespaceState(
        links=links,
        addresses=frozenset().union(*(state.addresses for state in states)),
        routes=frozenset().union(*(state.routes for state in states)),
        entries=frozenset().union(*(state.entries for state in states)),
        rules=frozenset().union(*(state.rules for state in states)),
        sysctls=sysctls,
    )


def _is_made_late(item: object) -> bool:
    return isinstance(item, Route) and item.is_kernels and ":" in item.destination


def without(state: NamespaceState, link: str) -> NamespaceState:
    """Return ``state`` as it is after ``link`` was removed."""
    return msgspec.structs.replace(
        state,
        links={name: one for name, one in state.links.items() if name != link},
        addresses=frozenset(one for one in state.addresses if one.link != link),
        routes=frozenset(one for one in state.routes if one.link != link),
        entries=frozenset(one for one in state.entries if one.link != link),
    )
