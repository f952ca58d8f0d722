"""Connectivity between machines.  Each direction can be cut and restored separately.

A frozen machine (SIGSTOP, or a hypervisor that does not schedule it) does not send or receive, and messages to it wait.
On a machine whose manager process hangs, the etcd member continues.
"""

import asyncio
from collections.abc import Callable, Iterable
from enum import Enum
from itertools import product
from math import inf
from typing import NamedTuple

Machine = str
"""The id of the machine's node."""


class Port(Enum):
    """Ports of managers, which can be cut separately."""

    API = 2377
    """Requests of nodes and of other managers."""
    PEER = 2378
    """Traffic between etcd members."""


class Cut(NamedTuple):
    """Pairs of source and target between which packets are lost.  ``port``: None for all ports."""

    pairs: frozenset[tuple[Machine, Machine]]
    port: Port | None


class Links:
    """The links between all machines.  The functions in ``changed`` are called after each change."""

    def __init__(self) -> None:
        self.changed: list[Callable[[], None]] = []
        self.is_intact = True
        """Whether every machine reaches every other.  Cached, because it is read for every message."""
        self._cuts: list[Cut] = []
        self._frozen: dict[Machine, asyncio.Event] = {}
        self._hung: set[Machine] = set()
        """Frozen machines of which only the manager process is stopped."""

    def reaches(self, source: Machine, target: Machine, port: Port = Port.API) -> bool:
        """Return whether packets of ``source`` arrive at ``target``, in a connection to ``port`` of one of the two."""
        if self.is_intact:
            return True
        if any(
            end in self._frozen and not (end in self._hung and port is Port.PEER) for end in (source, target)
        ):
            return False
        return not any((source, target) in cut.pairs and cut.port in (None, port) for cut in self._cuts)

    def is_joined(self, one: Machine, other: Machine, port: Port = Port.API) -> bool:
        """Return whether each machine reaches the other."""
        return self.reaches(one, other, port) and self.reaches(other, one, port)

    def cut(
        self,
        sources: Iterable[Machine],
        targets: Iterable[Machine],
        *,
        both_ways: bool = True,
        port: Port | None = None,
    ) -> Cut:
        """Drop all packets from ``sources`` to ``targets``.  Return the cut for ``restore``."""
        pairs = [pair for pair in product(list(sources), list(targets)) if pair[0] != pair[1]]
        back = [(target, source) for source, target in pairs] if both_ways else []
        cut = Cut(frozenset([*pairs, *back]), port)
        self._cuts.append(cut)
        self._notify()
        return cut

    def restore(self, cut: Cut | None = None) -> None:
        """Restore one cut, or all cuts if ``cut`` is None.  Frozen machines stay frozen."""
        if cut is None:
            self._cuts.clear()
        else:
            self._cuts.remove(cut)
        self._notify()

    def freeze(self, machine: Machine) -> None:
        """Stop ``machine`` wherever it is in its work."""
        self._frozen.setdefault(machine, asyncio.Event())
        self._notify()

    def hang(self, machine: Machine) -> None:
        """Stop the manager process of ``machine`` until ``thaw``."""
        self._hung.add(machine)
        self.freeze(machine)

    def thaw(self, machine: Machine) -> None:
        """Let ``machine`` continue, as if no time had passed there."""
        self._hung.discard(machine)
        event = self._frozen.pop(machine, None)
        if event is not None:
            event.set()
            self._notify()

    def is_frozen(self, machine: Machine) -> bool:
        return machine in self._frozen

    async def wait_thawed(self, machine: Machine) -> None:
        """Return at once unless ``machine`` is frozen."""
        while (event := self._frozen.get(machine)) is not None:
            await event.wait()

    def _notify(self) -> None:
        self.is_intact = not self._cuts and not self._frozen
        for changed in self.changed:
            changed()


class Isolation:
    """The time since which each machine has had no connection to certain others."""

    def __init__(
        self,
        now: Callable[[], float],
        links: Links,
        of: Callable[[], Iterable[Machine]],
        others: Callable[[], Iterable[Machine]],
    ) -> None:
        """Observe the connections of machines.

        Args:
            of: returns the observed machines, which may change.
            others: returns the machines they may reach, which may also change.
        """
        self._now = now
        self._links = links
        self._of = of
        self._others = others
        self._since: dict[Machine, float] = {}
        links.changed.append(self._update)

    def since(self, machine: Machine) -> float:
        """Return the start of the isolation, or infinity if the machine is connected to one of the others."""
        return self._since.get(machine, inf)

    def _update(self) -> None:
        others = tuple(self._others())
        for machine in self._of():
            if any(self._links.is_joined(machine, other) for other in others):
                self._since[machine] = inf
            else:
                self._since[machine] = min(self._since.get(machine, inf), self._now())


class Uptime:
    """The time since which each process has run without interruption.  A freeze interrupts it."""

    def __init__(self, now: Callable[[], float], links: Links, requested_at: Callable[[], float]) -> None:
        """``requested_at``: when the entry that is being committed was proposed."""
        self._now = now
        self._links = links
        self._requested_at = requested_at
        self._since: dict[Machine, float] = {}
        self._began: dict[Machine, float] = {}
        self._was_frozen: set[Machine] = set()
        links.changed.append(self._update)

    def start(self, machine: Machine) -> None:
        self._since[machine] = self._began[machine] = self._now()

    def began(self, machine: Machine) -> float:
        """Return the last start of the process.  Minus infinity while an entry of the previous process is being
        committed.
        """
        began = self._began[machine]
        return began if self._requested_at() >= began else -inf

    def stop(self, machine: Machine) -> None:
        self._since.pop(machine, None)

    def since(self, machine: Machine) -> float:
        """Return the start of the uninterrupted uptime, or infinity if the process is not running."""
        return inf if self._links.is_frozen(machine) else self._since.get(machine, inf)

    def _update(self) -> None:
        for machine in self._since:
            if self._links.is_frozen(machine):
                self._was_frozen.add(machine)
            elif machine in self._was_frozen:
                self._was_frozen.remove(machine)
                self._since[machine] = self._now()
