"""Long work gives way when its slice is over, and not before."""

import asyncio

from skep.aio.clock import SystemClock
from skep.aio.time_slices import SLICE_S, TimeSlices


class HandClock(SystemClock):
    """Its time passes when a test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


async def test_others_get_their_turn_once_for_each_slice_of_work() -> None:
    clock, turns = HandClock(), 0
    slices = TimeSlices(clock)

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        running = group.create_task(other())
        for _ in range(40):
            clock.now += SLICE_S / 3.9
            await slices.yield_if_due()
        running.cancel()
    assert turns == 10
