"""Work queue of a control loop, with keys that are due now and keys that are due later.

A key is queued once, however often it is added, so the number of objects bounds the queue.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from skep.aio.clock import Clock
from skep.aio.race import is_set_within

K = TypeVar("K", bound=str)

LEAST_WAIT_S = 1e-6
"""A shorter wait could vanish in the rounding of the clock's float, and would never end on simulated time."""


class WorkQueue(Generic[K]):
    """Keys in the order in which they became due.  Keys of a higher priority come first."""

    def __init__(self, clock: Clock, priority: Callable[[K], int] | None = None) -> None:
        """``priority`` returns the priority of a key when it becomes due.  Without it all keys are equal."""
        self._clock = clock
        self._priority = priority
        self._due: deque[K] = deque()
        self._others: dict[int, deque[K]] = {}
        """Due keys whose priority is not 0, by priority.  No queue is empty."""
        self._is_due: set[K] = set()
        self._later: list[tuple[float, K]] = []
        self._times: dict[K, float] = {}
        self._changed = asyncio.Event()

    def add(self, keys: Iterable[K]) -> None:
        """Queue ``keys`` for now."""
        for key in keys:
            if key not in self._is_due:
                self._is_due.add(key)
                if self._priority is not None and (priority := self._priority(key)):
                    self._others.setdefault(priority, deque()).append(key)
                else:
                    self._due.append(key)
        if self._is_due:
            self._changed.set()

    def add_at(self, key: K, at: float) -> None:
        """Queue ``key`` for ``at`` (monotonic seconds), unless it is already queued for an earlier time."""
        if at < self._times.get(key, float("inf")):
            self._times[key] = at
            heapq.heappush(self._later, (at, key))
            self._changed.set()

    async def take(self, limit: int) -> list[K]:
        """Wait until a key is due, then remove and return up to ``limit`` keys, oldest first."""
        while not (keys := self.take_due(limit)):
            self._changed.clear()
            await is_set_within(self._changed, self.wait_s())
        return keys

    def take_due(self, limit: int) -> list[K]:
        """Remove and return up to ``limit`` keys that are due now, perhaps none."""
        now = self._clock.monotonic()
        while self._later and self._later[0][0] <= now:
            at, key = heapq.heappop(self._later)
            if self._times.get(key) == at:
                del self._times[key]
                self.add((key,))
        keys: list[K] = []
        for due in self._in_order() if self._others else (self._due,):
            keys += [due.popleft() for _ in range(min(limit - len(keys), len(due)))]
        if self._others:
            self._others = {priority: due for priority, due in self._others.items() if due}
        self._is_due.difference_update(keys)
        return keys

    def _in_order(self) -> list[deque[K]]:
        """Return the queues of all priorities, the highest first."""
        queues = {0: self._due, **self._others}
        return [queues[priority] for priority in sorted(queues, reverse=True)]

    def has_due(self) -> bool:
        """Return whether a key is due now."""
        is_later_due = bool(self._later) and self._later[0][0] <= self._clock.monotonic()
        return is_later_due or bool(self._is_due)

    def wait_s(self) -> float | None:
        """Return the seconds until the next later key is due, or None without such a key."""
        if not self._later:
            return None
        return max(self._later[0][0] - self._clock.monotonic(), LEAST_WAIT_S)
