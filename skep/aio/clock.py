"""Clocks.  Code that needs the time gets a clock as an argument, so a whole cluster can run on a simulated one.

Only ``SystemClock`` reads the machine's clocks.
"""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """The current time, and waiting."""

    def now_ns(self) -> int:
        """Return the wall clock time in nanoseconds since 1970, UTC.

        It may jump: use it for stamps, not to measure.
        """

    def monotonic(self) -> float:
        """Return the seconds since some fixed moment.  Never decreases.  Results of two clocks are not comparable."""

    async def sleep(self, seconds: float) -> None:
        """Return after ``seconds`` of this clock.  Zero or less lets other tasks run once."""


class SystemClock:
    """The clocks of this machine."""

    def now_ns(self) -> int:
        """Return the wall clock time in nanoseconds since 1970."""
        return time.time_ns()

    def monotonic(self) -> float:
        """Return seconds since an arbitrary moment."""
        return time.monotonic()

    def since_boot(self) -> float:
        """Return seconds since the machine's boot, including suspends.  It is the same in all processes."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def sleep(self, seconds: float) -> None:
        """Call ``asyncio.sleep``.  A negative time counts as 0."""
        await asyncio.sleep(max(seconds, 0.0))


def until_tick(now: float, period_s: float) -> float:
    """Return the seconds from ``now`` (monotonic) until the next multiple of ``period_s``.

    At least half a period, so that a timer that fires a moment too early does not run twice.
    """
    left_s = period_s - now % period_s
    return left_s if left_s >= period_s / 2 else left_s + period_s


async def tick(clock: Clock, period_s: float) -> None:
    """Return at the next multiple of ``period_s``.

    Periodic loops use it instead of ``sleep``, so that the loops of a process wake it together: in an idle process, a
    wakeup costs more than what most loops then do.
    """
    await clock.sleep(until_tick(clock.monotonic(), period_s))
