"""Counts responses of new tasks during staged updates, and requests of autoscaled services, from HAProxy's statistics.
Pure.

HAProxy counts for each server line since its start.  A line may get another task, and a reload starts at 0, so only
differences between two readings of one task's line count.
"""

from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from skep.dataplane.door.configuration import DoorState
from skep.model.measures.readings import ServiceRequests
from skep.model.staging.updates import TaskRequests
from skep.model.values.ids import ServiceId, TaskId

WINDOW_S: Final = 60.0
"""Seconds that are reported.  A shorter time has too few requests, and a longer one notices errors late."""
TASKS_MAX: Final = 200
"""Most tasks in a report, which has to fit into a heartbeat.  The share of requests of the others shows the same."""

RATE_WINDOW_S: Final = 15.0
"""Seconds over which requests of autoscaled services are averaged: three readings.  A longer time shows a step late."""
BACKENDS_MAX: Final = 500
"""Most backends that are read, so that the report fits into a heartbeat.  Other services count as not measured."""

STATUSES: Final = ("1xx", "2xx", "3xx", "4xx", "5xx", "other")
"""Classes of statuses that HAProxy counts."""
SERVER_ERRORS: Final = STATUSES.index("5xx")

_DIGITS_MAX: Final = 20
"""Most digits of a number.  HAProxy's counters have 64 bits."""

Line = tuple[str, str]
"""Names of a backend and of one of its servers."""


