"""Which machine's packets reach which other machine.  Every direction is cut and mended by itself.

A frozen machine (SIGSTOP, a hypervisor that does not run it) neither sends nor hears; what was sent to it waits.
Of a machine whose manager process alone hangs, the member of the store goes on.
"""

import asyncio
from collections.abc import Callable, Iterable
from enum import Enum
from itertools import product
from math import inf
from typing import NamedTuple

Machine = str
"""The id of the node that lives there."""


class Port(Enum):
    """Where managers are reached: each can be cut by itself."""

    API = 2377
    """By nodes and each other."""
    PEER = 2378
    """By each other's members of the store."""


class Cut(NamedTuple):
    """Ways from one machine to another on which nothing arrives.  ``port`` None: at any."""

    pairs: frozenset[tuple[Machine, Machine]]
    port: Port | None


class Links:
    """All machines, and what lies between them.  ``changed`` are called after each change."""

    def __init__(self) -> None:
        self.changed: list[Callable[[], None]] = []
        self.is_whole = True
        """Whether everybody reaches everybody: asked for every message."""
        self._cuts: list[Cut] = []
        self._frozen: dict[Machine, asyncio.Event] = {}
        self._hung: set[Machine] = set()
        """Those of them whose manager process alone stands still."""

    def reaches(self, source: Machine, target: Machine, port: Port = Port.API) -> bool:
        """Whether what ``source`` sends arrives at ``target``, in a connection to ``port`` at either."""
        if self.is_whole:
            return True
        if any(
            end in self._frozen and not (end in self._hung and port is Port.PEER) for end in (source, target)
        ):
            return False
        return not any((source, target) in cut.pairs and cut.port in (None, port) for cut in self._cuts)

    def is_joined(self, one: Machine, other: Machine, port: Port = Port.API) -> bool:
        """Whether both reach each other."""
        return self.reaches(one, other, port) and self.reaches(other, one, port)

    def cut(
        self,
        sources: Iterable[Machine],
        targets: Iterable[Machine],
        *,
        both_ways: bool = True,
        port: Port | None = None,
    ) -> Cut:
        """Lose everything on the way from ``sources`` to ``targets``; gives what ``mend`` undoes."""
        pairs = [pair for pair in product(list(sources), list(targets)) if pair[0] != pair[1]]
        back = [(target, source) for source, target in pairs] if both_ways else []
        cut = Cut(frozenset([*pairs, *back]), port)
        self._cuts.append(cut)
        self._tell()
        return cut

    def mend(self, cut: Cut | None = None) -> None:
        """Undo one cut (None: all); frozen machines stay frozen."""
        if cut is None:
            self._cuts.clear()
        else:
            self._cuts.remove(cut)
        self._tell()

    def freeze(self, machine: Machine) -> None:
        """Stop ``machine`` in the middle of whatever it does."""
        self._frozen.setdefault(machine, asyncio.Event())
        self._tell()

    def hang(self, machine: Machine) -> None:
        """Stop its manager process; ``thaw`` lets it go on."""
        self._hung.add(machine)
        self.freeze(machine)

    def thaw(self, machine: Machine) -> None:
        """Let ``machine`` go on, as if no time had passed there."""
        self._hung.discard(machine)
        event = self._frozen.pop(machine, None)
        if event is not None:
            event.set()
            self._tell()

    def is_frozen(self, machine: Machine) -> bool:
        return machine in self._frozen

    async def wait_thawed(self, machine: Machine) -> None:
        """Return at once unless ``machine`` is frozen."""
        while (event := self._frozen.get(machine)) is not None:
            await event.wait()

    def _tell(self) -> None:
        self.is_whole = not self._cuts and not self._frozen
        for changed in self.changed:
            changed()


class Isolation:
    """Since when machines are joined to none of certain others."""

    def __init__(
        self,
        now: Callable[[], float],
        links: Links,
        of: Callable[[], Iterable[Machine]],
        others: Callable[[], Iterable[Machine]],
    ) -> None:
        """``of``: whom is asked about; ``others``: whom they may reach.  Both may change."""
        self._now = now
        self._links = links
        self._of = of
        self._others = others
        self._since: dict[Machine, float] = {}
        links.changed.append(self._look)

    def since(self, machine: Machine) -> float:
        """Infinity: it and one of the others reach each other."""
        return self._since.get(machine, inf)

    def _look(self) -> None:
        others = tuple(self._others())
        for machine in self._of():
            if any(self._links.is_joined(machine, other) for other in others):
                self._since[machine] = inf
            else:
                self._since[machine] = min(self._since.get(machine, inf), self._now())


class Uptime:
    """Since when processes run without a break; a frozen machine is one."""

    def __init__(self, now: Callable[[], float], links: Links, asked_at: Callable[[], float]) -> None:
        """``asked_at``: when whoever wrote what is being committed asked for that."""
        self._now = now
        self._links = links
        self._asked_at = asked_at
        self._since: dict[Machine, float] = {}
        self._began: dict[Machine, float] = {}
        self._still: set[Machine] = set()
        links.changed.append(self._look)

    def start(self, machine: Machine) -> None:
        self._since[machine] = self._began[machine] = self._now()

    def began(self, machine: Machine) -> float:
        """When its process was last started; long ago while something is committed that the one before asked for."""
        began = self._began[machine]
        return began if self._asked_at() >= began else -inf

    def stop(self, machine: Machine) -> None:
        self._since.pop(machine, None)

    def since(self, machine: Machine) -> float:
        """Infinity: it does not run."""
        return inf if self._links.is_frozen(machine) else self._since.get(machine, inf)

    def _look(self) -> None:
        for machine in self._since:
            if self._links.is_frozen(machine):
                self._still.add(machine)
            elif machine in self._still:
                self._still.remove(machine)
                self._since[machine] = self._now()
