"""Clocks for code that measures how long it works."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Final, ParamSpec

from sim.world.time import VirtualClock, VirtualLoop
from skep.aio.clock import SystemClock
from skep.aio.time_slices import SLICE_S

P = ParamSpec("P")

STEP_S: Final = 2 * SLICE_S


class PausingClock(SystemClock):
    """A clock that moves on with every reading, so that each time slice is over when it is checked."""

    def __init__(self, step_s: float = STEP_S) -> None:
        self._step_s = step_s
        self._ahead_s = 0.0

    def monotonic(self) -> float:
        self._ahead_s += self._step_s
        return super().monotonic() + self._ahead_s


class PausingVirtualClock(VirtualClock):
    """The same on virtual time."""

    def __init__(self, loop: VirtualLoop, step_s: float = STEP_S) -> None:
        super().__init__(loop)
        self._step_s = step_s
        self._ahead_s = 0.0

    def monotonic(self) -> float:
        self._ahead_s += self._step_s
        return super().monotonic() + self._ahead_s


class FastClock(SystemClock):
    """A clock that is faster than the machine's, so that pauses are short."""

    def __init__(self, times: float) -> None:
        self._times = times

    def monotonic(self) -> float:
        return super().monotonic() * self._times

    async def sleep(self, seconds: float) -> None:
        await super().sleep(seconds / self._times)


def on_virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test on virtual time, in which its pauses take no time."""

    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        loop = VirtualLoop()
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(test(*args, **kwargs))
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    return run
