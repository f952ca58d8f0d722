"""Work that may fail or wait, by key: each key stands in the queue once, however often it is added.

A key whose work failed comes back after a delay that grows for that key alone, so one bad object delays no other.
The number of keys is bounded; a full queue refuses new ones, and says so.
"""

import asyncio
import heapq
import random
from collections.abc import Callable, Hashable
from functools import partial
from typing import Generic, TypeVar

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import ResourceExhausted

K = TypeVar("K", bound=Hashable)


class KeyedQueue(Generic[K]):
    """Keys in the order in which they became due.

    A key added while it is being worked on becomes due again when that work is ``done``, so nobody works on one
    key twice at a time.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        size_max: int = 100_000,
        first_s: float = 0.05,
        longest_s: float = 60.0,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """``first_s``, ``longest_s``: seconds that a key waits after its first and after many failures."""
        self._clock = clock
        self._size_max = size_max
        self._new_backoff = partial(Backoff, first_s, longest_s, chance=chance)
        self._due: dict[K, None] = {}
        self._delayed: dict[K, float] = {}
        self._times: list[tuple[float, int, K]] = []
        self._pushed = 0
        self._working: dict[K, bool] = {}
        """Keys being worked on; True: to be looked at again afterwards."""
        self._backoffs: dict[K, Backoff] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        """Keys that are due, delayed or being worked on."""
        return len(self._due) + len(self._delayed) + len(self._working)

    def add(self, key: K) -> None:
        """Have ``key`` looked at as soon as possible.  Raises: ResourceExhausted: too many keys."""
        if key in self._working:
            self._working[key] = True
            return
        if key in self._due:
            return
        if key not in self._delayed and len(self) >= self._size_max:
            raise ResourceExhausted(f"more than {self._size_max} objects are waiting for work")
        self._delayed.pop(key, None)
        self._due[key] = None
        self._changed.set()

    async def take(self) -> K:
        """Wait for the key that has been due longest; ``done`` or ``failed`` must follow."""
        while True:
            self._collect_due()
            if self._due:
                key = next(iter(self._due))
                del self._due[key]
                self._working[key] = False
                return key
            self._changed.clear()
            try:
                async with asyncio.timeout(self._next_delay_s()):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def done(self, key: K) -> None:
        """The work on ``key`` succeeded: its next failure waits shortly again."""
        self._backoffs.pop(key, None)
        if self._working.pop(key):
            self.add(key)

    def failed(self, key: K) -> float:
        """The work on ``key`` failed: it comes back by itself.  Gives the seconds until then."""
        del self._working[key]
        delay_s = self._backoffs.setdefault(key, self._new_backoff()).next_delay_s()
        at = self._clock.monotonic() + delay_s
        self._delayed[key] = at
        self._pushed += 1
        heapq.heappush(self._times, (at, self._pushed, key))
        self._changed.set()
        return delay_s

    def _collect_due(self) -> None:
        now = self._clock.monotonic()
        while self._times and self._times[0][0] <= now:
            at, _, key = heapq.heappop(self._times)
            if self._delayed.get(key) == at:
                del self._delayed[key]
                self._due[key] = None

    def _next_delay_s(self) -> float | None:
        return max(0.0, self._times[0][0] - self._clock.monotonic()) if self._times else None
