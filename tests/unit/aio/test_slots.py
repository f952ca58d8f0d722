"""How many builds work, and wait, at one time."""

import asyncio

import pytest

from skep.aio.slots import OWN_MAX, Slots
from skep.errors import ResourceExhausted
from tests.support.managers.wire_rig import until


async def test_builds_beyond_the_slots_wait_in_their_order_and_beyond_the_bound_are_refused() -> None:
    slots, begun, ends = (
        Slots(2, 2, "builds are at work on this node"),
        list[int](),
        [asyncio.Event() for _ in range(4)],
    )

    async def build(number: int) -> None:
        async with slots.hold():
            begun.append(number)
            await ends[number].wait()

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(build(number))
        await asyncio.sleep(0)
        assert begun == [0, 1]
        with pytest.raises(ResourceExhausted, match="2 builds are at work on this node and 2 wait"):
            await build(9)
        ends[1].set()
        await until(lambda: len(begun) == 3)
        assert begun == [0, 1, 2]
        for end in ends:
            end.set()
    assert begun == [0, 1, 2, 3]


async def test_a_build_that_is_cancelled_while_it_waits_leaves_its_place_to_another() -> None:
    slots = Slots(1, 1, "builds are at work on this node")

    async def build() -> str:
        async with slots.hold():
            return "built"

    async with slots.hold():
        waiting = asyncio.create_task(build())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        next_one = asyncio.create_task(build())
        await asyncio.sleep(0)
    assert await next_one == "built"


async def test_one_owner_has_one_slot_or_place_and_others_get_theirs() -> None:
    slots, begun, end = Slots(2, 1, "plans are made"), list[str](), asyncio.Event()

    async def plan(owner: str) -> None:
        async with slots.hold_share(owner):
            begun.append(owner)
            await end.wait()

    async with asyncio.TaskGroup() as group:
        first = [group.create_task(plan("ann")) for _ in range(OWN_MAX)]
        await asyncio.sleep(0)
        with pytest.raises(
            ResourceExhausted, match="3 of your requests wait: try again when they have ended"
        ):
            await plan("ann")
        assert (begun, slots.waiting) == (["ann"], 0)
        group.create_task(plan("bob"))
        await until(lambda: begun == ["ann", "bob"])
        first[1].cancel()
        await asyncio.wait([first[1]])
        group.create_task(plan("ann"))
        end.set()
    assert sorted(begun) == ["ann", "ann", "ann", "bob"]
    async with slots.hold_share("ann"):
        pass
