"""Times at which the other managers were last seen.  Pure."""

from collections.abc import Iterable, Mapping, Set

from skep.model.values.ids import NodeId

SILENT_S = 2.0
"""Seconds without a ping after which a manager counts as lost, and the leader adopts its sessions."""


class ManagersLastSeen:
    """Times at which each other manager was last seen: which are silent, and which are certainly reachable.

    Silence is measured in this loop's running time (``aio.event_loop.hang_detection``), which excludes time in which
    the loop did not run.  A received ping ends the silence, although it may have been in transit during a whole
    partition.  Only a manager that has responded to a ping is certainly reachable, because it received that ping after
    this manager had sent it.
    """

    def __init__(self) -> None:
        self._last_seen: dict[NodeId, float] = {}
        self._asked_at: dict[NodeId, float] = {}
        """When the last answered ping to each manager was sent, on the monotonic clock."""

    def expect(self, managers: Iterable[NodeId], now: float) -> None:
        """Set the other managers.  A new manager counts as seen ``now``, in running time."""
        self._last_seen = {id: self._last_seen.get(id, now) for id in managers}
        self._asked_at = {id: at for id, at in self._asked_at.items() if id in self._last_seen}

    def note(self, manager: NodeId, now: float) -> None:
        """Record a ping of ``manager``.  Unknown managers are ignored."""
        if manager in self._last_seen:
            self._last_seen[manager] = now

    def note_answer(self, manager: NodeId, now: float, asked_at: float) -> None:
        """Record an answer of ``manager`` at ``now`` (running time) to a ping sent at ``asked_at`` (monotonic)."""
        self.note(manager, now)
        if manager in self._last_seen:
            self._asked_at[manager] = asked_at

    def silent(self, now: float) -> Mapping[NodeId, float]:
        """Return the managers without a ping for ``SILENT_S``, with the seconds since the last one."""
        ages = {id: now - reachable for id, reachable in sorted(self._last_seen.items())}
        return {id: age for id, age in ages.items() if age >= SILENT_S}

    def reachable(self, now: float) -> Set[NodeId]:
        """Return the managers that answered a ping sent less than ``SILENT_S`` before ``now`` (monotonic seconds).

        A manager that is neither silent nor reachable is new, or slow.
        """
        return {id for id, asked_at in self._asked_at.items() if now - asked_at < SILENT_S}

    def answered(self, since: float) -> Set[NodeId]:
        """Return the managers that have answered a ping sent at or after ``since`` (monotonic seconds)."""
        return {id for id, asked_at in self._asked_at.items() if asked_at >= since}
