"""Whose layer is unpacked next: a place goes to the image that has fewest, and nobody keeps one for long.

A layer may take half an hour, by its size or because somebody made it so.  One that has its place for longer than
``patience_s`` goes on without it, together with a few others; so it takes many images, and not three, to keep
the rest waiting.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """``places``: workers at a time; ``slow_max``: of those that took too long, beside them."""

    def __init__(self, places: int, *, patience_s: float, slow_max: int) -> None:
        self._free = places
        self._patience_s = patience_s
        self._slow_left = slow_max
        self._working: Counter[str] = Counter()
        self._overdue: list[_Turn] = []
        """Those that would go on without a place, when there is room for them."""
        self._waiting: list[_Turn] = []

    @asynccontextmanager
    async def of(self, image: str) -> AsyncIterator[None]:
        """Work for ``image`` when it is its turn."""
        turn = _Turn(image)
        self._waiting.append(turn)
        self._next()
        try:
            await turn.has_come.wait()
            timer = asyncio.get_running_loop().call_later(self._patience_s, self._is_slow, turn)
            try:
                yield
            finally:
                timer.cancel()
        finally:
            self._end(turn)
            self._next()

    def _next(self) -> None:
        """The image with fewest workers; of several the one that has waited longest."""
        while self._free and self._waiting:
            turn = min(self._waiting, key=lambda one: self._working[one.image])
            self._waiting.remove(turn)
            self._working[turn.image] += 1
            self._free -= 1
            turn.has_come.set()

    def _is_slow(self, turn: "_Turn") -> None:
        self._overdue.append(turn)
        self._let_slow_ones_go_on()

    def _let_slow_ones_go_on(self) -> None:
        while self._slow_left and self._overdue:
            turn = self._overdue.pop(0)
            turn.is_slow = True
            self._slow_left -= 1
            self._free += 1
        self._next()

    def _end(self, turn: "_Turn") -> None:
        if turn in self._waiting:
            self._waiting.remove(turn)
            return
        self._working[turn.image] -= 1
        self._working += Counter()  # without those that have none
        if turn in self._overdue:
            self._overdue.remove(turn)
        if turn.is_slow:
            self._slow_left += 1
            self._let_slow_ones_go_on()
        else:
            self._free += 1


class _Turn:
    """One layer's."""

    def __init__(self, image: str) -> None:
        self.image = image
        self.has_come = asyncio.Event()
        self.is_slow = False
