import asyncio

import pytest

from skep.aio.clock import SystemClock
from skep.aio.keyed_queue import KeyedQueue
from skep.errors import ResourceExhausted


class StillClock(SystemClock):
    """Time moves when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def a_queue(clock: StillClock | None = None, **limits: int) -> KeyedQueue[str]:
    return KeyedQueue(clock or StillClock(), first_s=0.01, longest_s=0.08, chance=lambda: 1.0, **limits)


async def test_each_key_is_there_once_and_the_oldest_comes_first():
    queue = a_queue()
    for key in "abcab":
        queue.add(key)
    assert [await queue.take() for _ in range(3)] == ["a", "b", "c"]
    assert len(queue) == 3  # being worked on


async def test_a_key_added_while_worked_on_comes_again_afterwards():
    queue = a_queue()
    queue.add("a")
    key = await queue.take()
    queue.add("a")
    queue.add("b")
    assert await queue.take() == "b"
    queue.done(key)
    assert await queue.take() == "a"


async def test_a_key_that_is_done_is_gone():
    queue = a_queue()
    queue.add("a")
    queue.done(await queue.take())
    assert len(queue) == 0


async def test_a_failed_key_waits_longer_each_time_and_alone():
    clock = StillClock()
    queue = a_queue(clock)
    waits = []
    queue.add("bad")
    for _ in range(4):
        waits.append(queue.failed(await queue.take()))
        queue.add("good")
        assert await queue.take() == "good"
        queue.done("good")
        clock.now += waits[-1]
    assert waits == [0.01, 0.02, 0.04, 0.08]
    queue.done(await queue.take())
    queue.add("bad")
    assert queue.failed(await queue.take()) == 0.01


async def test_a_change_ends_the_wait_of_a_failed_key():
    queue = a_queue()
    queue.add("a")
    queue.failed(await queue.take())
    queue.add("a")
    assert await queue.take() == "a"
    queue.done("a")
    assert len(queue) == 0


async def test_a_taker_wakes_when_the_delay_of_a_failed_key_is_over():
    queue: KeyedQueue[str] = KeyedQueue(SystemClock(), first_s=0.01, longest_s=0.01)
    queue.add("a")
    queue.failed(await queue.take())
    async with asyncio.timeout(2):
        assert await queue.take() == "a"


async def test_a_full_queue_refuses_new_keys_and_keeps_known_ones():
    queue = a_queue(size_max=2)
    queue.add("a")
    queue.add("b")
    with pytest.raises(ResourceExhausted):
        queue.add("c")
    queue.add("a")
    queue.failed(await queue.take())
    queue.add("a")
    assert len(queue) == 2
