"""Virtual time: an event loop that jumps to the next timer instead of waiting for it.

Every wait in a simulation is a timer of its loop, so only timers advance the clock, and an hour of simulated time takes
only the time of its computation.
"""

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any, TypeVar

from skep.model.times import SECOND_NS

T = TypeVar("T")

EPOCH_NS = 1_700_000_000 * SECOND_NS
"""Start of the simulated wall clock (November 2023)."""


class Deadlock(Exception):
    """A task waits, and there is no timer or ready callback left."""


class Spinning(Exception):
    """The limit of iterations is reached: a busy loop, in which hardly any time passes."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time, beginning at 0."""

    def __init__(self, turns_max: int | None = None) -> None:
        """``turns_max``: number of iterations after which ``Spinning`` is raised, once; None: no limit."""
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
        """Run ``func`` at once, since a thread would run in real time."""
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
        """Number of pending timers."""
        return sum(not timer.cancelled() for timer in self._scheduled)  # type: ignore[attr-defined]

    def turn(self) -> None:
        """Count an iteration of the loop.  Raises: Spinning."""
        if self._turns_left is None:
            return
        self._turns_left -= 1
        if self._turns_left < 0:
            self._turns_left = None  # so that the clean-up can run
            raise Spinning(f"the limit of iterations of the event loop is reached, at {self._now:.3f} s")


class _NumberedTask(asyncio.Task[Any]):
    """A task hashed by its number instead of its address: task groups then cancel in the same order in every run."""

    def __init__(self, number: int, work: Any, **rest: Any) -> None:
        self._number = number
        super().__init__(work, **rest)

    def __hash__(self) -> int:
        return self._number


class _JumpingSelector(selectors.SelectSelector):
    """Does not wait: advances the loop's clock by the timeout.

    File descriptors are not polled, which saves a system call in every iteration; a simulation has none.
    """

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._loop.turn()
        if timeout is None:
            raise Deadlock("every task waits, and no timer is pending")
        if timeout > 0:
            self._loop.jump(timeout)
        return []


class VirtualClock:
    """The clocks of a simulated machine.  Implements ``aio.clock.Clock``.

    Clocks differ between machines: ``drift`` is the number of seconds that this machine counts per second of the loop,
    ``began_s`` the initial value of its monotonic clock, and ``wall_off_s`` the error of its wall clock, which may
    change at any time.
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
        """``wait_running``: returns once the machine is not frozen."""
        self.wall_off_s = wall_off_s
        self.suspended_s = 0.0
        """Total time for which the machine was suspended; its monotonic clock did not advance."""
        self._loop = loop
        self._drift = drift
        self._began_s = began_s
        self._wait_running = wait_running

    def now_ns(self) -> int:
        return EPOCH_NS + round((self._loop.time() + self.wall_off_s) * SECOND_NS)

    def monotonic(self) -> float:
        return self.since_boot() - self.suspended_s

    def since_boot(self) -> float:
        """Monotonic time including suspension."""
        return self._began_s + self._loop.time() * self._drift

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(seconds, 0.0) / self._drift)
        if self._wait_running is not None:
            await self._wait_running()
