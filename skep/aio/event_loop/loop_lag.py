"""Event loop lag: the delay between the scheduled and the actual run of tasks.

It has three causes, which the kernel's accounting of the thread distinguishes.  The thread *ran*: a callback computed
for too long, a bug of this program.  It *waited for a processor*: the machine is busy with something else.  Or it
*slept*: a callback made a blocking call, or another thread held the interpreter's lock.  Without scheduler statistics
(``/proc/PID/schedstat``) the last two cannot be distinguished, and the log says so.
"""

import os
import sys
import threading
import time
from bisect import bisect_left
from itertools import accumulate
from types import FrameType, TracebackType

import msgspec
import structlog

from skep.aio.clock import Clock, until_tick

log = structlog.get_logger()

PERIOD_S = 0.05
"""Interval between measurements while the thread is busy."""

PERIOD_AT_REST_S = 1.0
"""Interval while the thread is idle.  Twenty measurements a second took a tenth of an idle manager's processor time."""

IDLE_SHARE = 0.1
"""Share of a processor below which a thread counts as idle.  A single callback of ``LATE_S`` exceeds it in either
interval.
"""

LATE_S = 0.1
"""Shortest lag that is logged."""


FRAMES_MAX = 8
"""Largest number of stack frames in a log line."""

RAN, WAITED, SLEPT = "ran", "waited for a processor", "slept"
"""The causes of a lag."""
WAITED_OR_SLEPT = "waited for a processor or slept: the kernel has no scheduler statistics"
"""The cause of a lag in which the thread did not run, if the kernel does not tell more."""

BOUNDS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Upper bounds of the histogram's buckets."""


class Lag(msgspec.Struct, frozen=True, rename="pascal"):
    """A histogram of lags.  ``counts`` has the number of measurements up to each of ``bounds_ms``, and last the number
    of all larger ones.
    """

    looks: int
    ms_max: float
    ms_sum: float
    ms_p999: float
    """Rounded up to one of ``bounds_ms``, at most the largest lag."""
    bounds_ms: tuple[int, ...]
    counts: tuple[int, ...]


class LoopLag:
    """Measures the lag of its event loop.  To describe a period, subtract the counts of two calls of ``seen``."""

    def __init__(self, times: "ThreadTimes | None" = None) -> None:
        """``times`` belong to the thread that runs the loop."""
        self._times = times or ThreadTimes()
        self._counts = [0] * (len(BOUNDS_MS) + 1)
        self._ms_max = 0.0
        self._ms_sum = 0.0

    async def run(self, clock: Clock) -> None:
        """Measure until cancelled.  Logs a lag of ``LATE_S``, with its cause and the loop's stack."""
        with StackWatch() as watch, self._times as times:
            spent, period_s = times.read(), PERIOD_S
            while True:
                before = clock.monotonic()
                pause_s = until_tick(before, period_s)
                await clock.sleep(pause_s)
                lag_s = clock.monotonic() - before - pause_s
                self.note(lag_s)
                last, spent = spent, times.read()
                is_idle = lag_s < LATE_S and spent[0] - last[0] < IDLE_SHARE * pause_s
                period_s = PERIOD_AT_REST_S if is_idle else PERIOD_S
                stood = watch.turn(period_s)
                if lag_s >= LATE_S:
                    waited_s = None if spent[1] is None or last[1] is None else spent[1] - last[1]
                    _tell(lag_s, spent[0] - last[0], waited_s, stood)

    async def sample(self, clock: Clock, period_s: float) -> None:
        """Measure every ``period_s`` until cancelled, without logs: for a process that has to be cheap when idle."""
        while True:
            before = clock.monotonic()
            pause_s = until_tick(before, period_s)
            await clock.sleep(pause_s)
            self.note(clock.monotonic() - before - pause_s)

    def note(self, lag_s: float) -> None:
        """Count one measurement of ``lag_s``."""
        lag_ms = max(lag_s * 1000, 0.0)
        self._counts[bisect_left(BOUNDS_MS, lag_ms)] += 1
        self._ms_max = max(self._ms_max, lag_ms)
        self._ms_sum += lag_ms

    def seen(self) -> Lag:
        """Return the histogram of all measurements so far."""
        looks = sum(self._counts)
        needed = looks - looks // 1000
        place = next(place for place, reached in enumerate(accumulate(self._counts)) if reached >= needed)
        bound = BOUNDS_MS[place] if place < len(BOUNDS_MS) else self._ms_max
        return Lag(
            looks=looks,
            ms_max=self._ms_max,
            ms_sum=self._ms_sum,
            ms_p999=min(bound, self._ms_max),
            bounds_ms=BOUNDS_MS,
            counts=tuple(self._counts),
        )


