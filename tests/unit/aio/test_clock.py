"""Periodic loops wake a process together."""

import asyncio

from hypothesis import given
from hypothesis.strategies import floats, sampled_from

from sim.world.time import VirtualClock, VirtualLoop
from skep.aio.clock import tick, until_tick


@given(now=floats(0, 1e7), period_s=sampled_from((0.2, 0.5, 1.0, 5.0, 15.0)))
def test_a_tick_is_a_multiple_of_the_period_and_never_comes_twice(now: float, period_s: float) -> None:
    pause_s = until_tick(now, period_s)
    assert period_s / 2 <= pause_s < 1.5 * period_s + 1e-6
    periods = (now + pause_s) / period_s
    assert abs(periods - round(periods)) < 1e-6


def test_loops_that_begin_at_different_times_wake_together() -> None:
    async def repeat(clock: VirtualClock, period_s: float, first_s: float) -> None:
        await clock.sleep(first_s)
        while True:
            await tick(clock, period_s)

    loop = VirtualLoop()
    clock = VirtualClock(loop)
    periods = (0.5, 0.5, 1.0, 1.0, 2.0, 5.0)
    tasks = [loop.create_task(repeat(clock, one, 0.013 * number)) for number, one in enumerate(periods, 1)]
    loop.run_until_complete(asyncio.sleep(10.1))
    before = loop.wakeups
    loop.run_until_complete(asyncio.sleep(10.0))
    assert loop.wakeups - before <= 21 + 1, "two in a second, as the shortest period needs, and this test"
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.wait(tasks))
    loop.close()
