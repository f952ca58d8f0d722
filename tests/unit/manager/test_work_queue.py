"""When a control loop looks at what."""

import asyncio
import math

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.control_loops.work_queue import WorkQueue


def run(work: "asyncio.Future[object] | object", loop: VirtualLoop) -> object:
    try:
        return loop.run_until_complete(work)  # type: ignore[arg-type]
    finally:
        loop.close()


def test_a_key_stands_on_it_once_and_keeps_its_place() -> None:
    loop = VirtualLoop()
    queue: WorkQueue[str] = WorkQueue(VirtualClock(loop))

    async def work() -> list[str]:
        queue.add(["b", "a", "b"])
        return await queue.take(10)

    assert run(work(), loop) == ["b", "a"]


def test_what_exceeds_the_limit_stays() -> None:
    loop = VirtualLoop()
    queue: WorkQueue[str] = WorkQueue(VirtualClock(loop))

    async def work() -> list[list[str]]:
        queue.add(["a", "b", "c"])
        return [await queue.take(2), await queue.take(2)]

    assert run(work(), loop) == [["a", "b"], ["c"]]


def test_a_later_key_comes_at_its_time_and_the_earlier_time_counts() -> None:
    loop = VirtualLoop()
    queue: WorkQueue[str] = WorkQueue(VirtualClock(loop))

    async def work() -> tuple[list[str], float]:
        queue.add_at("a", 30.0)
        queue.add_at("a", 10.0)
        queue.add_at("a", 20.0)
        return await queue.take(1), loop.time()

    keys, at = run(work(), loop)  # type: ignore[misc]
    assert keys == ["a"]
    assert 10.0 <= at < 10.01


def test_a_key_that_becomes_due_wakes_a_waiter_for_a_later_one() -> None:
    loop = VirtualLoop()
    queue: WorkQueue[str] = WorkQueue(VirtualClock(loop))

    async def work() -> tuple[list[str], float]:
        queue.add_at("late", 100.0)
        loop.call_later(5.0, queue.add, ["now"])
        return await queue.take(1), loop.time()

    keys, at = run(work(), loop)  # type: ignore[misc]
    assert keys == ["now"]
    assert 5.0 <= at < 5.01


def test_a_time_that_is_nearer_than_the_resolution_of_a_clock_comes_all_the_same() -> None:
    loop = VirtualLoop()
    clock = VirtualClock(loop, drift=0.5)
    queue: WorkQueue[str] = WorkQueue(clock)

    async def work() -> list[str]:
        await asyncio.sleep(1e6)
        queue.add_at("a", math.nextafter(clock.monotonic(), math.inf))
        return await queue.take(1)

    assert run(work(), loop) == ["a"]


def test_keys_of_a_higher_priority_come_first_and_equals_keep_their_order() -> None:
    loop = VirtualLoop()
    priorities = {"low": -1, "high": 5, "higher": 9}
    queue: WorkQueue[str] = WorkQueue(VirtualClock(loop), lambda key: priorities.get(key, 0))

    async def work() -> list[list[str]]:
        queue.add(["b", "low", "high", "a"])
        first = await queue.take(2)
        queue.add(["higher", "high", "b"])
        return [first, await queue.take(2), await queue.take(10)]

    assert run(work(), loop) == [["high", "b"], ["higher", "high"], ["a", "b", "low"]]
