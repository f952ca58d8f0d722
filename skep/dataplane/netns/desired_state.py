"""The desired state of one namespace in parts, and the states that were applied and that it is assumed to have."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from skep.dataplane.netns.kernel_made import RULES_4, RULES_6, completed
from skep.dataplane.netns.nft_table import NftTable
from skep.dataplane.netns.state import Link, NamespaceState, RoutingRule


class DesiredState:
    """Parts of a namespace's state, such as a network, the gateway or published ports."""

    def __init__(self, *, has_own_routes: bool) -> None:
        """``has_own_routes``: see ``Scope``."""
        self._parts: dict[str, tuple[NamespaceState, tuple[NftTable, ...]]] = {}
        self._wanted: NamespaceState | None = None
        self._own_rules = _first_rules() if has_own_routes else frozenset[RoutingRule]()
        self.goal: NamespaceState | None = None
        """The desired state when it was applied last."""
        self.assumed: NamespaceState | None = None
        """The state that the namespace is assumed to have, or None if it must be read."""

    def set_part(self, part: str, state: NamespaceState, tables: tuple[NftTable, ...]) -> None:
        """Set the desired state of ``part``, replacing an earlier one."""
        self._parts[part] = (state, tables)
        self._wanted = None

    def remove_part(self, part: str) -> None:
        """Remove the desired state of ``part``."""
        self._parts.pop(part, None)
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

    def selects(self, link: Link) -> bool:
        """Return whether the applied state has a link of this name."""
        return self.goal is not None and link.name in self.goal.links

    def drop_link(self, link: str) -> bool:
        """Remove the link from all states.  Returns whether the applied state had it."""
        had_link = self.goal is not None and link in self.goal.links
        # usually all three are the same object, and the state of a large network takes long to change
        seen: dict[int, NamespaceState] = {}

        def left(state: NamespaceState) -> NamespaceState:
            if id(state) not in seen:
                seen[id(state)] = without(state, link) if link in state.links else state
            return seen[id(state)]

        self._parts = {part: (left(state), tables) for part, (state, tables) in self._parts.items()}
        self._wanted = left(self._wanted) if self._wanted is not None else None
        self.goal = left(self.goal) if self.goal is not None else None
        self.assumed = left(self.assumed) if self.assumed is not None else None
        return had_link


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


def without(state: NamespaceState, link: str) -> NamespaceState:
    """Return ``state`` as it is after ``link`` was removed."""
    return msgspec.structs.replace(
        state,
        links={name: one for name, one in state.links.items() if name != link},
        addresses=frozenset(one for one in state.addresses if one.link != link),
        routes=frozenset(one for one in state.routes if one.link != link),
        entries=frozenset(one for one in state.entries if one.link != link),
    )
