"""Measurements of services: requests at front doors, and answers to queries."""

from collections.abc import Mapping
from math import isfinite
from typing import Final

import msgspec

from skep.model.options.autoscaling import TaskUsage
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId, ServiceId, TaskId

VALID_S: Final = 45.0
"""Seconds for which an answer counts.  Queries are asked every 15 seconds, so two of them may fail."""
IdleTimes = Mapping[ServiceId, float]
"""Seconds without a request at the front door, for the services of which they are known."""
IdleReports = Mapping[NodeId, IdleTimes]
"""The idle times that each node reports."""
DOOR_IDLE: Final = "/door/idle"
"""Path at which a node tells managers the idle times of services that it reads at that moment."""
IDLE_BYTES_MAX: Final = 64 << 10
"""Largest response.  It has at most 500 services."""
_RATE_MAX: Final = 1e9
"""No proxy has as many requests, so a report of more is ignored."""


class ServiceRequests(msgspec.Struct, frozen=True, kw_only=True):
    """HTTP requests to a service over one node's front door: mean number in flight, and number per second."""

    in_flight: float = 0.0
    per_second: float = 0.0

    @property
    def is_plausible(self) -> bool:
        """Return whether a proxy can have that many.  Nodes are not trusted, and may report any number."""
        return all(isfinite(one) and 0 <= one <= _RATE_MAX for one in (self.in_flight, self.per_second))


class QueueLine(ApiObject):
    """Exit code of a command that reads a queue's length, and the first line of its output."""

    exit_code: int = always(0)
    line: str = always("")


class QueryAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The last figure of a query, with its age, and the reason why the query failed since."""

    figure: float | None = None
    age_s: float = 0.0
    problem: str = ""

    @property
    def valid(self) -> float | None:
        """Return the figure if it still counts."""
        return self.figure if self.age_s <= VALID_S else None


class ScalingMeasurements(msgspec.Struct, frozen=True, kw_only=True):
    """Measurements of autoscaled services, from all managers.

    Attributes:
        requests: By service, the reports of nodes with a proxy.
        answers: By service, the answers to queries by the name of their measure.  Only the leader has them.
        idle: By node with a proxy, the seconds without a request of services that may be scaled to zero.
    """

    usages: Mapping[TaskId, TaskUsage] = {}
    requests: Mapping[ServiceId, Mapping[NodeId, ServiceRequests]] = {}
    answers: Mapping[ServiceId, Mapping[str, QueryAnswer]] = {}
    idle: IdleReports = {}
