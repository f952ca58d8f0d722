"""Rules for processes that do not respond: when they count as hung, and the reaction.

Time is measured as the observing loop experienced it (``RunningTime``).  A standstill of the whole machine, such as a
suspend, does not make processes count as hung.  On a machine so busy that the observer lacks processor time as well,
the observed process gets more time.
"""

from enum import Enum

import msgspec

HAND_OVER_S = 3.0
"""Silence after which another manager is made the leader."""
AGAIN_S = 2.0
"""Time between two hand-overs in one silence: the first may have failed, or leadership may have returned."""
END_S = 15.0
"""Silence after which the process is ended."""
CALM_S = 600.0
"""After this long without a hand-over, the next one is as fast as the first."""


class RunningTime(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds during which one event loop was able to observe."""

    seconds: float = 0.0
    """Only differences are meaningful."""
    seen_at: float
    """The clock's monotonic time at the last tick."""

    def after(
        self, now: float, tick_s: float, *, late_s: float | None = None, is_current: bool = True
    ) -> "RunningTime":
        """The running time at ``now``, one tick later.

        A tick that came later than by ``late_s`` was a standstill of this loop, not a peer's silence.
        Unless ``is_current``, the time stands still, because this process could not receive updates from others.

        Args:
            late_s: Longest delay of a tick that counts.  The tick's length by default.
        """
        longest_s = tick_s + (tick_s if late_s is None else late_s)
        passed = min(max(now - self.seen_at, 0.0), longest_s) if is_current else 0.0
        return RunningTime(seconds=self.seconds + passed, seen_at=now)


class Action(Enum):
    """The next step for an observed process."""

    WAIT = "wait"
    HAND_OVER = "hand over"
    """Make another manager the leader.  Harmless if it was not necessary."""
    END = "end"
    """End the process, so that it is restarted."""


class HangDetector:
    """Observes one process, which is probed every ``tick_s``.

    A silent process loses its leadership every ``AGAIN_S``, because it may be elected again.  An unnecessary hand-over,
    after which a response came, doubles the wait for the next one, up to the time after which the process is ended
    anyway.  So a machine that is slow now and then keeps its leader.
    """

    def __init__(self, tick_s: float, now: float) -> None:
        """``now`` is a monotonic time."""
        self._tick_s = tick_s
        self._time = RunningTime(seen_at=now)
        self._responded_at = 0.0
        self._after_s = HAND_OVER_S
        self._handed_over_at: float | None = None
        self._again_at: float | None = None
        """Time of the next hand-over, or None before the first one of a silence."""

    @property
    def silent_s(self) -> float:
        """Seconds without a response."""
        return self._time.seconds - self._responded_at

    def record(self, now: float, *, has_response: bool) -> Action:
        """Record a tick, with or without a response, and return the next action."""
        self._time = self._time.after(now, self._tick_s)
        if has_response:
            self._responded_at = self._time.seconds
            self._again_at = None
            return Action.WAIT
        now_s = self._time.seconds
        if self.silent_s >= END_S:
            return Action.END
        if self._again_at is None:
            if self.silent_s < self._wait_s():
                return Action.WAIT
            self._handed_over_at = now_s
            self._after_s *= 2
        elif now_s < self._again_at:
            return Action.WAIT
        self._again_at = now_s + AGAIN_S
        return Action.HAND_OVER

    def _wait_s(self) -> float:
        if self._handed_over_at is not None and self._time.seconds - self._handed_over_at > CALM_S:
            self._after_s, self._handed_over_at = HAND_OVER_S, None
        return self._after_s
