"""Keeps one network namespace in its wanted state."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import structlog

from skep.dataplane.netns import nft, nft_table, read
from skep.dataplane.netns.diff import AddLink, DeleteLink, Operation, Put, difference
from skep.dataplane.netns.kernel_made import RULES_4, RULES_6, completed, is_link_local
from skep.dataplane.netns.namespaces import Namespaces
from skep.dataplane.netns.nft_table import Element, NftTable
from skep.dataplane.netns.read import Selection
from skep.dataplane.netns.repair_counts import Repairs, kind_of
from skep.dataplane.netns.state import Link, Route, Rule, State
from skep.dataplane.netns.write import KernelRefused, apply_operations

log = structlog.get_logger()

_DEPARTING_READS_MAX = 25
"""Five seconds at the fastest: the kernel clears namespaces one by one, and those with many rules slowly."""

_PASSES = 2
"""Over the tables of a namespace in one repair."""

Remake = Callable[[str], Awaitable[None]]
"""Makes the link of this name, whose other end is in a namespace of another reconciler."""


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """What of a namespace is compared with the wanted state.

    ``selects``: links that are compared besides the wanted ones; None: no others.  ``is_exclusive``: what is there and
    not wanted is removed.  ``has_own_routes``: all routes by these links are Skep's, and so are the kernel's first
    rules.  ``is_container``: a container's namespace, whose processes may add their own.
    """

    selects: Selection | None = None
    is_exclusive: bool = False
    has_own_routes: bool = True
    is_container: bool = False


def _is_not_loopback(link: Link) -> bool:
    return link.kind != "loopback"


EXCLUSIVE = Scope(selects=_is_not_loopback, is_exclusive=True)
"""A namespace of Skep's own: all of its links are Skep's."""
CONTAINER = Scope(is_container=True)


class NetnsReconciler:
    """A namespace, its wanted state, and the state it is assumed to have.

    The wanted state comes in parts (a network, the gateway, published ports).  ``apply`` brings the namespace from the
    assumed state to the wanted one, without reading it where it is known; ``heal`` reads it.
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
        """``name``: for the log.  ``remake``: for links that cannot be made from here (a container's, whose bridges are
        in other namespaces)."""
        self.name = name
        self.path = path
        self.scope = scope
        self.is_exclusive = scope.is_exclusive
        self._namespaces = namespaces
        self._repairs = repairs
        self._own_rules = _first_rules() if scope.has_own_routes else frozenset[Rule]()
        self._remake = remake
        self._changing = asyncio.Lock()
        self._parts: dict[str, tuple[State, tuple[NftTable, ...]]] = {}
        self._wanted: State | None = None
        self._goal: State | None = None
        self._goal_tables: Mapping[str, NftTable] = {}
        self._assumed: State | None = None
        self._departing: dict[str, int] = {}
        self._is_new = False
        self._tables: dict[str, NftTable] = {}
        """As they were written last."""
        self._listings: dict[str, list[str]] = {}
        self._foreign: set[str] = set()
        """Tables that another writer has changed since."""
        self._stale_tables: set[str] = set()
        """Tables of earlier processes that are to be removed."""
        self._refused: dict[str, frozenset[Element]] = {}
        """Elements that the kernel does not take, by their table; they are left out while they are wanted."""
        self._missing: frozenset[object] = frozenset()
        self.needs_recheck = False
        """Whether the last ``heal`` left something to the next one, which is to come soon."""
        self.indices: frozenset[int] | None = None
        """Of the links that matter, None: not known at present."""

    @property
    def writer(self) -> str:
        """Name of the threads that write here, as nftables reports it."""
        return self._namespaces.writer

    def set_part(self, part: str, state: State, *tables: NftTable) -> None:
        """Set the wanted state of ``part``, instead of the one before."""
        self._parts[part] = (state, tables)
        self._wanted = None

    def remove_part(self, part: str, tables: Collection[str] = ()) -> None:
        """``part`` has no wanted state any more.  ``tables``: removed even if an earlier process made them."""
        self._parts.pop(part, None)
        self._stale_tables.update(tables)
        self._wanted = None

    def has_part(self, part: str) -> bool:
        """Whether ``part`` has a wanted state."""
        return part in self._parts

    @property
    def wanted(self) -> State:
        """What all parts want together."""
        if self._wanted is None:
            together = _together([state for state, _ in self._parts.values()])
            self._wanted = completed(together, self._own_rules)
        return self._wanted

    @property
    def wanted_tables(self) -> Mapping[str, NftTable]:
        """The tables that all parts want, by name.  Parts that share one differ in its elements only."""
        found: dict[str, NftTable] = {}
        for _, tables in self._parts.values():
            for table in tables:
                if table.name in found:
                    elements = table.elements | found[table.name].elements
                    table = msgspec.structs.replace(table, elements=elements)
                found[table.name] = table
        return found

    async def apply(self) -> None:
        """Bring about what is wanted now.

        nftables come first, so that nothing is open for a moment; in a container last, as they mark packets for routes.
        Raises: KernelRefused, NftFailed: something is missing, and the next ``heal`` goes on.
        """
        async with self._changing:
            wanted = self.wanted
            self._goal, self._goal_tables = wanted, self._possible_tables()
            if not self.scope.is_container:
                await self._apply_tables()
            assumed = self._assumed
            if assumed is None or not wanted.sysctls.keys() <= assumed.sysctls.keys():
                assumed = self._without_departing(await self._read(wanted))
            self._assumed = None
            wanted = self._goal  # without the links that departed meanwhile
            await self._carry_out(difference(wanted, assumed, is_exclusive=self.is_exclusive))
            if self.scope.is_container:
                await self._apply_tables()
            self._assumed = self._goal  # without the links that departed meanwhile

    async def heal(self, *, is_thorough: bool = True) -> int:
        """Compare with the kernel and repair what differs from the state that was applied last.

        Gives the number of repairs; what a failed ``apply`` left undone is none.  ``is_thorough``: nftables are listed
        and compared, too; else only those that another writer has changed are written.  Raises: KernelRefused,
        NftFailed, OSError.
        """
        async with self._changing:
            wanted, was_applied = self._goal, self._assumed is not None
            if wanted is None:
                return 0
            repaired = await self._heal_tables(is_thorough=is_thorough)
            found = await self._read(wanted)
            wanted = self._goal or wanted  # without the links that departed meanwhile
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
        """Make the link ``name`` anew, whatever has its name now.  Raises: KernelRefused; OSError."""
        async with self._changing:
            self._assumed = None
            await apply_operations(self._namespaces, self.path, [DeleteLink(name)])
            found = self._without_departing(await self._read(self._goal or State()))
            await self._carry_out(difference(self._goal or State(), found, is_exclusive=self.is_exclusive))
            self._assumed = self._goal

    async def remove(self, name: str) -> None:
        """Remove the link ``name``; if it is wanted, the next ``apply`` makes it again.  Raises: KernelRefused."""
        async with self._changing:
            self._assumed = None
            await self._carry_out([DeleteLink(name)])

    def adopt(self) -> None:
        """An earlier process applied the wanted state; ``heal`` compares."""
        self._goal, self._goal_tables = self.wanted, self._possible_tables()

    def assume(self, state: State) -> None:
        """The namespace was just made and holds ``state``, without tables: there is no need to read it."""
        self._assumed = state
        self._is_new = True

    def expect_removal(self, link: str) -> None:
        """The link disappears with its peer's namespace; do not delete it.

        It is taken from the wanted state too, or a change of another part would miss it before its own part's next one.
        """
        if self._goal is not None and link in self._goal.links:
            self._departing[link] = 0
        seen: dict[int, State] = {}  # mostly one state, by three names, and a large network's takes a while

        def left(state: State) -> State:
            if id(state) not in seen:
                seen[id(state)] = without(state, link) if link in state.links else state
            return seen[id(state)]

        self._parts = {part: (left(state), tables) for part, (state, tables) in self._parts.items()}
        self._wanted = left(self._wanted) if self._wanted is not None else None
        self._goal = left(self._goal) if self._goal is not None else None
        self._assumed = left(self._assumed) if self._assumed is not None else None

    def invalidate(self) -> None:
        """Read before the next change: the namespace may hold more than this process has put there."""
        self._assumed = None

    def reset(self) -> None:
        """The namespace is a new one: nothing of it is known."""
        self._assumed = None
        self.indices = None
        self._tables.clear()
        self._listings.clear()

    def note_foreign(self, tables: Collection[str]) -> bool:
        """Another writer has changed ``tables``; whether any of them is kept here."""
        ours = self._goal_tables.keys() & set(tables)
        self._foreign |= ours
        return bool(ours)

    async def _read(self, wanted: State) -> State:
        found = await self._namespaces.run(self.path, read.read_namespace, self._selects, wanted)
        self.indices = frozenset(found.indices[name] for name in found.state.links)
        state = found.state
        if not self.scope.has_own_routes:
            state = msgspec.structs.replace(state, routes=state.routes & wanted.routes)
        if (
            not self.scope.has_own_routes or self.scope.is_container
        ):  # where others may have IPv6 on links of ours
            held = frozenset(
                one for one in state.addresses if one in wanted.addresses or not is_link_local(one)
            )
            state = msgspec.structs.replace(state, addresses=held)
        return state

    def _confirmed(self, operations: Sequence[Operation]) -> list[Operation]:
        """``operations`` without IPv6 routes of the kernel's that were not missing before.

        It makes them a moment after their address (addrconf_dad_work): what is missing twice was taken away.
        """
        missing = {one: one.item for one in operations if isinstance(one, Put) and _is_made_late(one.item)}
        unconfirmed = set(missing.values()) - self._missing
        self._missing = frozenset(missing.values())
        self.needs_recheck = bool(unconfirmed)
        return [one for one in operations if one not in missing or missing[one] not in unconfirmed]

    def _without_departing(self, found: State) -> State:
        """``found`` without links that disappear by themselves; one that is still there after many reads stays in."""
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
            # Now they are there, and bare.
            goal = self._goal or State()
            operations = difference(goal, await self._read(goal), is_exclusive=self.is_exclusive)
            if any(isinstance(one, AddLink) and one.link.parent is None for one in operations):
                raise KernelRefused(f"an interface of {self.name} cannot be made again")
        await apply_operations(self._namespaces, self.path, operations)

    # --- nftables ---------------------------------------------------------------------------------------------

    async def _apply_tables(self) -> None:
        """All changes in one transaction; where that is refused, each table in its own."""
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
        except nft.NftFailed:  # another writer was there, or an element is refused
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
        for _ in range(
            _PASSES
        ):  # what is reported meanwhile belongs to the same change: a flush takes all at once
            lacking = [
                table
                for name, table in self._goal_tables.items()
                if name in self._foreign or name not in self._tables
            ]
            await self._write_tables(lacking)
            repaired += ["rules"] * len(lacking)
        return repaired

    async def _is_as_written(self, table: NftTable) -> bool:
        """Whether the kernel lists what it listed when the table was written.

        nft spells rules its own way, so that only listings are compared; the first one after a write is taken if it has
        as many rules and elements as were written.
        """
        try:
            text = await self._namespaces.run(self.path, nft.run, f"list table {table.name}")
        except nft.NftFailed:  # there is none
            return False
        listing = nft.in_any_order(text)
        if table.name not in self._listings and nft_table.fits(text, table):
            self._listings[table.name] = listing
        return self._listings.get(table.name) == listing

    def _possible_tables(self) -> dict[str, NftTable]:
        """What is wanted without what was refused; that is tried again once it was not wanted for a while."""
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
        """Every table is tried.  Raises: NftFailed: that of the first one which is refused."""
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
        """The whole table, without the elements that the kernel refuses.  Raises: NftFailed."""
        self._tables.pop(table.name, None)
        try:
            await self._run(nft_table.whole(table))
        except nft.NftFailed as error:
            table = await self._without_refused(table, error)
            await self._run(nft_table.whole(table))
        self._note_written(table)

    async def _without_refused(self, table: NftTable, error: nft.NftFailed) -> NftTable:
        """``table`` without the elements for which the kernel refuses it.  Raises: ``error``: it is not for them."""
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
        """By halves: they are few."""
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


