"""Which managers have more nodes coming back at present than they can take.

Those nodes live: they ask, and are told to come again, perhaps by another manager than the one that would find them
silent.  So managers tell each other, and nodes' silence is not counted meanwhile.
"""

from skep.model.ids import NodeId

HEARD_S = 2.0
"""What another manager said holds for so long."""
SUSPENDED_S_MAX = 120.0
"""For so long in one go no silence is counted; ten times as long later, again."""
_REGAINED = 0.1


class Crowd:
    """``is_here``: whether this manager is crowded; the dispatcher says so, and the link tells the others."""

    def __init__(self) -> None:
        self.is_here = False
        self._elsewhere: dict[NodeId, float] = {}

    def note(self, manager: NodeId, is_crowded: bool, now: float) -> None:
        """Another manager said so at ``now`` (monotonic seconds)."""
        if is_crowded:
            self._elsewhere[manager] = now
        else:
            self._elsewhere.pop(manager, None)

    def is_anywhere(self, now: float) -> bool:
        """Whether some manager is crowded at ``now`` (monotonic seconds)."""
        return self.is_here or any(now - at < HEARD_S for at in self._elsewhere.values())


def patience_left(left_s: float, passed_s: float, *, is_crowded: bool) -> float:
    """For how much longer silence may go uncounted, after ``passed_s`` in which managers were crowded, or not.

    So nobody can keep every dead node alive by crowding managers for ever.
    """
    if is_crowded:
        return max(left_s - passed_s, 0.0)
    return min(left_s + passed_s * _REGAINED, SUSPENDED_S_MAX)
