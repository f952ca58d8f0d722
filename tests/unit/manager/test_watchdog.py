"""A loop that hangs is noticed from outside of it."""

import asyncio
import time
from collections.abc import Callable

import pytest

from skep.aio.clock import SystemClock
from skep.aio.event_loop.hang_detection import HangLimits
from skep.errors import Unavailable
from skep.manager.telemetry.watchdog import Watchdog

LIMITS = HangLimits(hand_over_s=0.2, end_s=0.6)
TICK_S = 0.02


class Observed:
    """Records the watchdog's calls; ``fails``: no other manager takes over leadership."""

    def __init__(self, *, fails: bool = False) -> None:
        self.said: list[str] = []
        self._fails = fails

    async def hand_over(self) -> None:
        await asyncio.sleep(0)
        self.said.append("hand over")
        if self._fails:
            raise Unavailable("no other voter")

    def end(self, why: str) -> None:
        self.said.append(f"end: {why}")


def hold_until(condition: Callable[[], bool]) -> None:
    """Keep this thread, and so the loop; other threads run."""
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)


def work(seconds: float) -> None:
    time.sleep(seconds)


@pytest.mark.parametrize("fails", [False, True])
async def test_a_loop_that_hangs_has_another_lead_and_then_ends(fails: bool) -> None:
    reported = Observed(fails=fails)
    watch = Watchdog(
        asyncio.get_running_loop(), reported.hand_over, reported.end, SystemClock(), TICK_S, LIMITS
    )
    watch.start()
    await asyncio.sleep(0.1)
    assert reported.said == []
    hold_until(lambda: len(reported.said) == 2)
    assert reported.said[0] == "hand over"
    assert reported.said[1].startswith("end: its event loop did not respond")
    watch.stop()


async def test_a_loop_that_works_and_waits_is_left_alone() -> None:
    reported = Observed()
    watch = Watchdog(
        asyncio.get_running_loop(), reported.hand_over, reported.end, SystemClock(), TICK_S, LIMITS
    )
    watch.start()
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        work(0.02)
        await asyncio.sleep(0.01)
    watch.stop()
    assert reported.said == []
