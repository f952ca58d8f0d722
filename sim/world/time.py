"""Virtual time: an event loop that jumps to the next timer instead of waiting for it.

Every wait in a simulation is a timer of its loop, so only timers advance the clock.  An hour of simulated time takes
only the time of its computation.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf
from typing import Any, TypeVar

from skep.model.values.times import SECOND_NS

T = TypeVar("T")

EPOCH_NS = 1_700_000_000 * SECOND_NS
"""Start of the simulated wall clock (November 2023)."""
RESOLUTION_S = time.get_clock_info("monotonic").resolution
JUMP_S_MAX = 24 * 3600.0
TURNS_PERIOD_S = 120.0
"""Seconds after which iterations are counted from 0 again, because a long run with crashing containers has many.
"""
CANCELLED_MIN = 100
CANCELLED_SHARE = 0.5
"""Share of cancelled timers at which the heap is cleaned up, as in asyncio's loops."""


class Deadlock(Exception):
    """A task waits, and no timer or ready callback is left."""


class Spinning(Exception):
    """The limit of iterations is reached in a busy loop, in which hardly any time passes."""


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop on virtual time, beginning at 0.

    Callbacks run in the order of asyncio's own loop, without its system calls and debugging.  Two thirds of a run's
    iterations do next to nothing, so the cost of an iteration matters.
    """

    def __init__(self, turns_max: int | None = None, seed: int = 0) -> None:
        """Create a loop at time 0.

        Args:
            turns_max: number of iterations within ``TURNS_PERIOD_S`` after which ``Spinning`` is raised once, or None
                for no limit.
            seed: Seed of ``random``, which back-offs without their own source use.
        """
        random.seed(seed)
        self._now = 0.0
        self._turns_max = self._turns_left = inf if turns_max is None else turns_max
        self._period_ends = TURNS_PERIOD_S
        self._due: deque[_Call] = deque()
        self._timers: list[tuple[float, _Timer]] = []
        """A heap like asyncio's: timers of the same instant run in the order in which its loop would run them."""
        self._cancelled_timers = 0
        self.wakeups = 0
        """Number of moments at which timers have run."""
        self._woke_at = 0.0
        self._stopping = False
        super().__init__()
        self._numbers = count()

    def time(self) -> float:
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> "_Call":
        # An empty context is false, and a task has to keep its own.
        call = _Call(callback, args, copy_context() if context is None else context)
        self._due.append(call)
        return call

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> "_Call":
        return self.call_soon(callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> "_Timer":
        timer = _Timer(when, callback, args, copy_context() if context is None else context, self)
        heappush(self._timers, (when, timer))
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> "_Timer":
        return self.call_at(self._now + delay, callback, *args, context=context)

    def create_task(  # type: ignore[override]
        self, work: Any, *, name: str | None = None, context: Context | None = None
    ) -> "_NumberedTask":
        return _NumberedTask(next(self._numbers), work, loop=self, name=name, context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> "asyncio.Future[T]":
        """Run ``func`` at once, because a thread would run in real time."""
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
        """Return the number of pending timers."""
        return sum(not timer.cancelled() for _, timer in self._timers)

    def timer_cancelled(self) -> None:
        """Record that a timer in the heap was cancelled."""
        self._cancelled_timers += 1

    def _run_once(self) -> None:
        """Run iterations of the loop until it is stopped.  ``run_forever`` calls this.  Raises: Deadlock, Spinning."""
        due, take = self._due, self._due.popleft
        while True:
            timers = self._timers
            if timers and (timers[0][1].is_cancelled or len(timers) > CANCELLED_MIN):
                self._forget_cancelled()
            self._turns_left -= 1
            if self._turns_left < 0 or not (due or self._stopping):
                self._wait()
            timers, until = self._timers, self._now + RESOLUTION_S
            while timers and timers[0][0] < until:
                timer = heappop(timers)[1]
                timer.is_scheduled = False
                if not timer.is_cancelled and self._now > self._woke_at:
                    self.wakeups, self._woke_at = self.wakeups + 1, self._now
                due.append(timer)
            # Run only these callbacks.  Callbacks that they schedule run in the next iteration.
            for _ in range(len(due)):
                call = take()
                if call.is_cancelled:
                    continue
                try:
                    call.context.run(call.callback, *call.args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    text = f"Exception in callback {call.callback}"
                    self.call_exception_handler({"message": text, "exception": error, "handle": call})
            if self._stopping:
                return

    def _forget_cancelled(self) -> None:
        """Remove cancelled timers from the head of the heap, or all if there are many, as asyncio does."""
        timers = self._timers
        if len(timers) > CANCELLED_MIN and self._cancelled_timers / len(timers) > CANCELLED_SHARE:
            for _, timer in timers:
                timer.is_scheduled = not timer.is_cancelled
            self._timers = [entry for entry in timers if entry[1].is_scheduled]
            heapify(self._timers)
            self._cancelled_timers = 0
            return
        while timers and timers[0][1].is_cancelled:
            self._cancelled_timers -= 1
            heappop(timers)[1].is_scheduled = False

    def _wait(self) -> None:
        """Advance the clock to the next timer.  Raises: Deadlock; Spinning: the iterations are used up."""
        if self._turns_left < 0:
            self._turns_max = self._turns_left = inf  # so that the clean-up can run
            raise Spinning(f"the limit of iterations of the event loop is reached, at {self._now:.3f} s")
        if not self._timers:
            raise Deadlock("every task waits, and no timer is pending")
        left_s = self._timers[0][0] - self._now
        if left_s > 0:
            self._now += min(left_s, JUMP_S_MAX)
        if self._now >= self._period_ends:
            self._turns_left, self._period_ends = self._turns_max, self._now + TURNS_PERIOD_S


class _Call(asyncio.Handle):
    """A callback that is due, without the debugging data of asyncio's handles."""

    __slots__ = ("args", "callback", "context", "is_cancelled")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Context) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True
        self.callback, self.args = _nothing, ()

    def cancelled(self) -> bool:
        return self.is_cancelled

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.callback}>"


class _Timer(_Call):
    """A callback at a time of the loop."""

    __slots__ = ("_at_s", "_loop_of", "is_scheduled")

    def __init__(
        self,
        at_s: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: Context,
        loop: VirtualLoop,
    ) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.is_cancelled = False
        self.is_scheduled = True
        """Whether it is in the loop's heap."""
        self._at_s = at_s
        self._loop_of = loop

    def when(self) -> float:
        return self._at_s

    def cancel(self) -> None:
        if not self.is_cancelled and self.is_scheduled:
            self._loop_of.timer_cancelled()
        super().cancel()

    def __lt__(self, other: object) -> bool:
        return False  # only called when the times are equal


class _NumberedTask(asyncio.Task[Any]):
    """A task hashed by its number instead of its address, so that task groups cancel in the same order in every
    run.
    """

    def __init__(self, number: int, work: Any, **rest: Any) -> None:
        self._number = number
        super().__init__(work, **rest)

    def __hash__(self) -> int:
        return self._number


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
        """Return the monotonic time including suspension."""
        return self._began_s + self._loop.time() * self._drift

    def loop_time_after(self, seconds: float) -> float:
        """Return the loop's time once this clock has counted ``seconds`` from now."""
        return self._loop.time() + seconds / self._drift

    async def sleep(self, seconds: float) -> None:
        if seconds > 0:
            loop = self._loop
            woken = loop.create_future()
            # Real clocks move on meanwhile.  Without that, a caller that waits for the last rounding error of a
            # difference would wait for ever.
            delay_s = max(seconds / self._drift, RESOLUTION_S)
            timer = loop.call_at(loop.time() + delay_s, _wake, woken)
            try:
                await woken
            except BaseException:
                timer.cancel()
                raise
        else:
            await asyncio.sleep(0)
        if self._wait_running is not None:
            await self._wait_running()


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _nothing() -> None:
    """Do nothing, as the callback of a cancelled call."""
