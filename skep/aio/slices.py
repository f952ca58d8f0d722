"""Long work in slices: everything else gets its turn in between."""

import asyncio
from collections.abc import Generator, Iterable
from typing import TypeAlias, TypeVar

from skep.aio.clock import Clock

T = TypeVar("T")

Sliced: TypeAlias = Generator[None, None, T]
"""Work that may be paused wherever it yields, and returns its result."""

STEP = 100
"""Things between two places where work may be paused: of a few microseconds each."""

SLICE_S = 0.005
"""How long is worked before others get their turn: several such works at a time still leave a request quick."""


class Slices:
    """Of one piece of work that goes through many things.  Ask ``give_way`` after each of them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = clock.monotonic()

    async def give_way(self) -> None:
        """Let others run if the present slice is over."""
        if self._clock.monotonic() - self._began >= SLICE_S:
            await asyncio.sleep(0)
            self._began = self._clock.monotonic()


def finished(work: Sliced[T]) -> T:
    """The result of ``work``, in one go."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


async def go_through(work: Iterable[None], clock: Clock) -> None:
    """Do all of ``work``; everything else gets its turn meanwhile."""
    slices = Slices(clock)
    for _ in work:
        await slices.give_way()


async def in_slices(work: Sliced[T], clock: Clock) -> T:
    """The result of ``work``; everything else gets its turn meanwhile."""
    slices = Slices(clock)
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result
        await slices.give_way()


def paused(things: Iterable[T], into: "list[T]") -> Sliced[None]:
    """Collect ``things`` that take their time to come about."""
    for number, thing in enumerate(things, 1):
        into.append(thing)
        if number % STEP == 0:
            yield
