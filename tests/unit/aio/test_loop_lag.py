import asyncio
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import structlog

from skep.aio.clock import SystemClock
from skep.aio.event_loop.loop_lag import (
    BOUNDS_MS,
    LATE_S,
    PERIOD_AT_REST_S,
    PERIOD_S,
    WAITED_OR_SLEPT,
    LoopLag,
    ThreadTimes,
    cause,
)


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


class WorkingClock(LateClock):
    """The thread computes during each sleep for a fifth of its time."""

    def __init__(self) -> None:
        super().__init__(*[0.0] * 5)
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        await super().sleep(seconds)
        self.slept.append(seconds)
        compute(seconds / 5)


async def test_lag_is_sampled_without_a_thread() -> None:
    lag = LoopLag()
    with pytest.raises(asyncio.CancelledError):
        await lag.sample(LateClock(0.0, 0.3), 0.25)
    assert lag.seen().looks == 2
    assert lag.seen().ms_max == pytest.approx(300)


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
    assert [line["lag_ms"] for line in lines] == [150]


async def test_one_look_in_a_thousand_does_not_count_for_the_percentile():
    seen = (await measured(*[0.0005] * 999, 0.3)).seen()
    assert (seen.looks, round(seen.ms_max), seen.ms_p999) == (1000, 300, 1)


async def test_a_lag_beyond_all_bounds_is_its_own_percentile():
    seen = (await measured(7.5)).seen()
    assert round(seen.ms_p999) == 7500
    assert seen.counts == (*[0] * len(BOUNDS_MS), 1)


@pytest.mark.parametrize(
    ("ran_s", "waited_s", "expected"),
    [(0.2, 0.05, "ran"), (0.05, 0.2, "waited for a processor"), (0.01, 0.02, "slept")],
)
def test_a_lag_is_what_the_thread_did_most_of_the_time(ran_s: float, waited_s: float, expected: str) -> None:
    assert cause(0.25, ran_s, waited_s) == expected


@pytest.mark.parametrize(("ran_s", "expected"), [(0.2, "ran"), (0.05, WAITED_OR_SLEPT)])
def test_without_scheduler_statistics_only_running_is_known(ran_s: float, expected: str) -> None:
    assert cause(0.25, ran_s, None) == expected


@pytest.fixture(params=[None, "0 0 0\n"])
def unknown(request: pytest.FixtureRequest, tmp_path: Path) -> ThreadTimes:
    """Times on a kernel without scheduler statistics: the file is missing, or contains zeros."""
    schedstat = tmp_path / "schedstat"
    if request.param is not None:
        schedstat.write_text(request.param)
    return ThreadTimes(str(schedstat))


async def test_a_computing_callback_is_found_without_scheduler_statistics(unknown: ThreadTimes) -> None:
    line = await reported(lambda: compute(0.3), lambda line: line["ran_ms"] >= 300, unknown)
    assert line["waited_for_processor_ms"] is None
    is_mostly_running = (
        2 * line["ran_ms"] >= line["lag_ms"]
    )  # not on a machine that is busy with something else
    assert line["event"] == ("event loop blocked" if is_mostly_running else "event loop late")


async def test_a_blocking_callback_is_not_given_a_cause_without_scheduler_statistics(
    unknown: ThreadTimes,
) -> None:
    line = await reported(lambda: time.sleep(0.3), lambda line: line["cause"] != "ran", unknown)
    assert (line["event"], line["cause"]) == ("event loop late", WAITED_OR_SLEPT)


async def test_a_busy_loop_is_measured_often_without_scheduler_statistics(unknown: ThreadTimes) -> None:
    """It looked idle to the measurement, because it was not seen to run."""
    clock = WorkingClock()
    with suppress(asyncio.CancelledError):
        await LoopLag(unknown).run(clock)
    assert max(clock.slept) < PERIOD_AT_REST_S / 2


async def test_a_computing_callback_is_logged_with_its_stack():
    line = await reported(
        lambda: compute(0.3), lambda line: any(it.endswith(" compute") for it in line["stood"])
    )
    assert line["ran_ms"] >= 300


async def test_a_blocking_callback_is_logged_as_one_that_slept():
    def slept_ms(line: MutableMapping[str, Any]) -> int:
        return line["lag_ms"] - line["ran_ms"] - line["waited_for_processor_ms"]

    line = await reported(lambda: time.sleep(0.3), lambda line: slept_ms(line) >= 200)
    assert line["event"] == "event loop blocked" or line["waited_for_processor_ms"] >= 200


async def reported(
    hold: Callable[[], None],
    wanted: Callable[[MutableMapping[str, Any]], bool],
    times: ThreadTimes | None = None,
) -> Any:
    """The first line that is ``wanted``, of those that are logged while the loop is held again and again."""
    with structlog.testing.capture_logs() as lines:
        async with asyncio.TaskGroup() as group:
            measuring = group.create_task(LoopLag(times).run(SystemClock()))
            while not any(map(wanted, lines)):
                await asyncio.sleep(PERIOD_S)
                hold()
            measuring.cancel()
    return next(filter(wanted, lines))


def compute(processor_s: float) -> None:
    until = time.thread_time() + processor_s
    while time.thread_time() < until:
        pass
