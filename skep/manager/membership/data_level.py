"""Decides when the level of the stored data is raised: when every manager has supported it for a while."""

from collections.abc import Iterable

from skep.model.node import Node, NodeState
from skep.store.interface import Transaction, View
from skep.store.level import LOWEST

SOUND_S = 30.0
"""Seconds for which every manager's node must be ready before the level is raised, which cannot be undone.

They are two heartbeat grace periods (15 s), so a node that starts and fails at once still returns to its former
version."""


class LevelRise:
    """Observes for how long all managers' nodes have been ready."""

    def __init__(self) -> None:
        self._sound_since: float | None = None
        """When all managers' nodes were first seen ready, in monotonic seconds, or None while one is not."""

    def due(self, view: View, now: float) -> int | None:
        """Return the level that the data can be raised to at ``now`` (monotonic seconds), or None."""
        level = usable_level(view.find(Node))
        if level is None:
            self._sound_since = None
            return None
        self._sound_since = now if self._sound_since is None else self._sound_since
        is_known = not view.unreadable(Node) and not any(
            "manager" in one for one in view.damaged(Node).values()
        )
        is_due = level > view.level and is_known and now - self._sound_since >= SOUND_S
        return level if is_due else None


def lowest_level(nodes: Iterable[Node]) -> int:
    """Return the newest level that every manager supports."""
    levels = (max(node.manager_status.level, LOWEST) for node in nodes if node.manager_status is not None)
    return min(levels, default=LOWEST)


def usable_level(nodes: Iterable[Node]) -> int | None:
    """Return the newest level that every manager supports, or None while a manager's node is not ready.

    A manager process reports its level before its node is known to be ready.  A node that does not start gets its
    former version again (``skep upgrade``), which does not start on a higher level.
    """
    managers = [node for node in nodes if node.manager_status is not None]
    if any(node.status.state is not NodeState.READY for node in managers):
        return None
    return lowest_level(managers)


def write_level(tx: Transaction) -> None:
    """Raise the level of the stored data to the newest that every manager supports, if all their nodes are ready."""
    if (level := usable_level(tx.find(Node))) is not None:
        tx.raise_level(level)
