"""Changes that were decided and are not yet written.  Services take turns, however many changes one of them has.

A service of 100,000 tasks is decided once, and its changes take minutes to write.  Other services are decided and
written meanwhile.  The large service itself is not decided again before its last change is written, because each
decision is about all of its tasks.

A change that the store refused is retried with growing delays, independently of the service's other changes.
"""

from collections import deque
from collections.abc import Sequence

import msgspec

from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.control_loops.failures import Failures
from skep.manager.orchestrator.changes import Change, key_of
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


class Refusals:
    """Refused changes by service, with their delays.  A change that decisions no longer contain is dropped."""

    def __init__(self, failures: Failures, clock: Clock) -> None:
        self._failures = failures
        self._clock = clock
        self._refused: dict[ServiceId, set[str]] = {}

    def admitted(self, service_id: ServiceId, changes: Sequence[Change]) -> tuple[list[Change], float | None]:
        """Return the ``changes`` that may be written now, and the time at which the next of the others is due."""
        refused = self._refused.get(service_id)
        if refused is None:
            return list(changes), None
        for key in refused - {key_of(change) for change in changes}:
            self._forget(service_id, key)
        now = self._clock.monotonic()
        later = {key: at for key in refused if (at := self._retry_at(service_id, key)) > now}
        return [change for change in changes if key_of(change) not in later], min(
            later.values(), default=None
        )

    def note(self, service_id: ServiceId, change: Change, result: object) -> float | None:
        """Record the result of a change.  Returns when to decide again if it was not written."""
        key = key_of(change)
        if isinstance(result, SkepError):
            self._refused.setdefault(service_id, set()).add(key)
            return self._failures.record_write_failure(key, service_id, result).retry_at
        if service_id in self._refused:
            self._forget(service_id, key)
        return None

    def error(self, service_id: ServiceId) -> str | None:
        """Return the error to show on the service, which says why one of its changes was refused."""
        for key in sorted(self._refused.get(service_id, ())):
            failure = self._failures.refusal(key, service_id)
            if failure is not None:
                return failure.error
        return None

    def forget(self, service_id: ServiceId) -> None:
        """Forget a deleted service."""
        for key in self._refused.pop(service_id, ()):
            self._failures.clear_write_failure(key, service_id)

    def _retry_at(self, service_id: ServiceId, key: str) -> float:
        failure = self._failures.write_failure(key, service_id)
        return failure.retry_at if failure is not None else 0.0

    def _forget(self, service_id: ServiceId, key: str) -> None:
        self._failures.clear_write_failure(key, service_id)
        refused = self._refused[service_id]
        refused.discard(key)
        if not refused:
            del self._refused[service_id]
