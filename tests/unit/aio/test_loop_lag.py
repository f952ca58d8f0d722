import asyncio
from contextlib import suppress

import structlog

from skep.aio.loop_lag import BOUNDS_MS, LATE_S, PERIOD_S, LoopLag


class LateClock:
    """Each sleep takes longer than asked by the next of ``lags_s``; then it is cancelled."""

    def __init__(self, *lags_s: float) -> None:
        self._lags_s = list(lags_s)
        self._now = 0.0

    def now_ns(self) -> int:
        return 0

    def monotonic(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        if not self._lags_s:
            raise asyncio.CancelledError
        self._now += seconds + self._lags_s.pop(0)


async def measured(*lags_s: float) -> LoopLag:
    lag = LoopLag()
    with suppress(asyncio.CancelledError):
        await lag.run(LateClock(*lags_s))
    return lag


def test_nothing_measured_is_no_lag():
    assert LoopLag().seen().ms_p999 == 0


async def test_a_late_loop_is_logged_once_per_hold():
    with structlog.testing.capture_logs() as lines:
        await measured(0.001, LATE_S + PERIOD_S, 0.002)
    assert [line["event"] for line in lines] == ["something held the event loop"]


async def test_one_look_in_a_thousand_does_not_count_for_the_percentile():
    seen = (await measured(*[0.0005] * 999, 0.3)).seen()
    assert (seen.looks, round(seen.ms_max), seen.ms_p999) == (1000, 300, 1)


async def test_a_lag_beyond_all_bounds_is_its_own_percentile():
    seen = (await measured(7.5)).seen()
    assert round(seen.ms_p999) == 7500
    assert seen.counts == (*[0] * len(BOUNDS_MS), 1)
