"""Which managers have more nodes reconnecting than they can register at once.

Those nodes are alive: they were sent ``RetryLater``, perhaps by another manager than the one that would mark them
down.  So managers send their overload to each other in pings, and missed heartbeats do not count meanwhile.
"""

from skep.model.ids import NodeId

REPORT_VALID_S = 2.0
"""How long another manager's report is valid."""
SUSPENDED_S_MAX = 120.0
"""Missed heartbeats are ignored for at most this long; it takes ten times as long to regain the full allowance."""
_REGAIN_RATE = 0.1


class Overload:
    """``is_here``: whether this manager is overloaded; set by the dispatcher, sent to the others by the link."""

    def __init__(self) -> None:
        self.is_here = False
        self._elsewhere: dict[NodeId, float] = {}

    def record(self, manager: NodeId, is_overloaded: bool, now: float) -> None:
        """Record another manager's report at ``now`` (monotonic seconds)."""
        if is_overloaded:
            self._elsewhere[manager] = now
        else:
            self._elsewhere.pop(manager, None)

    def is_anywhere(self, now: float) -> bool:
        """Whether any manager is overloaded at ``now`` (monotonic seconds)."""
        return self.is_here or any(now - at < REPORT_VALID_S for at in self._elsewhere.values())


def suspension_left(left_s: float, passed_s: float, *, is_overloaded: bool) -> float:
    """Seconds for which missed heartbeats may still be ignored, after ``passed_s`` with or without overload.

    Bounded, so that permanent overload cannot keep every lost node alive.
    """
    if is_overloaded:
        return max(left_s - passed_s, 0.0)
    return min(left_s + passed_s * _REGAIN_RATE, SUSPENDED_S_MAX)
