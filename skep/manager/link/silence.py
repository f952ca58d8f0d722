"""Which other managers are silent, and since when.

Measured in this loop's own time (``aio.own_time``): while it stood still, nobody was silent.
"""

from collections.abc import Iterable, Mapping, Set

from skep.model.ids import NodeId

SILENT_S = 2.0
"""A manager that was not heard for so long is taken for gone: the leader then adopts its sessions."""


class LastHeard:
    """When each other manager was last heard."""

    def __init__(self) -> None:
        self._heard: dict[NodeId, float] = {}
        self._spoke: set[NodeId] = set()
        """Those that were really heard, not only given their time to speak."""

    def expect(self, managers: Iterable[NodeId], now: float) -> None:
        """These are the other managers.  One that is new counts as heard ``now`` (own time)."""
        self._heard = {id: self._heard.get(id, now) for id in managers}
        self._spoke.intersection_update(self._heard)

    def note(self, manager: NodeId, now: float) -> None:
        """Something came from ``manager``; strangers do not count."""
        if manager in self._heard:
            self._heard[manager] = now
            self._spoke.add(manager)

    def silent(self, now: float) -> Mapping[NodeId, float]:
        """Managers not heard for ``SILENT_S``, with the seconds for which they have been silent."""
        ages = {id: now - heard for id, heard in sorted(self._heard.items())}
        return {id: age for id, age in ages.items() if age >= SILENT_S}

    def heard(self, now: float) -> Set[NodeId]:
        """Managers that have spoken and are not silent; one that is new is neither."""
        return self._spoke - self.silent(now).keys()
