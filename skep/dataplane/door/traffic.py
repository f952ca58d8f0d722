"""Counts the requests to each route, from HAProxy's counters.  Pure.

HAProxy counts responses by status for each backend.  Its latencies are means only, so the configuration counts slow
responses in a table (``latency_rules``).  Both start at 0 after a reload.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import accumulate, pairwise
from operator import lt
from typing import Final

from msgspec.structs import replace

from skep.api.telemetry.exposition import MetricFamily, Sample, label_text
from skep.dataplane.door.configuration import DoorState
from skep.dataplane.door.statistics import SERVER_ERRORS, STATUSES, StatRow, number
from skep.model.door.traffic import BOUNDS_MS, REPORTED_MAX, ROUTES_MAX, RouteTraffic
from skep.model.values.ids import ServiceId

WINDOW_S: Final = 60.0
"""Seconds that are reported: long enough for a 99th percentile at a few requests a second."""


def counted_routes(state: DoorState) -> dict[str, RouteTraffic]:
    """Return the routes to count, without requests, by the names of their backends."""
    found: dict[str, RouteTraffic] = {}
    for key, name in sorted(state.routes.items()):
        backend = state.backends.get(name)
        if backend is not None and name not in found and len(found) < ROUTES_MAX:
            found[name] = RouteTraffic(service_id=ServiceId(backend.service), route=key.removesuffix("/"))
    return found


def route_counters(
    rows: Iterable[StatRow], slower: Mapping[str, Mapping[int, int]], routes: Mapping[str, RouteTraffic]
) -> dict[str, RouteTraffic]:
    """Return the counters of ``routes`` since HAProxy's start.

    Args:
        rows: Rows of backends.
        slower: By backend, the number of responses that are slower than so many bounds, and one more.
    """
    found = dict(routes)
    for _, row in rows:
        if (one := found.get(name := row.get("pxname") or "")) is not None:
            statuses = [number(row.get(f"hrsp_{kind}")) for kind in STATUSES]
            counts = slower.get(name, {})
            failed = number(row.get("econ")) + number(row.get("eresp"))
            # HAProxy may have counted a slow response after this row was read.
            responses = max(sum(statuses) - failed, counts.get(0, 0))
            slower_than = (responses, *(counts.get(at, 0) for at in range(len(BOUNDS_MS))), 0)
            found[name] = replace(
                one,
                requests=sum(statuses),
                errors=statuses[SERVER_ERRORS],
                buckets=tuple(one - other for one, other in pairwise(slower_than)),
            )
    return found


class RouteCounters:
    """The requests to each route since the node's start, and in the last ``WINDOW_S`` seconds."""

    def __init__(self) -> None:
        self._last: Mapping[str, RouteTraffic] | None = None
        self._read_at = 0.0
        self._totals: dict[str, RouteTraffic] = {}
        self._samples: deque[tuple[float, Mapping[str, RouteTraffic]]] = deque()

    def add(self, now: float, counters: Mapping[str, RouteTraffic], unread: Collection[str] = ()) -> None:
        """Add a reading of all routes.  The first one only tells where the counters start.

        ``unread`` routes keep the counters of the last reading, so that the next one has their requests since then.
        """
        if unread:
            before = self._last or {}
            counters = {
                name: before.get(name, one) if name in unread else one for name, one in counters.items()
            }
        last, self._last, before_s, self._read_at = self._last, counters, self._read_at, now
        if last is not None:
            sample = {
                name: replace(_since(last.get(name), one), seconds=now - before_s)
                for name, one in counters.items()
            }
            self._samples.append((now, sample))
            self._totals = {
                name: one if (known := self._totals.get(name)) is None else known + one
                for name, one in sample.items()
            }
        while self._samples and self._samples[0][0] < now - WINDOW_S:
            self._samples.popleft()

    def recent(self, now: float) -> tuple[RouteTraffic, ...]:
        """Return the recent requests to routes, the busiest first.  Routes without requests are left out."""
        found: dict[str, RouteTraffic] = {}
        seconds = 0.0
        for at, sample in self._samples:
            if at < now - WINDOW_S:
                continue
            seconds += next((one.seconds for one in sample.values()), 0.0)
            for name, one in sample.items():
                if one.requests:
                    found[name] = found[name] + one if name in found else one
        busiest = sorted(found.values(), key=lambda one: (-one.requests, one.route))
        return tuple(replace(one, seconds=round(seconds, 3)) for one in busiest[:REPORTED_MAX])

    def families(self) -> list[MetricFamily]:
        """Return the requests since the node's start as metrics."""
        totals = sorted(self._totals.values(), key=lambda one: one.route)
        latencies: list[Sample] = []
        for one in totals:
            count = 0
            for bound, found in zip((*BOUNDS_MS, None), one.buckets, strict=True):
                count += found
                le = "+Inf" if bound is None else f"{bound / 1000:g}"
                latencies.append(Sample(label_text({"route": one.route, "le": le}), count, "_bucket"))
            latencies.append(Sample(label_text({"route": one.route}), count, "_count"))
        return [
            MetricFamily(
                "skep_door_requests_total",
                "counter",
                "Requests to a route over this node's front door.",
                [Sample(label_text({"route": one.route}), one.requests) for one in totals],
            ),
            MetricFamily(
                "skep_door_errors_total",
                "counter",
                "Responses with a status of 500 or more, of tasks or of the front door.",
                [Sample(label_text({"route": one.route}), one.errors) for one in totals],
            ),
            MetricFamily(
                "skep_door_response_seconds",
                "histogram",
                "Time from a request to the header of its response, without requests that no task answered.",
                latencies,
            ),
        ]


def _since(before: RouteTraffic | None, now: RouteTraffic) -> RouteTraffic:
    if before is None or before.requests > now.requests or any(map(lt, _slower(now), _slower(before))):
        return now  # a route of a reload, which counts from 0
    return replace(
        now,
        requests=now.requests - before.requests,
        errors=max(now.errors - before.errors, 0),
        buckets=tuple(max(one - other, 0) for one, other in zip(now.buckets, before.buckets, strict=True)),
    )


def _slower(one: RouteTraffic) -> Iterator[int]:
    """Yield HAProxy's counters, which never fall.

    A bucket may fall by one, because HAProxy may be read between two counters of one response.
    """
    return accumulate(reversed(one.buckets))
