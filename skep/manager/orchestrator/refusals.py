"""Changes that the store did not take: each is proposed again later from time to time, all others at once."""

from collections.abc import Sequence

from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.failures import Failures
from skep.manager.orchestrator.changes import Change, key_of
from skep.model.ids import ServiceId


class Refusals:
    """What is held back, by service.  What is decided no longer is forgotten."""

    def __init__(self, failures: Failures, clock: Clock) -> None:
        self._failures = failures
        self._clock = clock
        self._held: dict[ServiceId, set[str]] = {}

    def admitted(self, service_id: ServiceId, changes: Sequence[Change]) -> tuple[list[Change], float | None]:
        """Those of a service's ``changes`` whose time has come, and when to look at the next one again."""
        held = self._held.get(service_id)
        if held is None:
            return list(changes), None
        for key in held - {key_of(change) for change in changes}:
            self._forget(service_id, key)
        now = self._clock.monotonic()
        later = {key: at for key in held if (at := self._retry_at(service_id, key)) > now}
        return [change for change in changes if key_of(change) not in later], min(
            later.values(), default=None
        )

    def note(self, service_id: ServiceId, change: Change, result: object) -> float | None:
        """What became of a change; gives when to decide again about one that was not written."""
        key = key_of(change)
        if isinstance(result, SkepError):
            self._held.setdefault(service_id, set()).add(key)
            return self._failures.record_write_failure(key, service_id, result).retry_at
        if service_id in self._held:
            self._forget(service_id, key)
        return None

    def error(self, service_id: ServiceId) -> str | None:
        """What is to be told on the service: why one of its changes was refused."""
        for key in sorted(self._held.get(service_id, ())):
            failure = self._failures.refusal(key, service_id)
            if failure is not None:
                return failure.error
        return None

    def forget(self, service_id: ServiceId) -> None:
        """The service is gone."""
        for key in self._held.pop(service_id, ()):
            self._failures.clear_write_failure(key, service_id)

    def _retry_at(self, service_id: ServiceId, key: str) -> float:
        failure = self._failures.write_failure(key, service_id)
        return failure.retry_at if failure is not None else 0.0

    def _forget(self, service_id: ServiceId, key: str) -> None:
        self._failures.clear_write_failure(key, service_id)
        held = self._held[service_id]
        held.discard(key)
        if not held:
            del self._held[service_id]
