"""How long to wait for somebody who does not answer, and what to do about it then.

Measured in the own time of who asks (``own_time``): after a standstill of the whole machine (a suspend, a stop of both)
nobody is blamed for it, and a machine so busy that whoever asks gets no turn either is given the more time.
"""

from enum import Enum

from skep.aio.own_time import OwnTime

HAND_OVER_S = 3.0
END_S = 15.0
CALM_S = 600.0
"""After so long without a hand-over the next one is as quick as the first."""


class Step(Enum):
    """What is to be done."""

    WAIT = "wait"
    HAND_OVER = "hand over"
    """Have another one lead: harmless where it was in vain."""
    END = "end"
    """End the process, so that it is started again."""


class Patience:
    """Of one who asks every ``tick_s``.

    Each hand-over that was in vain, because the answer came after all, makes the next one wait for twice as long, up to
    where the process is ended anyway: a machine that is slow now and then keeps its leader.
    """

    def __init__(self, tick_s: float, now: float) -> None:
        """``now``: on a monotonic clock."""
        self._tick_s = tick_s
        self._time = OwnTime(seen_at=now)
        self._answered_at = 0.0
        self._after_s = HAND_OVER_S
        self._handed_over_at: float | None = None
        self._is_handed_over = False

    @property
    def silent_s(self) -> float:
        """For how long nothing has come."""
        return self._time.seconds - self._answered_at

    def look(self, now: float, *, is_answered: bool) -> Step:
        """A tick has passed; whether there was an answer in it."""
        self._time = self._time.after(now, self._tick_s)
        if is_answered:
            self._answered_at = self._time.seconds
            self._is_handed_over = False
            return Step.WAIT
        if self.silent_s >= END_S:
            return Step.END
        if self._is_handed_over or self.silent_s < self._wait_s():
            return Step.WAIT
        self._is_handed_over = True
        self._handed_over_at = self._time.seconds
        self._after_s *= 2
        return Step.HAND_OVER

    def _wait_s(self) -> float:
        if self._handed_over_at is not None and self._time.seconds - self._handed_over_at > CALM_S:
            self._after_s, self._handed_over_at = HAND_OVER_S, None
        return self._after_s
