"""Changes that were decided and are not yet written.  Services take turns, however many changes one of them has.

A service of 100,000 tasks is decided once, and its changes take minutes to write.  Other services are decided and
written meanwhile.  The large service itself is not decided again before its last change is written, because each
decision is about all of its tasks.
"""

from collections import deque
from collections.abc import Sequence

import msgspec

from skep.manager.orchestrator.changes import Change
from skep.model.service import Service
from skep.model.values.ids import ServiceId


class _Decided(msgspec.Struct):
    """The rest of one decision."""

    service: Service | None
    """The service at the decision, or None if it no longer existed."""
    changes: deque[Change]
    is_due: bool = False
    """Whether the service must be decided again afterwards."""


class UnwrittenChanges:
    """The unwritten changes of every service."""

    def __init__(self) -> None:
        self._decided: dict[ServiceId, _Decided] = {}
        """In the order in which services get their turns."""

    def __bool__(self) -> bool:
        return bool(self._decided)

    def clear(self) -> None:
        """Drop all changes."""
        self._decided.clear()

    def add(self, id: ServiceId, service: Service | None, changes: Sequence[Change]) -> None:
        """Add the changes of a new decision."""
        if changes:
            self._decided[id] = _Decided(service, deque(changes))

    def defers(self, id: ServiceId, service: Service | None) -> bool:
        """Return whether the next decision about a service, which is due, has to wait for unwritten changes.

        Changes that were decided for another state of the service are dropped: it is decided at once.
        """
        decided = self._decided.get(id)
        if decided is None:
            return False
        if decided.service is not service:
            del self._decided[id]
            return False
        decided.is_due = True
        return True

    def take(self, limit: int) -> tuple[list[tuple[ServiceId, Change]], list[ServiceId]]:
        """Remove up to ``limit`` changes, the same number of each service as far as it has them.

        Return also the services that are due now because these were their last changes.
        """
        taken: list[tuple[ServiceId, Change]] = []
        due: list[ServiceId] = []
        while self._decided and len(taken) < limit:
            share = max(1, (limit - len(taken)) // len(self._decided))
            for id in list(self._decided)[: limit - len(taken)]:
                decided = self._decided.pop(id)
                taken += [(id, decided.changes.popleft()) for _ in range(min(share, len(decided.changes)))]
                if decided.changes:
                    self._decided[id] = decided
                elif decided.is_due:
                    due.append(id)
        return taken, due
