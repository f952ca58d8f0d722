"""Time as an argument: code that needs the time is given a clock, so a whole cluster can run on a simulated one.

``SystemClock`` is the only place that reads the machine's clocks.
"""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """The present, and waiting for the future."""

    def now_ns(self) -> int:
        """Wall clock: nanoseconds since 1970, UTC.  May jump; for stamps only, never for measuring."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment.  Never goes back; stamps of two clocks are not comparable."""

    async def sleep(self, seconds: float) -> None:
        """Return after ``seconds`` of this clock; zero or less lets others run once."""


class SystemClock:
    """The clocks of this machine."""

    def now_ns(self) -> int:
        """Wall clock, nanoseconds since 1970."""
        return time.time_ns()

    def monotonic(self) -> float:
        """Seconds since an arbitrary moment."""
        return time.monotonic()

    def since_boot(self) -> float:
        """Seconds since the machine was started, those in which it slept too; the same in all its processes."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def sleep(self, seconds: float) -> None:
        """``asyncio.sleep``; a negative time counts as 0."""
        await asyncio.sleep(max(seconds, 0.0))
