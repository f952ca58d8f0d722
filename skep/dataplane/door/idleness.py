"""Finds out for how long services had no request at this node's front door, from HAProxy's statistics.  Pure."""

import csv
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from skep.dataplane.door.configuration import DoorState
from skep.model.values.ids import ServiceId

SERVICES_MAX: Final = 500
"""Most services in a report, which has to fit into a heartbeat.  Those that are idle for longest come first."""


class BackendCounters(msgspec.Struct, frozen=True):
    """Open requests of a service, and all requests that its processes have had."""

    open: int = 0
    total: int = 0

    def __add__(self, other: "BackendCounters") -> "BackendCounters":
        return BackendCounters(self.open + other.open, self.total + other.total)


def idle_candidates(state: DoorState) -> Mapping[str, ServiceId]:
    """Return the backends of services that have tasks and may be scaled to zero, with these services."""
    return {
        name: ServiceId(one.service)
        for name, one in sorted(state.backends.items())
        if one.holds and any(server.task for server in one.servers)
    }


def added_counters(texts: Iterable[str], services: Iterable[ServiceId]) -> dict[ServiceId, BackendCounters]:
    """Return the counters of ``services`` from the statistics of several processes as CSV, added up.

    A former process may have other backends of the same service, so their names' first part counts.

    Source: HAProxy, Management Guide, "CSV format".
    """
    found = {id: BackendCounters() for id in services}
    for text in texts:
        columns: list[str] = []
        for row in csv.reader(text.splitlines()):
            if row and row[0].startswith("# "):
                columns = [row[0].removeprefix("# "), *row[1:]]
            elif row and columns:
                one = dict(zip(columns, row, strict=False))
                id = ServiceId(one["pxname"].rpartition("-")[0])
                if id in found:
                    found[id] += BackendCounters(int(one["scur"] or 0), int(one["stot"] or 0))
    return found


class IdleWatch:
    """When each service last had a request."""

    def __init__(self) -> None:
        self._last: Mapping[ServiceId, BackendCounters] = {}
        self._active_at: dict[ServiceId, float] = {}
        self._is_known = False

    def add(self, now: float, counters: Mapping[ServiceId, BackendCounters]) -> None:
        """Add a reading of all services that count.  An unknown service and a different total count as a request."""
        self._active_at = {
            id: now
            if one.open or (before := self._last.get(id)) is None or before.total != one.total
            else self._active_at[id]
            for id, one in counters.items()
        }
        self._last = counters
        self._is_known = True

    def forget(self) -> None:
        """Report nothing until the next reading."""
        self._is_known = False

    def present(self, now: float) -> Mapping[ServiceId, float]:
        """Return the seconds without a request."""
        if not self._is_known:
            return {}
        longest = sorted(self._active_at.items(), key=lambda one: (one[1], one[0]))
        return {id: now - at for id, at in longest[:SERVICES_MAX]}
