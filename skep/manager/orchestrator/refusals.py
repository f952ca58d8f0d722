"""Tracks changes that the store refused.  Each is retried with growing delays, independently of the service's other
changes.
"""

from collections.abc import Sequence

from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.control_loops.failures import Failures
from skep.manager.orchestrator.changes import Change, key_of
from skep.model.values.ids import ServiceId


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
