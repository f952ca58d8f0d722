"""Calls that may never return."""

import asyncio
import threading

import pytest

from skep.aio.blocking import BlockingCalls
from skep.errors import Unavailable


async def test_a_call_gives_its_result_or_its_error() -> None:
    calls = BlockingCalls(1)
    assert await calls.call(lambda: 3, 30) == 3
    with pytest.raises(ZeroDivisionError):
        await calls.call(lambda: 1 // 0, 30)
    assert await calls.call(lambda: 4, 30) == 4


async def test_a_call_that_does_not_return_ends_at_its_deadline_and_too_many_of_them_end_at_once() -> None:
    calls, may_end, entered = BlockingCalls(2), threading.Event(), threading.Semaphore(0)

    def wait() -> None:
        entered.release()
        may_end.wait(60)

    for _ in range(2):
        with pytest.raises(TimeoutError):
            await calls.call(wait, 0.01)
    with pytest.raises(Unavailable, match="2 file accesses already wait for their servers"):
        await calls.call(wait, 30)
    may_end.set()
    for _ in range(2):
        assert entered.acquire(timeout=30)
    while True:
        try:
            assert await calls.call(lambda: 5, 30) == 5
        except Unavailable:
            await asyncio.sleep(0)
        else:
            break
