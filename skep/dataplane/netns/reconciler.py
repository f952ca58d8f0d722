"""One network namespace that is brought to what is wanted in it, and kept there."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import structlog

from skep.dataplane.netns import nft, nft_table, read
from skep.dataplane.netns.diff import AddLink, DeleteLink, Operation, Put, difference
from skep.dataplane.netns.kernel_made import RULES_4, RULES_6, completed, is_link_local
from skep.dataplane.netns.namespaces import Namespaces
from skep.dataplane.netns.nft_table import Element, NftTable
from skep.dataplane.netns.read import Selection
from skep.dataplane.netns.repairs import Repairs, kind_of
from skep.dataplane.netns.state import Link, Route, Rule, State
from skep.dataplane.netns.write import KernelRefused, apply_operations

log = structlog.get_logger()

_LEAVING_LOOKS_MAX = 25
"""Five seconds at the fastest: the kernel clears namespaces one by one, and those with many rules slowly."""

Remaking = Callable[[str], Awaitable[None]]
"""Makes a link, by its name, whose other end is in a namespace that somebody else keeps."""


def own_rules() -> frozenset[Rule]:
    """The rules that a new namespace has, of the IP versions that this kernel has."""
    return RULES_4 | RULES_6 if Path("/proc/sys/net/ipv6").exists() else RULES_4


def every_link(link: Link) -> bool:
    """A namespace of our own: all its links are ours."""
    return link.kind != "loopback"


class NetnsReconciler:
    """A namespace, what is wanted in it, and what it is believed to hold.

    The wish comes in parts (a network, the gateway), each from whoever knows it.  ``settle`` brings the latest wish
    about and trusts that what was done before is still there; ``heal`` looks.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        namespaces: Namespaces,
        repairs: Repairs,
        *,
        is_ours: bool = True,
        selects: Selection | None = None,
        has_own_routes: bool = True,
        remake: Remaking | None = None,
    ) -> None:
        """``name``: for the log.  ``is_ours``: what is not wanted is removed.

        ``selects``: the links that are looked at besides the wanted ones.  ``has_own_routes``: routes by these links
        are nobody else's, and so are the kernel's first rules.
        ``remake``: makes missing links, where they cannot be made from here (a container's, whose
        bridges are elsewhere).
        """
        self.name = name
        self.path = path
        self.is_ours = is_ours
        self.is_container = remake is not None
        self._namespaces = namespaces
        self._repairs = repairs
        self._selection = selects
        self._has_own_routes = has_own_routes
        self._own_rules = own_rules() if has_own_routes else frozenset[Rule]()
        self._remake = remake
        self._changing = asyncio.Lock()
        self._parts: dict[str, tuple[State, tuple[NftTable, ...]]] = {}
        self._wanted: State | None = None
        self._goal: State | None = None
        self._goal_tables: Mapping[str, NftTable] = {}
        self._assumed: State | None = None
        self._leaving: dict[str, int] = {}
        self._tables: dict[str, NftTable] = {}
        self._listings: dict[str, str] = {}
        self._refused: dict[str, frozenset[Element]] = {}
        """Elements that the kernel does not take, by their table; they are left out while they are wanted."""
        self._missed: frozenset[object] = frozenset()
        self.is_unsure = False
        """Whether the last ``heal`` left something for the next, which is to come soon."""
        self.indices: frozenset[int] | None = None
        """Of the links that matter, None: not known at present."""

    def set_part(self, part: str, state: State, *rules: NftTable) -> None:
        """What ``part`` wants from now on, instead of what it wanted before."""
        self._parts[part] = (state, rules)
        self._wanted = None

    def remove_part(self, part: str) -> None:
        """``part`` wants nothing any more."""
        self._parts.pop(part, None)
        self._wanted = None

    def has_part(self, part: str) -> bool:
        """Whether ``part`` wants anything."""
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
        for _, rules in self._parts.values():
            for table in rules:
                elements = table.elements | (
                    found[table.name].elements if table.name in found else frozenset()
                )
                found[table.name] = msgspec.structs.replace(table, elements=elements)
        return found

    async def apply(self) -> None:
        """Bring about what is wanted now.

        Rules come first: nothing is open for a moment.  Raises: KernelRefused, NftFailed: it is not all there, and the
        next ``heal`` goes on.
        """
        async with self._changing:
            wanted, believed = self.wanted, self._assumed
            self._goal, self._goal_tables = wanted, self._possible_tables()
            await self._apply_tables()
            if believed is None or not wanted.sysctls.keys() <= believed.sysctls.keys():
                believed = await self._read(wanted)
            self._assumed = None
            await self._do(difference(wanted, believed, is_ours=self.is_ours))
            self._assumed = self._goal  # without what was let go meanwhile

    async def heal(self) -> int:
        """Compare with the kernel and put right what differs from the last wish that was settled.

        Gives the number of repairs; what a refused ``settle`` left to be done is none.  Raises: KernelRefused,
        NftFailed, OSError.
        """
        async with self._changing:
            wanted, was_there = self._goal, self._assumed is not None
            if wanted is None:
                return 0
            repaired = await self._heal_tables()
            found = await self._read(wanted)
            wanted = self._goal or wanted  # what was let go meanwhile is not missed
            found = self._without_leaving(found)
            operations = self._without_unsure(difference(wanted, found, is_ours=self.is_ours))
            if operations:
                self._assumed = None
                await self._do(operations)
                repaired += [kind_of(one) for one in operations]
            self._assumed = self._goal
        self._repairs.comparisons += 1
        if not was_there:
            return 0
        if repaired:
            self._repairs.count(repaired)
            log.warning("network repaired", where=self.name, **_as_keys(repaired))
        return len(repaired)

    async def remake(self, name: str) -> None:
        """Make the link ``name`` anew, whatever has its name now.  Raises: KernelRefused; OSError."""
        async with self._changing:
            self._assumed = None
            goal = self._goal or State()
            await apply_operations(self._namespaces, self.path, [DeleteLink(name)])
            await self._do(difference(goal, await self._read(goal), is_ours=self.is_ours))
            self._assumed = goal

    async def remove(self, name: str) -> None:
        """Remove the link ``name``; who wants it again, wants it with the next ``settle``.  Raises: KernelRefused."""
        async with self._changing:
            self._assumed = None
            await self._do([DeleteLink(name)])

    def adopt(self) -> None:
        """An earlier process brought the wish about; whether it is still so is for ``heal`` to see."""
        self._goal, self._goal_tables = self.wanted, self._possible_tables()

    def assume(self, state: State) -> None:
        """It holds ``state``, as it was just made: there is no need to look."""
        self._assumed = state

    def expect_removal(self, link: str) -> None:
        """``link`` goes by itself, with the namespace that has its other end; nobody has to delete it.

        It is taken from the wish too, or a change of another part would have it missed before its own part's next one.
        """
        if self._goal is not None and link in self._goal.links:
            self._leaving[link] = 0
        seen: dict[int, State] = {}  # mostly one state, by three names, and a large network's takes a while

        def left(state: State) -> State:
            if id(state) not in seen:
                seen[id(state)] = without(state, link) if link in state.links else state
            return seen[id(state)]

        self._parts = {part: (left(state), rules) for part, (state, rules) in self._parts.items()}
        self._wanted = left(self._wanted) if self._wanted is not None else None
        self._goal = left(self._goal) if self._goal is not None else None
        self._assumed = left(self._assumed) if self._assumed is not None else None

    def invalidate(self) -> None:
        """Look before the next change: what others left may be there."""
        self._assumed = None

    def reset(self) -> None:
        """The namespace is a new one: nothing of it is known."""
        self._assumed = None
        self.indices = None
        self._tables.clear()
        self._listings.clear()

    async def _read(self, wanted: State) -> State:
        found = await self._namespaces.run(self.path, read.read, self._selects, wanted)
        self.indices = frozenset(found.indices[name] for name in found.state.links)
        state = found.state
        if not self._has_own_routes:
            state = msgspec.structs.replace(state, routes=state.routes & wanted.routes)
        if not self._has_own_routes or self.is_container:  # where others may have IPv6 on links of ours
            held = frozenset(
                one for one in state.addresses if one in wanted.addresses or not is_link_local(one)
            )
            state = msgspec.structs.replace(state, addresses=held)
        return state

    def _without_unsure(self, operations: Sequence[Operation]) -> list[Operation]:
        """``operations`` without IPv6 routes of the kernel's that were not missed before.

        It makes them a moment after their address (addrconf_dad_work): what is missing twice was taken away.
        """
        missed = {one: one.item for one in operations if isinstance(one, Put) and _is_made_late(one.item)}
        unsure = set(missed.values()) - self._missed
        self._missed = frozenset(missed.values())
        self.is_unsure = bool(unsure)
        return [one for one in operations if one not in missed or missed[one] not in unsure]

    def _without_leaving(self, found: State) -> State:
        """``found`` without what goes by itself; what is still there after several looks is somebody's mistake."""
        for link in tuple(self._leaving):
            if link not in found.links or self._leaving[link] >= _LEAVING_LOOKS_MAX:
                del self._leaving[link]
            else:
                self._leaving[link] += 1
                found = without(found, link)
        return found

    def _selects(self, link: Link) -> bool:
        is_wanted = self._goal is not None and link.name in self._goal.links
        return is_wanted or (self._selection is not None and self._selection(link))

    async def _do(self, operations: Sequence[Operation]) -> None:
        missing = [one.link.name for one in operations if isinstance(one, AddLink)]
        if missing or any(isinstance(one, DeleteLink) for one in operations):
            self.indices = None
        if missing and self._remake is not None:
            for name in missing:
                await self._remake(name)
            # Now they are there, and bare.
            goal = self._goal or State()
            operations = difference(goal, await self._read(goal), is_ours=self.is_ours)
            if any(isinstance(one, AddLink) for one in operations):
                raise KernelRefused(f"an interface of {self.name} cannot be made again")
        await apply_operations(self._namespaces, self.path, operations)

    # --- rules ------------------------------------------------------------------------------------------------

    async def _apply_tables(self) -> None:
        for name in sorted(self._tables.keys() - self._goal_tables.keys()):
            await self._run(f"add table {name}\ndelete table {name}\n")
            del self._tables[name]
            self._listings.pop(name, None)
        for name, table in self._goal_tables.items():
            old = self._tables.get(name)
            if old == table:
                continue
            text = nft_table.changes(old, table) if old is not None else nft_table.whole(table)
            await self._apply_table(table, text)

    async def _heal_tables(self) -> list[str]:
        repaired = []
        for name, table in self._goal_tables.items():
            listing = await self._listing(name)
            if self._tables.get(name) == table and listing == self._listings.get(name):
                continue
            is_changed_by_us = self._tables.get(name) == table and name not in self._listings
            if is_changed_by_us and nft_table.fits(listing, table):
                self._listings[name] = listing
                continue
            await self._apply_table(table, nft_table.whole(table))
            repaired.append("rules")
        return repaired

    def _possible_tables(self) -> dict[str, NftTable]:
        """What is wanted without what was refused; that is tried again once it was not wanted for a while."""
        rules = dict(self.wanted_tables)
        self._refused = {
            name: still
            for name, refused in self._refused.items()
            if name in rules and (still := refused & rules[name].elements)
        }
        for name, refused in self._refused.items():
            rules[name] = msgspec.structs.replace(rules[name], elements=rules[name].elements - refused)
        return rules

    async def _apply_table(self, table: NftTable, text: str) -> None:
        self._tables.pop(table.name, None)
        try:
            await self._run(text)
        except nft.NftFailed:  # somebody else changed our table
            try:
                await self._run(nft_table.whole(table))
            except nft.NftFailed as error:
                table = await self._without_refused(table, error)
                await self._run(nft_table.whole(table))
        self._listings.pop(table.name, None)
        self._tables[table.name] = table

    async def _without_refused(self, table: NftTable, error: nft.NftFailed) -> NftTable:
        """``table`` without the elements for which the kernel refuses it.  Raises: ``error``: it is not for them."""
        refused = frozenset([one async for one in self._refused_among(table, sorted(table.elements))])
        if not refused:
            raise error
        named = [" ".join(element) for element in sorted(refused)]
        log.error(
            "rules without elements that are refused", where=self.name, table=table.name, elements=named
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

    async def _listing(self, name: str) -> str:
        """The table as the kernel shows it; empty when it is not there."""
        try:
            return await self._namespaces.run(self.path, nft.run, f"list table {name}")
        except nft.NftFailed:
            return ""

    async def _run(self, text: str) -> None:
        await self._namespaces.run(self.path, nft.run, text)


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


def _as_keys(kinds: Sequence[str]) -> dict[str, int]:
    return {kind.replace(" ", "_"): number for kind, number in Counter(kinds).items()}
