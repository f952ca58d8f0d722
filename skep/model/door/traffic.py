"""Requests over the front door by route, with a histogram of their latency.  Pure."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Final

import msgspec

from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import ServiceId
from skep.model.values.times import Timestamp

BOUNDS_MS: Final = (5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000)
"""Upper bounds of the buckets in milliseconds, Prometheus' defaults.  The last bucket has none."""
BUCKETS: Final = len(BOUNDS_MS) + 1
"""Number of buckets, with the one above all bounds."""
ROUTES_MAX: Final = 500
"""Most routes that a node counts, so that a reading of HAProxy's counters takes milliseconds."""
REPORTED_MAX: Final = 200
"""Most routes in a report, which has to fit into a heartbeat.  The busiest come first."""
ROUTE_CHARACTERS_MAX: Final = 512
"""Longest route: a host has at most 253 characters, and paths are short."""
COUNT_MAX: Final = 10**15
"""No door counts as many requests, or as many milliseconds of responses.  A report of more is ignored, and sums stay
below it, so that a sum is a plausible report as well.
"""
SECONDS_MAX: Final = 3600.0
"""Longest time of a report.  Nodes count over a minute."""


class RouteTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """Requests to a route.  Routes of a service with the same options count as one, under the first name.

    Attributes:
        seconds: Time in which they were counted.
        errors: Responses with a status of 500 or more, of tasks or of the door.
        buckets: Number of responses by latency, from the request to the response's header.  Requests that no task
            answered are left out.
    """

    service_id: ServiceId
    route: str
    seconds: float = 0.0
    requests: int = 0
    errors: int = 0
    buckets: tuple[int, ...] = (0,) * BUCKETS

    def __add__(self, other: "RouteTraffic") -> "RouteTraffic":
        return msgspec.structs.replace(
            self,
            seconds=max(self.seconds, other.seconds),
            requests=sum_of_counts(self.requests, other.requests),
            errors=sum_of_counts(self.errors, other.errors),
            buckets=tuple(map(sum_of_counts, self.buckets, other.buckets)),
        )

    @property
    def is_plausible(self) -> bool:
        """Return whether a node can have counted this.  Nodes are not trusted, and may report anything."""
        return (
            len(self.buckets) == BUCKETS
            and 0 < self.seconds <= SECONDS_MAX
            and all(0 <= one <= COUNT_MAX for one in (self.requests, self.errors, *self.buckets))
            and self.route.isprintable()
            and len(self.route) <= ROUTE_CHARACTERS_MAX
        )

    @property
    def per_second(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds if self.seconds > 0 else 0.0

    @property
    def error_percent(self) -> float:
        """Failed requests of a hundred."""
        return 100 * self.errors / self.requests if self.requests else 0.0


def sum_of_counts(one: int, other: int) -> int:
    """Return the sum of two plausible counts, which is plausible as well."""
    return min(one + other, COUNT_MAX)


def added(parts: Iterable[RouteTraffic]) -> Iterator[RouteTraffic]:
    """Yield the requests to each route over all nodes, in order of the routes."""
    found: dict[tuple[str, str], RouteTraffic] = {}
    for one in parts:
        key = one.route, one.service_id
        found[key] = found[key] + one if key in found else one
    return (found[key] for key in sorted(found))


def quantile_ms(buckets: Sequence[int], share: float) -> float | None:
    """Return the latency that a ``share`` of the responses stays below, or None without responses.

    Within a bucket, latencies count as evenly spread.  In the last bucket, the result is its lower bound.

    Source: Prometheus, ``histogram_quantile``.
    """
    counts = list(accumulate(buckets))
    if not counts or not counts[-1]:
        return None
    rank = share * counts[-1]
    at = next(number for number, count in enumerate(counts) if count >= rank)
    if at >= len(BOUNDS_MS):
        return float(BOUNDS_MS[-1])
    low = BOUNDS_MS[at - 1] if at else 0
    below = counts[at - 1] if at else 0
    return low + (BOUNDS_MS[at] - low) * (rank - below) / max(1, buckets[at])


UNREADABLE: Final = "-"
"""Route of a service whose labels are no routes, as the API shows it."""


class RouteShown(ApiObject):
    """A route of the front door with its recent requests, as the API shows it.

    Attributes:
        tasks: Number of the service's tasks that shall run.
        state: ``ok``, ``at zero`` or ``failing``.
        problem: Reason why it does not work, with the next step, or empty.
        new_percent: Share of new connections for new tasks during a staged update, or None.
        requests_per_second: None if nothing was counted in the last minute.  Routes with the same options count under
            the first one.
        latency_p50: Milliseconds until the header of the response, as all latencies.
        certificate_expires: Set for administrators only.
    """

    route: str = always("")
    service: str = always("")
    service_id: ServiceId = ServiceId("")
    port: int = always(0)
    tasks: int = always(0)
    state: str = always("")
    problem: str = ""
    new_percent: int | None = None
    requests_per_second: float | None = None
    error_percent: float | None = None
    latency_p50: float | None = None
    latency_p95: float | None = None
    latency_p99: float | None = None
    certificate_expires: Timestamp = Timestamp("")


def with_traffic(shown: RouteShown, traffic: RouteTraffic | None) -> RouteShown:
    """Return a route with its recent requests."""
    if traffic is None:
        return shown
    p50, p95, p99 = (quantile_ms(traffic.buckets, share) for share in (0.5, 0.95, 0.99))
    return msgspec.structs.replace(
        shown,
        requests_per_second=round(traffic.per_second, 2),
        error_percent=round(traffic.error_percent, 2),
        latency_p50=p50,
        latency_p95=p95,
        latency_p99=p99,
    )
