"""Limits how many nodes register at the same time when thousands reconnect, and tells the others when to retry.

``AT_ONCE_MAX`` registrations run at the same time.  Their rate follows from the capacity of this machine and the store.
More nodes wait on their connections.  A node that waited too long is told a time to retry, computed from the rate since
nodes had to wait, each node a little later than the one before.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

from skep.aio.clock import Clock
from skep.errors import RetryLater

AT_ONCE_MAX = 128
"""About one transaction of the store.  A larger number is not faster, and delays the manager's other work."""
HOLD_S = 3.0
"""Maximum seconds that a node waits before it is told to retry.

Nodes of versions without ``RetryLater`` stop waiting after 5 s, and a retry costs a new connection, so they are not
turned away earlier."""
FIRST_RATE = 100.0
"""Registrations per second until they were measured for ``MEASURED_S``: the rate of a small machine."""
MEASURED_S = 1.0
"""Seconds of measurement before the rate is used."""
SHORTEST_S, LONGEST_S = 0.5, 10.0
"""Limits of the retry delay in seconds.  The longest is bounded because the rate may grow."""
RECONNECT_S = 1.0
"""Seconds that a node may take to connect after its retry time."""


def rate(done: int, took_s: float) -> float:
    """Return the registrations per second, from the number ``done`` since nodes had to wait."""
    return max(done / took_s, 1.0) if took_s >= MEASURED_S else FIRST_RATE


def next_retry_at(now: float, waiting: int, last: float, per_s: float, jitter: float) -> float:
    """Return when the next node should retry: after the waiting nodes and the ``last`` retry time that was announced.

    ``jitter`` (0 to 1) spreads the nodes that would retry after the longest delay.
    """
    at = max(last, now + waiting / per_s) + 1 / per_s
    longest_s = LONGEST_S * (0.5 + 0.5 * jitter)
    return now + min(max(at - now, SHORTEST_S), longest_s)


class RegistrationQueue:
    """Nodes that wait to register with this manager."""

    def __init__(self, clock: Clock, random: Random) -> None:
        self._clock = clock
        self._random = random
        self.running_count = 0
        self._waiting: dict[asyncio.Future[None], None] = {}
        self._waiting_since = 0.0
        self._done = 0
        """Registrations since nodes had to wait."""
        self.last_retry_at = float("-inf")
        """The latest retry time that was announced."""

    def is_overloaded(self) -> bool:
        """Whether nodes wait, here or for their retry time."""
        return bool(self._waiting) or self._clock.monotonic() < self.last_retry_at + RECONNECT_S

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Register within the block.  Raises RetryLater if no slot became free in time."""
        await self._wait_slot()
        try:
            yield
            self._done += 1
        finally:
            self._leave()

    async def _wait_slot(self) -> None:
        if self.running_count < AT_ONCE_MAX and not self._waiting:
            self.running_count += 1
            return
        if not self.is_overloaded():
            self._waiting_since, self._done = self._clock.monotonic(), 0
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[slot] = None
        try:
            async with asyncio.timeout(HOLD_S):
                await slot
        except TimeoutError:
            if self._stop_waiting(slot):
                return
            raise self._retry_later() from None
        except asyncio.CancelledError:
            if self._stop_waiting(slot):
                self._leave()
            raise

    def _stop_waiting(self, slot: asyncio.Future[None]) -> bool:
        """Stop waiting.  Returns whether the slot became free at the same moment."""
        self._waiting.pop(slot, None)
        return slot.done() and not slot.cancelled()

    def _retry_later(self) -> RetryLater:
        now = self._clock.monotonic()
        per_s = rate(self._done, now - self._waiting_since)
        self.last_retry_at = next_retry_at(
            now, len(self._waiting), self.last_retry_at, per_s, self._random.random()
        )
        after_s = self.last_retry_at - now
        return RetryLater(f"many nodes are registering with this manager: retry in {after_s:.1f} s", after_s)

    def _leave(self) -> None:
        self.running_count -= 1
        while self._waiting and self.running_count < AT_ONCE_MAX:
            slot = next(iter(self._waiting))
            del self._waiting[slot]
            if not slot.done():
                self.running_count += 1
                slot.set_result(None)
