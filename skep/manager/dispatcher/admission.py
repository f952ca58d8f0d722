"""How many nodes register at one time when thousands come back at once, and when the others are told to come again.

So many registrations are worked on at a time (``AT_ONCE_MAX``); their number a second follows from what this machine
and the store can do.  Whoever comes meanwhile waits in line on its connection.  One whose turn does not come in time is
told when to come, by the rate that was measured since the line formed, each a little later than the one before.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

from skep.aio.clock import Clock
from skep.errors import RetryLater

AT_ONCE_MAX = 128
"""About a transaction of the store: more at a time are no faster, and hold up what else the manager does."""
HOLD_S = 3.0
"""In line, before a node is told to come again.  Nodes that do not know that word give up after 5 s: asking costs them
a new connection, so they are not sent away for less."""
FIRST_RATE = 100.0
"""Registrations a second, before they have been measured for ``MEASURED_S``: what a small machine does."""
MEASURED_S = 1.0
SHORTEST_S, LONGEST_S = 0.5, 10.0
"""That a node is told to stay away.  Not for longer: the rate may grow."""
COMING_S = 1.0
"""For a node to be here after the time that it was told."""


def rate(done: int, took_s: float) -> float:
    """Registrations a second, of ``done`` ones in the time since the line formed."""
    return max(done / took_s, 1.0) if took_s >= MEASURED_S else FIRST_RATE


def time_to_come(now: float, in_line: int, last: float, per_s: float, chance: float) -> float:
    """When the next node that is told is to come: after the line, and after the ``last`` one that was told.

    ``chance``: 0 to 1; spreads those who would come after the longest wait.
    """
    at = max(last, now + in_line / per_s) + 1 / per_s
    longest_s = LONGEST_S * (0.5 + 0.5 * chance)
    return now + min(max(at - now, SHORTEST_S), longest_s)


class Admission:
    """The line of nodes that want to register with this manager."""

    def __init__(self, clock: Clock, random: Random) -> None:
        self._clock = clock
        self._random = random
        self._taken = 0
        self._line: dict[asyncio.Future[None], None] = {}
        self._line_since = 0.0
        self._done = 0
        """Since the line formed."""
        self._told = float("-inf")
        """When the last one that was told is to come."""

    def is_overloaded(self) -> bool:
        """Whether nodes wait, here or where they were told to."""
        return bool(self._line) or self._clock.monotonic() < self._told + COMING_S

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Register within.  Raises: RetryLater: the turn did not come in time."""
        await self._wait_turn()
        try:
            yield
            self._done += 1
        finally:
            self._leave()

    async def _wait_turn(self) -> None:
        if self._taken < AT_ONCE_MAX and not self._line:
            self._taken += 1
            return
        if not self.is_overloaded():
            self._line_since, self._done = self._clock.monotonic(), 0
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line[turn] = None
        try:
            async with asyncio.timeout(HOLD_S):
                await turn
        except TimeoutError:
            if self._gave_up(turn):
                return
            raise self._later() from None
        except asyncio.CancelledError:
            if self._gave_up(turn):
                self._leave()
            raise

    def _gave_up(self, turn: asyncio.Future[None]) -> bool:
        """Leave the line; whether the turn came in the same moment."""
        self._line.pop(turn, None)
        return turn.done() and not turn.cancelled()

    def _later(self) -> RetryLater:
        now = self._clock.monotonic()
        per_s = rate(self._done, now - self._line_since)
        self._told = time_to_come(now, len(self._line), self._told, per_s, self._random.random())
        after_s = self._told - now
        return RetryLater(
            f"many nodes register with this manager at present: come again in {after_s:.1f} s", after_s
        )

    def _leave(self) -> None:
        self._taken -= 1
        while self._line and self._taken < AT_ONCE_MAX:
            turn = next(iter(self._line))
            del self._line[turn]
            if not turn.done():
                self._taken += 1
                turn.set_result(None)
