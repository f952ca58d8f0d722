"""Which other managers are silent, and since when.

Measured in this loop's own time (``aio.own_time``): time in which it did not run does not count.
"""

from collections.abc import Iterable, Mapping, Set

from skep.model.ids import NodeId

SILENT_S = 2.0
"""A manager without a ping for so long counts as lost: the leader then adopts its sessions."""


class LastSeen:
    """When each other manager was last seen."""

    def __init__(self) -> None:
        self._last_seen: dict[NodeId, float] = {}
        self._responded: set[NodeId] = set()
        """Those that have sent pings; the others are only expected."""

    def expect(self, managers: Iterable[NodeId], now: float) -> None:
        """Set the other managers.  A new one counts as seen ``now`` (own time)."""
        self._last_seen = {id: self._last_seen.get(id, now) for id in managers}
        self._responded.intersection_update(self._last_seen)

    def note(self, manager: NodeId, now: float) -> None:
        """A ping of ``manager``; ignored for unknown ones."""
        if manager in self._last_seen:
            self._last_seen[manager] = now
            self._responded.add(manager)

    def silent(self, now: float) -> Mapping[NodeId, float]:
        """Managers without a ping for ``SILENT_S``, with the seconds since the last one."""
        ages = {id: now - reachable for id, reachable in sorted(self._last_seen.items())}
        return {id: age for id, age in ages.items() if age >= SILENT_S}

    def reachable(self, now: float) -> Set[NodeId]:
        """Managers that have sent pings and are not silent; a new one is in neither set."""
        return self._responded - self.silent(now).keys()
