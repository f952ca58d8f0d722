"""Reads HAProxy's statistics once for all purposes: routes, autoscaled services, staged updates and idle times.
Pure.

Source: HAProxy, Management Guide, "CSV format" and "show table".
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from skep.dataplane.door.configuration import TRAFFIC_TABLE, DoorState
from skep.dataplane.door.idleness import BackendCounters, added_counters, idle_candidates
from skep.dataplane.door.statistics import (
    Line,
    LineCounters,
    ServiceCounters,
    StatRow,
    counted_backends,
    counters_of,
    new_lines,
    service_counters_of,
)
from skep.dataplane.door.traffic import counted_routes, route_counters
from skep.model.door.traffic import RouteTraffic
from skep.model.values.ids import ServiceId

BACKENDS_AT_ONCE: Final = 100
"""Backends in one request for counters.  Each takes two KiB of the response."""
_BACKENDS, _BACKENDS_AND_SERVERS = 2, 6
"""Kinds of rows in a response."""
_PROCESS: Final = re.compile(r"^Pid: ([0-9]+)", re.MULTILINE)
_ENTRY: Final = re.compile(r" key=(\S+) ")
_COUNTER: Final = re.compile(r" gpc([0-9]{1,4})=([0-9]{1,20})")
_TABLE: Final = f"# table: {TRAFFIC_TABLE}"


class WantedCounters(msgspec.Struct, frozen=True, kw_only=True):
    """Routes, services and tasks to count, by the names of backends.

    Attributes:
        routes: Routes without requests.
        services: Autoscaled services.
        idle: Services that may be scaled to zero.
        lines: Server lines with new tasks of staged updates, and these tasks.
    """

    routes: Mapping[str, RouteTraffic]
    services: Mapping[str, str]
    idle: Mapping[str, ServiceId]
    lines: Mapping[Line, str]


class ReadCounters(msgspec.Struct, frozen=True, kw_only=True):
    """The counters of one reading.  ``idle`` is None if not all processes were read."""

    routes: Mapping[str, RouteTraffic]
    services: Mapping[str, ServiceCounters]
    idle: Mapping[ServiceId, BackendCounters] | None
    lines: Mapping[Line, LineCounters]
    unread: frozenset[str] = frozenset()
    """Backends that no response has.  They have no counters here, except that ``routes`` has 0 for them."""


def wanted_of(state: DoorState, autoscaled: Iterable[str]) -> WantedCounters:
    """Return the routes, services and tasks to count while HAProxy has ``state``.

    Args:
        autoscaled: Services that are autoscaled by their requests.
    """
    return WantedCounters(
        routes=counted_routes(state),
        services=counted_backends(state, frozenset(autoscaled)),
        idle=idle_candidates(state),
        lines=new_lines(state),
    )


def questions(wanted: WantedCounters) -> Iterator[str]:
    """Yield the requests to HAProxy.  Each backend is in one of them."""
    staged = dict.fromkeys(name for name, _ in wanted.lines)
    others = [name for name in {**wanted.routes, **wanted.services, **wanted.idle} if name not in staged]
    for first in range(0, len(others), BACKENDS_AT_ONCE):
        yield _question(others[first : first + BACKENDS_AT_ONCE], _BACKENDS)
    for name in staged:  # alone, because a backend may have a thousand servers
        yield _question([name], _BACKENDS_AND_SERVERS)
    if wanted.routes:
        yield f"show table {TRAFFIC_TABLE}\n"


def _question(names: Iterable[str], kinds: int) -> str:
    return ";".join(["show info", *(f"show stat {name} {kinds} -1" for name in names)]) + "\n"


def counters_in(wanted: WantedCounters, texts: Sequence[str], former: Sequence[str] | None) -> ReadCounters:
    """Return the counters since the start of each process.

    Args:
        texts: Responses to ``questions``, as far as there are any.
        former: Statistics of former processes, each after the response to ``show info``, or None if one is missing.
    """
    rows = [row for text in texts for row in _well_formed(text)]
    backends = [one for one in rows if one.columns.get("svname") == "BACKEND"]
    unread = {*wanted.routes, *wanted.services, *wanted.idle} - {one.columns["pxname"] for one in backends}
    if not any(_TABLE in text for text in texts):
        unread.update(wanted.routes)
    unknown = {id for name, id in wanted.idle.items() if name in unread}
    idle = dict.fromkeys(id for id in wanted.idle.values() if id not in unknown)
    slower = dict(entry for text in texts for entry in _entries(text))
    all_processes = [*backends, *(row for text in former or () for row in rows_in(text))]
    return ReadCounters(
        routes=route_counters(backends, slower, wanted.routes),
        services=dict(service_counters_of(backends, wanted.services)),
        idle=added_counters(all_processes, idle) if former is not None else None,
        lines=dict(counters_of(rows, wanted.lines)),
        unread=frozenset(unread),
    )


def _well_formed(text: str) -> list[StatRow]:
    """Return the rows of a response, or none of them if it is malformed."""
    try:
        return list(rows_in(text))
    except csv.Error:
        return []


def rows_in(text: str) -> Iterator[StatRow]:
    """Yield the rows of ``show stat``, whose responses each have a header, with the process of ``show info``.

    Raises: csv.Error.
    """
    process = named[1] if (named := _PROCESS.search(text)) is not None else ""
    columns: list[str] = []
    for line in csv.reader(text.splitlines()):
        if line and line[0].startswith("# pxname"):
            columns = [line[0].removeprefix("# "), *line[1:]]
        elif line and columns:
            yield StatRow(process, dict(zip(columns, line, strict=False)))


def _entries(text: str) -> Iterator[tuple[str, Mapping[int, int]]]:
    """Yield the numbers of slow responses in ``show table``, by backend."""
    for line in text.splitlines():
        if (entry := _ENTRY.search(line)) is not None:
            yield entry[1], {int(at): int(count) for at, count in _COUNTER.findall(line)}
