"""How late an event loop comes back to those who wait: the measure of whether anything holds it too long."""

from bisect import bisect_left
from itertools import accumulate

import msgspec
import structlog

from skep.aio.clock import Clock

log = structlog.get_logger()

PERIOD_S = 0.05
"""How often is looked.  Of a hold that begins between two looks, only what outlasts the next look is seen."""

LATE_S = 0.1
"""Lag that is worth a line in the log."""

BOUNDS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


class Lag(msgspec.Struct, frozen=True, rename="pascal"):
    """What was measured.  ``counts``: looks that were at most so late, for each of ``bounds_ms``, then all others."""

    looks: int
    ms_max: float
    ms_p999: float
    """Rounded up to one of ``bounds_ms``; the largest lag where that is smaller."""
    bounds_ms: tuple[int, ...]
    counts: tuple[int, ...]


class LoopLag:
    """Measures the loop it runs on.  ``seen()`` may be asked at any time; differences of counts give a period."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_MS) + 1)
        self._ms_max = 0.0

    async def run(self, clock: Clock) -> None:
        """Measure until cancelled; a lag of ``LATE_S`` is logged."""
        while True:
            before = clock.monotonic()
            await clock.sleep(PERIOD_S)
            lag_s = clock.monotonic() - before - PERIOD_S
            self.note(lag_s)
            if lag_s >= LATE_S:
                log.warning("something held the event loop", lag_ms=round(lag_s * 1000))

    def note(self, lag_s: float) -> None:
        """Count one look that came ``lag_s`` late."""
        lag_ms = max(lag_s * 1000, 0.0)
        self._counts[bisect_left(BOUNDS_MS, lag_ms)] += 1
        self._ms_max = max(self._ms_max, lag_ms)

    def seen(self) -> Lag:
        """Everything since the start."""
        looks = sum(self._counts)
        needed = looks - looks // 1000
        place = next(place for place, reached in enumerate(accumulate(self._counts)) if reached >= needed)
        bound = BOUNDS_MS[place] if place < len(BOUNDS_MS) else self._ms_max
        return Lag(
            looks=looks,
            ms_max=self._ms_max,
            ms_p999=min(bound, self._ms_max),
            bounds_ms=BOUNDS_MS,
            counts=tuple(self._counts),
        )
