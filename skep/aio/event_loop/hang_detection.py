"""Decides when a process that does not respond counts as hung, and what to do about it.

Only time in which the observing event loop itself ran counts (``RunningTime``).  If the whole machine stands still, as
during a suspend, no process counts as hung.  On a machine so busy that the observer also lacks processor time, the
observed process gets more time.
"""

from enum import Enum

import msgspec

AGAIN_S = 2.0
"""Seconds between two hand-overs in one silence.  A second one is needed if the first failed or leadership returned."""
CALM_S = 600.0
"""After this many seconds without a hand-over, the next one is as fast as the first."""


class RunningTime(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds in which the observing event loop ran."""

    seconds: float = 0.0
    """Only differences are meaningful."""
    seen_at: float
    """The clock's monotonic time at the last tick."""

    def after(
        self, now: float, tick_s: float, *, late_s: float | None = None, is_current: bool = True
    ) -> "RunningTime":
        """Return the running time at ``now``, one tick later.

        A tick that is more than ``late_s`` late means that this loop stood still, and not that the other process is
        silent.  The time also stands still unless ``is_current``, because this process could then not have received a
        response.

        Args:
            late_s: Longest delay of a tick that counts as running time.  By default the length of a tick.
        """
        longest_s = tick_s + (tick_s if late_s is None else late_s)
        passed = min(max(now - self.seen_at, 0.0), longest_s) if is_current else 0.0
        return RunningTime(seconds=self.seconds + passed, seen_at=now)


class HangAction(Enum):
    """The next step for an observed process."""

    WAIT = "wait"
    HAND_OVER = "hand over"
    """Make another manager the leader.  This does no harm if it was not necessary."""
    END = "end"
    """Kill the process, so that its supervisor restarts it."""


class HangLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of silence of a process."""

    hand_over_s: float = 3.0
    """Afterwards, another manager is made the leader."""
    end_s: float = 15.0
    """Afterwards, the process is killed."""


LIMITS = HangLimits()


class HangDetector:
    """Observes one process, which its owner probes every ``tick_s``.

    While the process is silent, it loses its leadership every ``AGAIN_S``, because it may have been elected again.  If
    it responds after a hand-over, the hand-over was unnecessary, and the silence before the next one is doubled, up to
    ``end_s``.  So a manager on a machine that is slow now and then stays the leader.
    """

    def __init__(self, tick_s: float, now: float, limits: HangLimits = LIMITS) -> None:
        """``now`` is a monotonic time."""
        self._tick_s = tick_s
        self._limits = limits
        self._time = RunningTime(seen_at=now)
        self._responded_at = 0.0
        self._after_s = limits.hand_over_s
        self._handed_over_at: float | None = None
        self._again_at: float | None = None
        """Time of the next hand-over, or None before the first one of a silence."""

    @property
    def silent_s(self) -> float:
        """Seconds without a response."""
        return self._time.seconds - self._responded_at

    def record(self, now: float, *, has_response: bool) -> HangAction:
        """Record a tick, with or without a response, and return the next action."""
        self._time = self._time.after(now, self._tick_s)
        if has_response:
            self._responded_at = self._time.seconds
            self._again_at = None
            return HangAction.WAIT
        now_s = self._time.seconds
        if self.silent_s >= self._limits.end_s:
            return HangAction.END
        if self._again_at is None:
            if self.silent_s < self._wait_s():
                return HangAction.WAIT
            self._handed_over_at = now_s
            self._after_s *= 2
        elif now_s < self._again_at:
            return HangAction.WAIT
        self._again_at = now_s + AGAIN_S
        return HangAction.HAND_OVER

    def _wait_s(self) -> float:
        if self._handed_over_at is not None and self._time.seconds - self._handed_over_at > CALM_S:
            self._after_s, self._handed_over_at = self._limits.hand_over_s, None
        return self._after_s
