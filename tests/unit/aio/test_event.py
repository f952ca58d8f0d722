"""An event that keeps nothing for waiters while there are none."""

import asyncio

import pytest

from skep.aio.event import Event


async def test_an_event_wakes_all_waiters_and_a_cancelled_one_is_removed() -> None:
    event = Event()
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(event.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        event.set()
    assert [task.cancelled() for task in waiting] == [True, False, False]
    assert event.is_set()
    event.clear()
    assert not event.is_set()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await event.wait()
