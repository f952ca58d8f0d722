"""Which other managers are silent, and since when; and which ones are there for certain.

Silence is measured in this loop's running time (``aio.hang_detection``): time in which it did not run does not count.
A ping that arrives ends it, though it may have been on its way for as long as a partition lasted.  For certain there
is only a manager that has answered: it was there after the ping was sent to it.
"""

from collections.abc import Iterable, Mapping, Set

from skep.model.ids import NodeId

SILENT_S = 2.0
"""A manager without a ping for so long counts as lost: the leader then adopts its sessions."""


class LastSeen:
    """When each other manager was last seen."""

    def __init__(self) -> None:
        self._last_seen: dict[NodeId, float] = {}
        self._asked_at: dict[NodeId, float] = {}
        """When the last ping that each has answered was sent, on the monotonic clock."""

    def expect(self, managers: Iterable[NodeId], now: float) -> None:
        """Set the other managers.  A new one counts as seen ``now`` (own time)."""
        self._last_seen = {id: self._last_seen.get(id, now) for id in managers}
        self._asked_at = {id: at for id, at in self._asked_at.items() if id in self._last_seen}

    def note(self, manager: NodeId, now: float) -> None:
        """A ping of ``manager``; ignored for unknown ones."""
        if manager in self._last_seen:
            self._last_seen[manager] = now

    def note_answer(self, manager: NodeId, now: float, asked_at: float) -> None:
        """An answer of ``manager`` at ``now`` (running time) to a ping that was sent ``asked_at`` (monotonic)."""
        self.note(manager, now)
        if manager in self._last_seen:
            self._asked_at[manager] = asked_at

    def silent(self, now: float) -> Mapping[NodeId, float]:
        """Managers without a ping for ``SILENT_S``, with the seconds since the last one."""
        ages = {id: now - reachable for id, reachable in sorted(self._last_seen.items())}
        return {id: age for id, age in ages.items() if age >= SILENT_S}

    def reachable(self, now: float) -> Set[NodeId]:
        """Managers that have answered a ping of less than ``SILENT_S`` before ``now`` (monotonic seconds).

        One that is neither silent nor reachable is new, or slow.
        """
        return {id for id, asked_at in self._asked_at.items() if now - asked_at < SILENT_S}

    def answered(self, since: float) -> Set[NodeId]:
        """Managers that have answered a ping that was sent after ``since`` (monotonic seconds), or then."""
        return {id for id, asked_at in self._asked_at.items() if asked_at >= since}
