"""What a control loop has to look at: keys that are due now, and keys that are due at a later time.

A key stands on the agenda once, however often it is added; so the agenda is bounded by the number of objects.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

from skep.aio.clock import Clock

K = TypeVar("K", bound=str)

LEAST_WAIT_S = 1e-6
"""A wait that is lost in the rounding of a clock's time would never end where that time moves by such waits alone."""


class Agenda(Generic[K]):
    """Keys in the order in which they became due."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._due: deque[K] = deque()
        self._is_due: set[K] = set()
        self._later: list[tuple[float, K]] = []
        self._times: dict[K, float] = {}
        self._changed = asyncio.Event()

    def add(self, keys: Iterable[K]) -> None:
        """Look at ``keys`` as soon as possible."""
        for key in keys:
            if key not in self._is_due:
                self._is_due.add(key)
                self._due.append(key)
        if self._due:
            self._changed.set()

    def add_at(self, key: K, at: float) -> None:
        """Look at ``key`` at ``at`` (clock's monotonic seconds), or earlier if it was already to be."""
        if at < self._times.get(key, float("inf")):
            self._times[key] = at
            heapq.heappush(self._later, (at, key))
            self._changed.set()

    async def take(self, limit: int) -> list[K]:
        """Wait until something is due; return up to ``limit`` keys, oldest first, and take them off."""
        while not (keys := self._take_due(limit)):
            self._changed.clear()
            try:
                async with asyncio.timeout(self._wait_s()):
                    await self._changed.wait()
            except TimeoutError:
                continue
        return keys

    def _take_due(self, limit: int) -> list[K]:
        now = self._clock.monotonic()
        while self._later and self._later[0][0] <= now:
            at, key = heapq.heappop(self._later)
            if self._times.get(key) == at:
                del self._times[key]
                self.add((key,))
        keys = [self._due.popleft() for _ in range(min(limit, len(self._due)))]
        self._is_due.difference_update(keys)
        return keys

    def _wait_s(self) -> float | None:
        if not self._later:
            return None
        return max(self._later[0][0] - self._clock.monotonic(), LEAST_WAIT_S)
