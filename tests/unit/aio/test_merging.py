"""Merging sources in the order of their keys."""

import asyncio
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from skep.aio.merging import MergeQueue

Item = tuple[str, int, int]
"""Source, key, and number within the source."""


def a_queue(most: int = 100) -> MergeQueue[Item]:
    return MergeQueue(lambda item: item[1], most)


def items(source: str, *keys: int) -> list[Item]:
    return [(source, key, number) for number, key in enumerate(keys)]


async def test_an_item_is_given_once_no_source_can_bring_an_earlier_one() -> None:
    queue = a_queue()
    queue.open("a")
    queue.open("b")
    await queue.put("a", items("a", 1, 4))
    assert queue.take(9) == []
    assert queue.is_holding
    await queue.put("b", items("b", 2, 3))
    assert [key for _, key, _ in queue.take(9)] == [1, 2, 3]
    queue.end("b")
    assert [key for _, key, _ in queue.take(9)] == [4]
    assert not queue.is_holding


async def test_a_source_that_brings_nothing_is_passed_over_until_it_brings_something() -> None:
    queue = a_queue()
    queue.open("a")
    queue.open("b")
    await queue.put("a", items("a", 1))
    queue.pass_over()
    assert queue.take(9) == items("a", 1)
    await queue.put("b", items("b", 5))
    assert queue.take(9) == []
    await queue.put("a", items("a", 7))
    assert queue.take(9) == items("b", 5)


async def test_what_goes_back_in_time_stays_in_the_order_of_its_source() -> None:
    queue = a_queue()
    queue.open("a")
    queue.open("b")
    await queue.put("a", items("a", 5, 2))
    await queue.put("a", items("a", 1, 6))
    await queue.put("b", items("b", 3, 9))
    assert [key for _, key, _ in queue.take(9)] == [3, 5, 2, 1, 6]


async def test_only_a_source_that_the_others_wait_for_adds_to_a_full_queue() -> None:
    queue = a_queue(2)
    queue.open("a")
    queue.open("b")
    await queue.put("a", items("a", 1, 2))
    waiting = asyncio.ensure_future(queue.put("a", items("a", 3)))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert await queue.put("b", items("b", 0, 9))
    assert [key for _, key, _ in queue.take(9)] == [0, 1, 2]
    assert await waiting
    stuck = asyncio.ensure_future(queue.put("b", items("b", 10)))
    await asyncio.sleep(0)
    queue.close()
    assert not await stuck


async def test_a_source_that_is_not_waited_for_holds_up_nothing() -> None:
    queue = a_queue()
    await queue.put("a", items("a", 9))
    assert queue.take(9) == items("a", 9)
    assert not queue.is_waiting


@given(
    st.lists(st.lists(st.integers(0, 20).map(abs), max_size=12).map(sorted), min_size=1, max_size=5),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
def test_whatever_comes_in_pieces_is_given_in_order_and_whole(
    sources: list[list[int]], most: int, random: Random
) -> None:
    asyncio.run(_merged_in_order(sources, most, random))


async def _merged_in_order(sources: list[list[int]], most: int, random: Random) -> None:
    queue: MergeQueue[Item] = a_queue(most)
    for number in range(len(sources)):
        queue.open(number)

    async def bring(number: int) -> None:
        left = items(str(number), *sources[number])
        while left:
            size = random.randint(1, 3)
            assert await queue.put(number, left[:size])
            left = left[size:]
            for _ in range(random.randint(0, 2)):
                await asyncio.sleep(0)
        queue.end(number)

    found: list[Item] = []
    async with asyncio.TaskGroup() as group:
        for number in range(len(sources)):
            group.create_task(bring(number))
        while queue.is_waiting or queue.is_holding:
            await queue.wait_update()
            while taken := queue.take(most):
                found += taken
    while taken := queue.take(most):
        found += taken
    assert [key for _, key, _ in found] == sorted(key for keys in sources for key in keys)
    for number, keys in enumerate(sources):
        assert [item for item in found if item[0] == str(number)] == items(str(number), *keys)
