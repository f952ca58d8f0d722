"""Faults of a node: each call to runtime, network, volumes or disk may fail, hang, or be the last of its process."""

from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from enum import Enum
from random import Random
from typing import TypeVar

from skep.aio.clock import Clock
from skep.engine.lifecycle.machine import Effect
from skep.engine.runtime.conmon import RuntimeFailed
from skep.errors import Unavailable

T = TypeVar("T")

HANGS_S = (5.0, 30.0, 60.0)
"""Durations of calls that hang.  The longest is the deadline of a runc command."""
LATENCY_S = 0.02


EFFECT: ContextVar[Effect | None] = ContextVar("effect", default=None)
"""The effect of a container's life that makes a call."""


class Crash(BaseException):
    """The node process has crashed.  Nothing that it still does affects the world."""


class Fate(Enum):
    """What happens to one call."""

    CRASH_BEFORE = "crash before"
    CRASH_AFTER = "crash after"
    FAIL_BEFORE = "failure before"
    FAIL_AFTER = "failure after"
    HANG = "hang"


CALLS = (
    *("create", "start", "status", "delete", "clear", "pause", "resume", "update", "exec", "wait", "signal"),
    *("make", "save", "prepare", "release", "discard", "name files", "mount", "unmount", "prepare exec"),
    *("attach", "detach", "connect", "disconnect", "bridge", "rename", "restore", "free"),
)
FOCUSED_RATE = 0.25
"""Share of the calls of one name that a fault affects in runs that focus on it."""
SHORT = (Fate.CRASH_BEFORE, Fate.CRASH_AFTER, Fate.FAIL_BEFORE)
"""Possible fates of calls that do not wait."""


class Faults:
    """Draws the fate of each call.

    Args:
        rate: Share of the calls that a fault affects.
        focus: Name of a call that has more faults, or "".
    """

    def __init__(self, random: Random, clock: Clock, rate: float, focus: str = "") -> None:
        self._random = random
        self._clock = clock
        self.rate = rate
        self.focus = focus
        self.seen = Counter[tuple[str, Fate]]()
        """Faults by call."""
        self.in_effects = Counter[tuple[Effect | None, Fate | None]]()
        """Calls by the effect that makes them, and by their fate."""
        self.on_crash: Callable[[], None] = lambda: None

    async def call(self, alive: Callable[[], bool], name: str, do: Callable[[], T]) -> T:
        """Return the result of a call that takes time.  Raises: Crash; Unavailable; RuntimeFailed."""
        self._require(alive())
        fate = self._fate(name, tuple(Fate))
        self._crash_if(fate is Fate.CRASH_BEFORE)
        await self._clock.sleep(self._random.random() * LATENCY_S)
        self._require(alive())
        match fate:
            case Fate.FAIL_BEFORE:
                raise RuntimeFailed(f"{name} refused")
            case Fate.HANG:
                does, seconds = self._random.random() < 0.5, self._random.choice(HANGS_S)
                await self._clock.sleep(seconds / 2)
                self._require(alive())
                if does:
                    do()
                await self._clock.sleep(seconds / 2)
                self._require(alive())
                raise Unavailable(f"{name} did not end in time")
        result = do()
        self._crash_if(fate is Fate.CRASH_AFTER)
        if fate is Fate.FAIL_AFTER:
            raise Unavailable(f"the answer of {name} was lost")
        return result

    def call_now(self, alive: bool, name: str, do: Callable[[], T]) -> T:
        """Return the result of a call that takes no time.  Raises: Crash; OSError."""
        self._require(alive)
        fate = self._fate(name, SHORT)
        self._crash_if(fate is Fate.CRASH_BEFORE)
        if fate is Fate.FAIL_BEFORE:
            raise OSError(28, "No space left on device")
        result = do()
        self._crash_if(fate is Fate.CRASH_AFTER)
        return result

    def _fate(self, name: str, fates: tuple[Fate, ...]) -> Fate | None:
        is_focused = self.rate > 0 and name == self.focus
        fate = None
        if self._random.random() < (FOCUSED_RATE if is_focused else self.rate):
            fate = self._random.choice(fates)
            self.seen[name, fate] += 1
        # The driver writes records, also for the signal by which an effect ends a process.
        self.in_effects[None if name == "save" else EFFECT.get(), fate] += 1
        return fate

    def _crash_if(self, crashes: bool) -> None:
        if crashes:
            self.on_crash()
            raise Crash

    @staticmethod
    def _require(alive: bool) -> None:
        if not alive:
            raise Crash
