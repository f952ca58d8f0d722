"""Which machine's packets reach which other machine.  Every direction is cut and mended by itself.

A frozen machine (SIGSTOP, a hypervisor that does not run it) neither sends nor hears; what was sent to it waits.
"""

import asyncio
from collections.abc import Callable, Iterable
from itertools import product

Machine = str
"""The id of the node that lives there."""


class Links:
    """All machines, and what lies between them.  ``changed`` are called after each change."""

    def __init__(self) -> None:
        self.changed: list[Callable[[], None]] = []
        self.is_whole = True
        """Whether everybody reaches everybody: asked for every message."""
        self._cut: set[tuple[Machine, Machine]] = set()
        self._frozen: dict[Machine, asyncio.Event] = {}

    def reaches(self, source: Machine, target: Machine) -> bool:
        """Whether what ``source`` sends arrives at ``target``."""
        if self.is_whole:
            return True
        if source in self._frozen or target in self._frozen:
            return False
        return (source, target) not in self._cut

    def is_joined(self, one: Machine, other: Machine) -> bool:
        """Whether both reach each other."""
        return self.reaches(one, other) and self.reaches(other, one)

    def cut(self, sources: Iterable[Machine], targets: Iterable[Machine], *, both_ways: bool = True) -> None:
        """Lose everything on the way from ``sources`` to ``targets``."""
        for source, target in product(list(sources), list(targets)):
            if source != target:
                self._cut.add((source, target))
                if both_ways:
                    self._cut.add((target, source))
        self._tell()

    def mend(self) -> None:
        """Undo every cut; frozen machines stay frozen."""
        self._cut.clear()
        self._tell()

    def freeze(self, machine: Machine) -> None:
        """Stop ``machine`` in the middle of whatever it does."""
        self._frozen.setdefault(machine, asyncio.Event())
        self._tell()

    def thaw(self, machine: Machine) -> None:
        """Let ``machine`` go on, as if no time had passed there."""
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
        self.is_whole = not self._cut and not self._frozen
        for changed in self.changed:
            changed()
