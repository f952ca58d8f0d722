"""Finds out for how long services had no request at this node's front door, from HAProxy's statistics.  Pure."""

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from skep.dataplane.door.configuration import DoorState
from skep.dataplane.door.statistics import StatRow, number
from skep.model.values.ids import ServiceId

SERVICES_MAX: Final = 500
"""Most services in a report, which has to fit into a heartbeat.  Those with tasks come first, then the longest idle."""
READING_S_MAX: Final = 6.0
"""Seconds for which a reading counts.  HAProxy is read every five seconds."""


class BackendCounters(msgspec.Struct, frozen=True):
    """Requests of a service.

    Attributes:
        open: Open ones.
        held: All that the node's process has held.
        reached: All that have reached a task, by the HAProxy process.
        servers: Number of servers that can get requests.
    """

    open: int = 0
    held: int = 0
    reached: Mapping[str, int] = {}
    servers: int = 0

    def __add__(self, other: "BackendCounters") -> "BackendCounters":
        reached = dict(self.reached)
        for process, count in other.reached.items():
            reached[process] = reached.get(process, 0) + count
        return BackendCounters(
            self.open + other.open, self.held + other.held, reached, self.servers + other.servers
        )

    def has_more_than(self, before: "BackendCounters", *, is_reloaded: bool) -> bool:
        """Return whether there was a request since ``before``, as far as anyone can know.

        Args:
            is_reloaded: Whether a process that ``before`` lacks was started after it.
        """
        return (
            bool(self.open)
            or self.held != before.held
            or any(
                count != before.reached.get(process, 0 if is_reloaded else None)
                for process, count in self.reached.items()
            )
        )


def idle_candidates(state: DoorState) -> Mapping[str, ServiceId]:
    """Return the backends of services that may be scaled to zero, with these services.

    Services without a running task count too, because the task that a request has started may never run.  A report
    has no place for more than ``SERVICES_MAX`` of them.
    """
    holding = {name: ServiceId(one.service) for name, one in sorted(state.backends.items()) if one.holds}
    running = {
        ServiceId(one.service)
        for one in state.backends.values()
        if any(server.task for server in one.servers)
    }
    others = sorted(set(holding.values()) - running)[: max(0, SERVICES_MAX - len(running))]
    wanted = running.union(others)
    return {name: id for name, id in holding.items() if id in wanted}


def added_counters(
    rows: Iterable[StatRow], services: Iterable[ServiceId]
) -> dict[ServiceId, BackendCounters]:
    """Return the counters of ``services``, added up, from the rows of backends in all processes.

    A former process may have other backends of the same service, so their names' first part counts.  Only connections
    to tasks count, because HAProxy responds to other requests itself: it refuses or redirects them.
    """
    found = {id: BackendCounters() for id in services}
    for process, one in rows:
        id = ServiceId((one.get("pxname") or "").rpartition("-")[0])
        if id in found:
            reached = number(one.get("connect")) + number(one.get("reuse"))
            found[id] += BackendCounters(
                number(one.get("scur")), 0, {process: reached}, number(one.get("act"))
            )
    return found


class IdleWatch:
    """When each service last had a request."""

    def __init__(self) -> None:
        self._last: Mapping[ServiceId, BackendCounters] = {}
        self._active_at: dict[ServiceId, float] = {}
        self._read_at: float | None = None
        self._is_reloaded = False

    def add(self, now: float, counters: Mapping[ServiceId, BackendCounters]) -> None:
        """Add a reading of all services that count.  An unknown service counts as a request."""
        self._active_at = {
            id: now
            if (before := self._last.get(id)) is None
            or one.has_more_than(before, is_reloaded=self._is_reloaded)
            else self._active_at[id]
            for id, one in counters.items()
        }
        self._last = counters
        self._read_at = now
        self._is_reloaded = False

    def forget(self) -> None:
        """Report nothing until the next reading."""
        self._read_at = None

    def expect_reload(self) -> None:
        """Let a new process with the next reading count as started after the last one, which was just now."""
        self._is_reloaded = self._read_at is not None

    def present(self, now: float) -> Mapping[ServiceId, float]:
        """Return the seconds without a request until the last reading, unless it is too old."""
        if self._read_at is None or now - self._read_at > READING_S_MAX:
            return {}
        order = sorted(
            self._active_at.items(), key=lambda one: (not self._last[one[0]].servers, one[1], one[0])
        )
        return {id: self._read_at - at for id, at in order[:SERVICES_MAX]}