class ThreadTimes:
    """Times of the current thread.

    Source: Linux, Documentation/scheduler/sched-stats.rst.  The file is missing without CONFIG_SCHED_INFO.  It contains
    zeros with CONFIG_TASK_DELAY_ACCT alone, as long as delay accounting is off (sched_info_on in kernel/sched/stats.h).
    """

    def __init__(self, path: str = "/proc/thread-self/schedstat") -> None:
        self._path = path

    def __enter__(self) -> "ThreadTimes":
        try:
            self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = -1
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)

    def read(self) -> tuple[float, float | None]:
        """Return the seconds that the thread ran, and waited for a processor while runnable, since its start.

        The second value is None if the kernel does not know it.
        """
        return time.thread_time(), self._waited_s()

    def _waited_s(self) -> float | None:
        if self._file < 0:
            return None
        _, waited_ns, slices = os.pread(self._file, 100, 0).split()
        return int(waited_ns) / 1e9 if int(slices) else None


class StackWatch:
    """Watches the thread that created it, and records that thread's stack if it has not called ``turn`` in time."""

    def __init__(self) -> None:
        self.stood: tuple[str, ...] = ()
        """The watched thread's stack when it was first late, innermost frame first.  Empty if it was not."""
        self._turns = 0
        self._period_s = PERIOD_S
        self._watched = threading.get_ident()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loop lag", daemon=True)

    def __enter__(self) -> "StackWatch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def turn(self, period_s: float) -> tuple[str, ...]:
        """Return the recorded stack, if the watched thread was late.

        The watched thread calls this, and again after ``period_s``.
        """
        self._turns += 1
        self._period_s = period_s
        stood, self.stood = self.stood, ()
        return stood

    def _run(self) -> None:
        seen = -1
        while not self._stopped.wait(2 * self._period_s):
            if self._turns == seen and not self.stood:
                self.stood = stack_of(sys._current_frames().get(self._watched))
            seen = self._turns


def stack_of(frame: FrameType | None) -> tuple[str, ...]:
    """Return the places of a frame and its callers, innermost first, such as ``module.py:12 name``."""
    places: list[str] = []
    while frame is not None and len(places) < FRAMES_MAX:
        code = frame.f_code
        places.append(f"{os.path.basename(code.co_filename)}:{frame.f_lineno} {code.co_qualname}")
        frame = frame.f_back
    return tuple(places)


def cause(lag_s: float, ran_s: float, waited_s: float | None) -> str:
    """Return the main cause of a lag.  ``waited_s`` is None if the kernel does not know it."""
    if waited_s is None:
        return RAN if ran_s >= lag_s - ran_s else WAITED_OR_SLEPT
    parts = {RAN: ran_s, WAITED: waited_s, SLEPT: lag_s - ran_s - waited_s}
    return max(parts, key=parts.__getitem__)


_EVENTS = {WAITED: "event loop starved of processor time", WAITED_OR_SLEPT: "event loop late"}


def _tell(lag_s: float, ran_s: float, waited_s: float | None, stood: tuple[str, ...]) -> None:
    why = cause(lag_s, ran_s, waited_s)
    log.warning(
        _EVENTS.get(why, "event loop blocked"),
        lag_ms=round(lag_s * 1000),
        ran_ms=round(ran_s * 1000),
        waited_for_processor_ms=None if waited_s is None else round(waited_s * 1000),
        cause=why,
        stood=stood,
    )