def _first_rules() -> frozenset[Rule]:
    """The rules that a new namespace has, of the IP versions that this kernel has."""
    return RULES_4 | RULES_6 if Path("/proc/sys/net/ipv6").exists() else RULES_4


def _together(states: Sequence[State]) -> State:
    if len(states) == 1:
        return states[0]
    links: dict[str, Link] = {}
    sysctls: dict[str, str] = {}
    for state in states:
        links |= state.links
        sysctls |= state.sysctls
    return State(
        links=links,
        addresses=frozenset().union(*(state.addresses for state in states)),
        routes=frozenset().union(*(state.routes for state in states)),
        entries=frozenset().union(*(state.entries for state in states)),
        rules=frozenset().union(*(state.rules for state in states)),
        sysctls=sysctls,
    )


def _is_made_late(item: object) -> bool:
    return isinstance(item, Route) and item.is_kernels and ":" in item.destination


def without(state: State, link: str) -> State:
    """``state`` as it is when ``link`` has gone."""
    return msgspec.structs.replace(
        state,
        links={name: one for name, one in state.links.items() if name != link},
        addresses=frozenset(one for one in state.addresses if one.link != link),
        routes=frozenset(one for one in state.routes if one.link != link),
        entries=frozenset(one for one in state.entries if one.link != link),
    )
