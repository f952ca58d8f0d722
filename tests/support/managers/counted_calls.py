"""Counts calls between the pauses of sliced work.  The count is the same on any machine, however busy."""

import gc
import sys
from asyncio import Handle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import CO_COROUTINE, CO_GENERATOR
from types import CodeType, FrameType
from typing import Any


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


class Calls:
    """The calls of some functions with their arguments, in order."""

    def __init__(self, functions: Iterable[Any]) -> None:
        self._by_code: dict[CodeType, list[Mapping[str, Any]]] = {one.__code__: [] for one in functions}
        self._generators: set[FrameType] = set()

    def of(self, function: Any) -> Sequence[Mapping[str, Any]]:
        return self._by_code[function.__code__]

    def __len__(self) -> int:
        return sum(map(len, self._by_code.values()))

    def clear(self) -> None:
        for calls in self._by_code.values():
            calls.clear()

    def note(self, frame: FrameType, event: str, argument: object) -> None:
        calls = self._by_code.get(frame.f_code)
        if calls is None or event != "call" or frame in self._generators:
            return
        calls.append(dict(frame.f_locals))
        if frame.f_code.co_flags & (CO_GENERATOR | CO_COROUTINE):  # each step is an event
            self._generators.add(frame)


@contextmanager
def calls_of(*functions: Callable[..., object]) -> Iterator[Calls]:
    """Note the calls of ``functions`` in this thread.  Nothing is replaced."""
    calls = Calls(functions)
    sys.setprofile(calls.note)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def calls_in(work: Callable[[], object]) -> int:
    """Return the number of function calls of ``work``, including built-in functions."""

    def once() -> Iterator[None]:
        work()
        yield

    return most_calls_between_pauses(once())


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