class LineCounters(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of a server line with its task.  ``latency_ms``: mean of its last 1,024 requests."""

    task: str
    requests: int
    errors: int
    latency_ms: float


def new_lines(state: DoorState) -> dict[Line, str]:
    """Return the server lines with new tasks of staged updates, and these tasks."""
    found = {
        (name, f"s{number}"): server.task
        for name, one in sorted(state.backends.items())
        for number, server in enumerate(one.servers, start=1)
        if server.is_new
    }
    return dict(list(found.items())[:TASKS_MAX])


class StatRow(NamedTuple):
    """A row of HAProxy's statistics, with the id of its process."""

    process: str
    columns: Mapping[str, str]


def counters_of(rows: Iterable[StatRow], lines: Mapping[Line, str]) -> Iterator[tuple[Line, LineCounters]]:
    """Yield the counters of ``lines``."""
    for row in (one.columns for one in rows):
        line = row.get("pxname") or "", row.get("svname") or ""
        if line not in lines:
            continue
        statuses = [number(row.get(f"hrsp_{kind}")) for kind in STATUSES]
        failed = number(row.get("econ")) + number(row.get("eresp"))
        yield (
            line,
            LineCounters(
                task=lines[line],
                requests=sum(statuses) + failed,
                errors=statuses[SERVER_ERRORS] + failed,
                latency_ms=float(number(row.get("rtime"))),
            ),
        )


def number(text: str | None) -> int:
    """Return a column's number.  It is 0 if the column is empty, missing or malformed: HAProxy can be any image."""
    return int(text) if text and len(text) <= _DIGITS_MAX and text.isascii() and text.isdigit() else 0


# -- autoscaled services -----------------------------------------------------------------------------------------


class ServiceCounters(msgspec.Struct, frozen=True):
    """Requests of a backend: ``in_flight`` has the waiting ones, and ``total`` counts since HAProxy's start."""

    in_flight: int
    total: int


def counted_backends(state: DoorState, services: Collection[str]) -> dict[str, str]:
    """Return the backends of ``services``, with the service of each."""
    found = {name: one.service for name, one in sorted(state.backends.items()) if one.service in services}
    return dict(list(found.items())[:BACKENDS_MAX])


def service_counters_of(
    rows: Iterable[StatRow], backends: Collection[str]
) -> Iterator[tuple[str, ServiceCounters]]:
    """Yield the counters of ``backends``, from their rows."""
    for row in (one.columns for one in rows):
        if (name := row.get("pxname") or "") in backends:
            yield name, ServiceCounters(number(row.get("scur")), number(row.get("req_tot")))


class ServiceWindow:
    """The requests of autoscaled services in the last ``RATE_WINDOW_S`` seconds."""

    def __init__(self) -> None:
        self._last: Mapping[str, ServiceCounters] = {}
        self._last_at = 0.0
        self._samples: deque[tuple[float, float, Mapping[str, tuple[int, int]]]] = deque()
        """Time, seconds since the reading before, and by service the requests in flight and the new ones."""

    def add(self, now: float, services: Mapping[str, str], counters: Mapping[str, ServiceCounters]) -> None:
        """Add a reading.  A service counts once each of its backends was read twice.

        Args:
            services: The service of each backend.
        """
        unknown = {one for name, one in services.items() if name not in counters or name not in self._last}
        sample = dict.fromkeys((one for one in services.values() if one not in unknown), (0, 0))
        for name, one in counters.items():
            service = services.get(name, "")
            if service in sample:
                before = self._last[name].total
                new = one.total - before if one.total >= before else one.total  # a reload starts at 0
                in_flight, total = sample[service]
                sample[service] = in_flight + one.in_flight, total + new
        elapsed_s = now - self._last_at
        self._last, self._last_at = counters, now
        self._samples.append((now, elapsed_s, sample))

    def present(self, now: float) -> Mapping[ServiceId, ServiceRequests]:
        """Return the requests of each service that the last reading has."""
        while self._samples and self._samples[0][0] <= now - RATE_WINDOW_S:
            self._samples.popleft()
        if not self._samples:
            return {}
        found = {}
        for service in self._samples[-1][2]:
            parts = [(elapsed_s, one[service]) for _, elapsed_s, one in self._samples if service in one]
            seconds = sum(elapsed_s for elapsed_s, _ in parts)
            found[ServiceId(service)] = ServiceRequests(
                in_flight=sum(in_flight for _, (in_flight, _) in parts) / len(parts),
                per_second=sum(new for _, (_, new) in parts) / seconds if seconds > 0 else 0.0,
            )
        return found


# -- new tasks ---------------------------------------------------------------------------------------------------


class RequestWindow:
    """The requests of the last ``WINDOW_S`` seconds."""

    def __init__(self) -> None:
        self._last: Mapping[Line, LineCounters] = {}
        self._samples: deque[tuple[float, Mapping[Line, LineCounters]]] = deque()

    def add(self, now: float, counters: Mapping[Line, LineCounters]) -> None:
        """Add a reading of all lines."""
        sample = {line: _since(self._last[line], one) for line, one in counters.items() if line in self._last}
        self._last = counters
        self._samples.append((now, sample))

    def present(self, now: float) -> Mapping[TaskId, TaskRequests]:
        """Return the requests of each task."""
        while self._samples and self._samples[0][0] < now - WINDOW_S:
            self._samples.popleft()
        found: dict[str, list[LineCounters]] = defaultdict(list)
        for _, sample in self._samples:
            for one in sample.values():
                found[one.task].append(one)
        return {TaskId(task): _total(parts) for task, parts in found.items()}


def _since(before: LineCounters, now: LineCounters) -> LineCounters:
    if before.task != now.task or before.requests > now.requests or before.errors > now.errors:
        # Another task, or a reload: earlier requests of the line belong to another task, or were counted.
        is_reload = before.task == now.task
        return now if is_reload else LineCounters(task=now.task, requests=0, errors=0, latency_ms=0.0)
    return msgspec.structs.replace(
        now, requests=now.requests - before.requests, errors=now.errors - before.errors
    )


def _total(parts: Sequence[LineCounters]) -> TaskRequests:
    return TaskRequests(
        requests=sum(one.requests for one in parts),
        errors=sum(one.errors for one in parts),
        milliseconds=round(sum(one.requests * one.latency_ms for one in parts)),
    )
