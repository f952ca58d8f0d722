"""Virtual time: an event loop that jumps to the next timer instead of waiting for it.

Everything in a simulation that waits does so by a timer of its loop, so nothing else passes time; a run of an hour
takes as long as its computation.
"""

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any, TypeVar

from skep.model.times import SECOND_NS

T = TypeVar("T")

EPOCH_NS = 1_700_000_000 * SECOND_NS
"""Where the simulated wall clock starts (November 2023)."""


class Deadlock(Exception):
    """Somebody waits, and nothing will ever happen."""


class Spinning(Exception):
    """More has happened than ever should: somebody works without end, and hardly any time passes."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time, beginning at 0."""

    def __init__(self, turns_max: int | None = None) -> None:
        """``turns_max``: after so many turns ``Spinning`` is raised, once; None: never."""
        self._now = 0.0
        self._turns_left = turns_max
        super().__init__(_JumpingSelector(self))
        numbers = count()
        self.set_task_factory(
            lambda loop, work, **rest: _NumberedTask(next(numbers), work, loop=loop, **rest)
        )

    def time(self) -> float:
        return self._now

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> "asyncio.Future[T]":
        """Threads would run in real time: the work is done at once instead."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def jump(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds

    def timers(self) -> int:
        """How many wait for their time."""
        return sum(not timer.cancelled() for timer in self._scheduled)  # type: ignore[attr-defined]

    def turn(self) -> None:
        """The loop turns once more.  Raises: Spinning."""
        if self._turns_left is None:
            return
        self._turns_left -= 1
        if self._turns_left < 0:
            self._turns_left = None  # what is left is to end in peace
            raise Spinning(f"more turns of the loop than a life may take, at {self._now:.3f} s")


class _NumberedTask(asyncio.Task[Any]):
    """A task that lies in sets by its number, not by its address: groups then cancel in the same order each time."""

    def __init__(self, number: int, work: Any, **rest: Any) -> None:
        self._number = number
        super().__init__(work, **rest)

    def __hash__(self) -> int:
        return self._number


class _JumpingSelector(selectors.SelectSelector):
    """Waits for nothing: the time it was told to wait passes on the loop's clock.

    Files are never looked at, which saves a system call at every turn of the loop; a simulation has none.
    """

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._loop.turn()
        if timeout is None:
            raise Deadlock("nothing is left that could happen")
        if timeout > 0:
            self._loop.jump(timeout)
        return []


class VirtualClock:
    """The clocks of a simulated machine.  Implements ``aio.clock.Clock``.

    No two machines agree: ``drift`` is how many seconds this machine counts per real one, its monotonic clock began
    at its own time, and its wall clock is off by ``wall_off_s``, which may change at any time.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        *,
        drift: float = 1.0,
        began_s: float = 0.0,
        wall_off_s: float = 0.0,
        wait_running: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """``wait_running``: returns while the machine is not frozen."""
        self.wall_off_s = wall_off_s
        self.suspended_s = 0.0
        """How long the machine has been suspended: its monotonic clock stood still."""
        self._loop = loop
        self._drift = drift
        self._began_s = began_s
        self._wait_running = wait_running

    def now_ns(self) -> int:
        return EPOCH_NS + round((self._loop.time() + self.wall_off_s) * SECOND_NS)

    def monotonic(self) -> float:
        return self.since_boot() - self.suspended_s

    def since_boot(self) -> float:
        """Goes on while the machine is suspended."""
        return self._began_s + self._loop.time() * self._drift

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(seconds, 0.0) / self._drift)
        if self._wait_running is not None:
            await self._wait_running()
