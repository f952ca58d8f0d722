"""Divides long computations into time slices, between which the event loop runs other tasks."""

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterable
from typing import TypeAlias, TypeVar

from skep.aio.clock import Clock

T = TypeVar("T")
P = TypeVar("P")

SlicedWork: TypeAlias = Generator[None, None, T]
"""Work that can pause wherever it yields, and returns its result."""

STEP = 100
"""Number of items, of a few microseconds each, between two points at which work can pause."""

SLICE_S = 0.005
"""Length of a slice.  It is so short that requests stay fast even during several such computations."""


class TimeSlices:
    """Time slices of one computation, which awaits ``yield_if_due`` after each item."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = clock.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether the current slice is over."""
        return self._clock.monotonic() - self._began >= SLICE_S

    async def yield_if_due(self) -> bool:
        """Let other tasks run if the current slice is over.  Return whether it was."""
        if not self.is_over:
            return False
        await asyncio.sleep(0)
        self._began = self._clock.monotonic()
        return True


def run_at_once(work: SlicedWork[T]) -> T:
    """Return the result of ``work``, without pauses."""
    results: list[T] = []
    for _ in _collecting(work, results):
        pass
    return results[0]


def pausing(work: SlicedWork[T], pause: P) -> Generator[P, None, T]:
    """Run ``work``, and yield ``pause`` wherever it may pause."""
    results: list[T] = []
    for _ in _collecting(work, results):
        yield pause
    return results[0]


def _collecting(work: SlicedWork[T], results: list[T]) -> Generator[None, None, None]:
    """Run ``work``, and append its result to ``results``."""
    results.append((yield from work))


async def run_in_slices(work: Iterable[None], clock: Clock) -> None:
    """Do all of ``work`` and let other tasks run in between."""
    slices = TimeSlices(clock)
    for _ in work:
        await slices.yield_if_due()


async def result_in_slices(
    work: SlicedWork[T], clock: Clock, resumed: Callable[[], Awaitable[object]] | None = None
) -> T:
    """Return the result of ``work`` and let other tasks run in between.  Awaits ``resumed`` after each pause."""
    slices = TimeSlices(clock)
    results: list[T] = []
    for _ in _collecting(work, results):
        if await slices.yield_if_due() and resumed is not None:
            await resumed()
    return results[0]


def collect_in_slices(things: Iterable[T], into: "list[T]") -> SlicedWork[None]:
    """Collect ``things``, which are expensive to compute."""
    for number, thing in enumerate(things, 1):
        into.append(thing)
        if number % STEP == 0:
            yield
