"""Whose layer is unpacked next."""

import asyncio
from collections.abc import Callable

from skep.engine.images.archives.slots import UnpackSlots

NEVER = 1e6


class Unpacking:
    """Layers that take until they are released; ``order``: those that began."""

    def __init__(self, slots: UnpackSlots) -> None:
        self._turns = slots
        self.order: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}

    def ask(self, *layers: str) -> None:
        for layer in layers:
            self._ends[layer] = asyncio.Event()
            self.tasks[layer] = asyncio.create_task(self._work(layer))

    async def _work(self, layer: str) -> None:
        async with self._turns.of(layer[0]):
            self.order.append(layer)
            await self._ends[layer].wait()

    async def end(self, *layers: str) -> None:
        for layer in layers:
            self._ends[layer].set()
            await self.tasks[layer]
        await settled(lambda: True)

    async def close(self) -> None:
        for end in self._ends.values():
            end.set()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


async def settled(condition: Callable[[], object]) -> None:
    """Let every runnable task run."""
    async with asyncio.timeout(10):
        for _ in range(20):
            await asyncio.sleep(0)
        while not condition():  # noqa: ASYNC110  # there is no event
            await asyncio.sleep(0)


async def test_an_image_alone_has_all_slots_and_others_precede_its_further_layers() -> None:
    work = Unpacking(UnpackSlots(3, patience_s=NEVER, slow_max=6))
    work.ask("a1", "a2", "a3", "a4", "a5")
    await settled(lambda: work.order == ["a1", "a2", "a3"])
    work.ask("b1", "c1")
    await work.end("a1")
    assert work.order[3:] == ["b1"]
    await work.end("a2")
    assert work.order[4:] == ["c1"]
    await work.end("a3")
    assert work.order[5:] == ["a4"]
    await work.close()


async def test_layers_that_never_end_do_not_delay_others() -> None:
    """Three images with layers without end, and many of them: the next one has a place at once."""
    work = Unpacking(UnpackSlots(3, patience_s=0, slow_max=6))
    work.ask(*(f"{image}{number}" for image in "xyz" for number in range(2)))
    await settled(lambda: len(work.order) == 6)
    work.ask("a1")
    await settled(lambda: "a1" in work.order)
    await work.end("a1")
    await work.close()


async def test_slow_ones_are_bounded_and_their_room_is_given_back() -> None:
    work = Unpacking(UnpackSlots(1, patience_s=0, slow_max=2))
    work.ask("a1", "b1", "c1", "d1", "e1")
    await settled(lambda: len(work.order) == 3)
    await settled(lambda: True)
    assert work.order == ["a1", "b1", "c1"]
    await work.end("a1")
    await settled(lambda: len(work.order) == 4)
    await work.end("c1", "d1", "b1")
    await settled(lambda: len(work.order) == 5)
    await work.end("e1")
    slots = work._turns
    assert (slots.free, slots.slow_left, slots.overdue, slots.waiting) == (1, 2, [], [])
    assert not slots.working


async def test_a_cancelled_waiter_takes_no_slot() -> None:
    work = Unpacking(UnpackSlots(1, patience_s=NEVER, slow_max=0))
    work.ask("a1", "b1", "c1")
    await settled(lambda: work.order == ["a1"])
    work.tasks["b1"].cancel()
    await settled(lambda: work.tasks["b1"].done())
    await work.end("a1")
    assert work.order == ["a1", "c1"]
    await work.close()
