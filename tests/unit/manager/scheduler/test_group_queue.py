"""Which groups the scheduler takes: those that are due, and refused ones that may have room now."""

import asyncio
from collections.abc import Awaitable, Callable

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.scheduler.group_queue import RETRIES_S, GroupQueue
from skep.manager.scheduler.preemption.priorities import HELD_S
from tests.support.harness.clocks import PausingVirtualClock


def run(work: Callable[[GroupQueue], Awaitable[object]], *, is_slow: bool = False) -> object:
    """``is_slow``: whether each decision takes longer than refused groups have."""
    loop = VirtualLoop()
    clock = PausingVirtualClock(loop, 2 * RETRIES_S) if is_slow else VirtualClock(loop)
    queue = GroupQueue(clock, lambda group: {"h": 1, "l": -1}.get(group[0], 0))
    try:
        return loop.run_until_complete(work(queue))  # type: ignore[arg-type]
    finally:
        loop.close()


def test_refused_groups_are_due_again_together_those_of_higher_priority_first() -> None:
    async def work(queue: GroupQueue) -> object:
        for group in ("l", "a", "h", "b"):
            queue.set_aside(group)
        queue.discard_refused("b")
        queue.retry()
        return await queue.take(10), queue.has_refused

    assert run(work) == (["h", "a", "l"], False)


def test_a_change_that_concerns_some_refused_groups_makes_these_due() -> None:
    async def work(queue: GroupQueue) -> object:
        for group in ("l", "b", "h", "a"):
            queue.set_aside(group)
        queue.retry(only={"a", "h", "not refused"})
        first = await queue.take(10)
        queue.retry()
        return first, await queue.take(10)

    assert run(work) == (["h", "a"], ["b", "l"])


def test_while_others_are_due_they_get_half_of_what_is_taken() -> None:
    async def work(queue: GroupQueue) -> object:
        for number in range(6):
            queue.set_aside(f"h{number}")
        queue.retry()
        queue.add(["l1", "l2", "l3"])
        return [await queue.take(4) for _ in range(3)]

    assert run(work) == [["h0", "h1", "l1", "l2"], ["h2", "h3", "h4", "l3"], ["h5"]]


def test_a_refused_group_that_is_due_is_taken_once() -> None:
    async def work(queue: GroupQueue) -> object:
        queue.set_aside("a")
        queue.add(["a"])
        queue.retry()
        queue.add(["a", "b"])
        return await queue.take(10)

    assert run(work) == ["a", "b"]


def test_those_of_lower_priority_are_due_a_moment_later() -> None:
    async def work(queue: GroupQueue) -> object:
        loop = asyncio.get_running_loop()
        for group in ("l", "a", "h"):
            queue.set_aside(group)
        queue.retry(held_for=1)
        first, began = await queue.take(10), loop.time()
        return first, await queue.take(10), HELD_S <= loop.time() - began < 2 * HELD_S

    assert run(work) == (["h"], ["a", "l"], True)


def test_refused_groups_that_take_long_let_the_others_pass_and_one_of_them_is_always_decided() -> None:
    async def work(queue: GroupQueue) -> object:
        for group in ("h1", "h2", "h3"):
            queue.set_aside(group)
        queue.retry()
        queue.add(["l1"])
        passes = []
        for _ in range(3):
            taken = await queue.take(10)
            passes.append([group for group in taken if queue.in_time((group,))])
        return passes

    assert run(work, is_slow=True) == [["h1", "l1"], ["h2"], ["h3"]]
