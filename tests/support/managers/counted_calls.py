"""Counts calls between the pauses of sliced work.  The count is the same on any machine, however busy."""

import gc
import sys
from asyncio import Handle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType


def most_calls_between_pauses(work: Iterable[object]) -> int:
    """Return the largest number of function calls between two pauses, including built-in functions."""
    most = calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    gc.collect()  # finalizers of objects from earlier tests would count
    gc.disable()
    sys.setprofile(count)
    try:
        for _ in work:
            most, calls = max(most, calls), 0
    finally:
        sys.setprofile(None)
        gc.enable()
    return max(most, calls)


@contextmanager
def calls_of(*functions: Callable[..., object]) -> Iterator[list[str]]:
    """Yield a list that gets the name of each of ``functions`` whenever it is called.  They must not be generators."""
    names = {getattr(one, "__code__"): one.__qualname__ for one in functions}  # noqa: B009 -- not of each callable
    called: list[str] = []

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code in names:
            called.append(names[frame.f_code])

    sys.setprofile(count)
    try:
        yield called
    finally:
        sys.setprofile(None)


@contextmanager
def counting_calls_of_callbacks() -> Iterator[list[int]]:
    """Count the calls within each callback of the event loop.  No other work runs in between."""
    counts = [0]

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code is Handle._run.__code__:
            counts.append(0)
        counts[-1] += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        yield counts
    finally:
        sys.setprofile(None)
