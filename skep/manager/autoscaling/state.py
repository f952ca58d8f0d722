"""State of autoscaling: the autoscaled services with their history, and the due change of one.

A leader only remembers its own observations: since when tasks run, and its recommendations.  A new leader starts
without them, so it changes nothing before it has observed the tasks for a while, and removes no task for a whole
window.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Final

import msgspec
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.manager.autoscaling.decision import (
    SETTLE_S,
    Readings,
    Recommendations,
    ScalingDecision,
    blocked,
    decide,
    readings_of,
    to_zero,
)
from skep.manager.autoscaling.totals import totals_of
from skep.manager.control_loops.failures import isolated
from skep.manager.nodes.trust import trusted_of
from skep.manager.queries.board import AskedQuery, QueryKey
from skep.manager.services.freezes import held_by, is_held_at_commit, stack_of_service
from skep.manager.services.routes import proxies_in
from skep.model.door.settings import is_door
from skep.model.measures.readings import IdleReports, IdleTimes, ScalingMeasurements
from skep.model.node import Node, NodeState
from skep.model.options.autoscaling import (
    Autoscaling,
    autoscaling_of,
    wakes_on_request,
    with_number_within_range,
    with_replicas,
)
from skep.model.service import Autoscaled, Service, ServiceSpec
from skep.model.staging.updates import continued
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.times import SECOND_NS, timestamp
from skep.store.interface import Commit, Created, Deleted, Transaction, Updated, View

PROBLEM_AFTER_S = 60.0
"""Seconds after which an unknown measure is recorded.  A new leader has the first answers within some seconds, and a
proxy that restarts reports again within twenty.
"""

SET_BACK_S: Final = 24 * 3600
"""Seconds by which a clock may be set back without an effect on schedules.  A larger step corrects a wrong date."""
WithinQuota = Callable[[View, Service, int], tuple[int, str]]
"""Returns the most tasks, up to a number, that the quota of a service's stack allows, and why it allows no others."""
UNKNOWN: Final[IdleTimes] = {}
CheckQuota = Callable[[Transaction, ServiceSpec, Service], None]
"""Raises PermissionDenied if the spec exceeds the quota."""


class Quota(msgspec.Struct, frozen=True):
    """Limits for the services of a stack (``manager.services.quotas``)."""

    within: WithinQuota
    check: CheckQuota


class AutoscalingCounts:
    """Counts for Prometheus, over all terms of this manager."""

    def __init__(self) -> None:
        self.changes = {"up": 0, "down": 0}
        self.services = 0
        """Autoscaled services that this manager decides about.  0 on managers other than the leader."""
        self.unknown = 0
        """Tasks of these services that were not measured at the last decision."""


class Doors(msgspec.Struct, frozen=True):
    """The front door in one period: nodes on which a proxy runs, and the idle times of services."""

    proxies: frozenset[NodeId] = frozenset()
    idle: IdleTimes = UNKNOWN


class MeasureProblem(msgspec.Struct, frozen=True, kw_only=True):
    """A change of the problem with a service's measures to write.  Empty once all of them are known again."""

    service_id: ServiceId
    problem: str


class Scaling(msgspec.Struct, frozen=True, kw_only=True):
    """A change to write."""

    service_id: ServiceId
    present: int
    """The number of replicas at the decision."""
    scaling: Autoscaling
    """The autoscaling settings at the decision."""
    replicas: int
    reason: str
    now_ns: int


class AutoscalerState:
    """Autoscaled services, and this leader's observations of them."""

    def __init__(
        self, view: Callable[[], View], clock: Clock, quota: Quota, counts: AutoscalingCounts
    ) -> None:
        self._view = view
        self._clock = clock
        self._quota = quota
        self._counts = counts
        self.services: dict[ServiceId, Recommendations | None] = {}
        """History of each autoscaled service, or None before its first decision."""
        self._running_since: dict[TaskId, float] = {}
        """Times at which this leader first saw tasks of these services running, on its monotonic clock."""
        self.doors: set[ServiceId] = set()
        """Services of the front door."""
        self._latest_s = 0
        """Latest time of schedules, in seconds since the epoch."""
        self._problems: dict[ServiceId, tuple[str, float]] = {}
        """Problem with each service's measures at the last decision, and since when there is one."""
        self._outdated: set[ServiceId] = set()
        """Services with a problem of measures whose autoscaling was removed."""

    def start(self, view: View) -> None:
        """Start over from a snapshot."""
        # A watch that lagged restarts, as a term does: it is unknown whether earlier observations still hold.
        self.services.clear()
        self._running_since.clear()
        self.doors.clear()
        self._problems.clear()
        self._outdated.clear()
        for service in view.find(Service):
            self._note_service(service)

    def on_commit(self, commit: Commit) -> None:
        """Record which services are autoscaled, and since when their tasks run."""
        for event in commit.events:
            match event:
                case Created(Service() as service) | Updated(_, Service() as service):
                    self._note_service(service)
                case Deleted(Service() as service):
                    self._forget(service.id)
                    self._outdated.discard(service.id)
                    self.doors.discard(service.id)
                case Created(Task() as task) | Updated(_, Task() as task):
                    self._note_task(task)
                case Deleted(Task() as task):
                    self._running_since.pop(task.id, None)

    def _note_service(self, service: Service) -> None:
        if service.removed_at is None and is_door(service.spec.labels):
            self.doors.add(service.id)
        else:
            self.doors.discard(service.id)
        self._outdated.discard(service.id)
        if service.removed_at is not None or autoscaling_of(service.spec.labels) is None:
            self._forget(service.id)
            if service.removed_at is None and service.autoscaling_problem:
                self._outdated.add(service.id)
        elif service.id not in self.services:
            self.services[service.id] = None
            with isolated("autoscaling", service.id):
                for task in self._view().find(Task, service_id=service.id):
                    self._note_task(task)

    def _forget(self, id: ServiceId) -> None:
        self.services.pop(id, None)
        self._problems.pop(id, None)

    def wanted_queries(self) -> dict[QueryKey, AskedQuery]:
        """Return the queries of all autoscaled services that may scale."""
        view, found = self._view(), dict[QueryKey, AskedQuery]()
        for id in sorted(self.services):
            service = view.lookup(Service, id)
            scaling = autoscaling_of(service.spec.labels) if service is not None else None
            if service is None or scaling is None or not scaling.queries or blocked(service):
                continue
            trusted, stack = trusted_of(view, service).queries, stack_of_service(service)
            for name, one in scaling.queries.items():
                found[id, name] = AskedQuery(one.query, one.query in trusted, stack, service_id=id)
        return found

    def _note_task(self, task: Task) -> None:
        if task.service_id not in self.services or task.status.state is not TaskState.RUNNING:
            self._running_since.pop(task.id, None)
        else:
            self._running_since.setdefault(task.id, self._clock.monotonic())

    def read_doors(self, found: ScalingMeasurements) -> Doors:
        """Return the front door, as far as a decision in this period may need it."""
        view = self._view()
        may_scale_to_zero = any(
            service.spec.replicas == 1 and wakes_on_request(service.spec.labels)
            for id in self.services
            if (service := view.lookup(Service, id)) is not None
        )
        idle = idle_times(door_nodes(view, self.doors), found.idle) if may_scale_to_zero else UNKNOWN
        return Doors(proxies_in(view, self.doors), idle)

    def decide(self, id: ServiceId, found: ScalingMeasurements, now: float, doors: Doors) -> Scaling | None:
        """Return the due change of a service, or None."""
        view = self._view()
        service = view.lookup(Service, id)
        scaling = autoscaling_of(service.spec.labels) if service is not None else None
        if service is None or scaling is None or id not in self.services:
            return None
        present = scaling.at(self._schedule_time())
        decision = self._decide(view, service, present, found, now, doors)
        if decision.replicas is None:
            return None
        return Scaling(
            service_id=id,
            present=service.spec.replicas,
            scaling=scaling,
            replicas=decision.replicas,
            reason=decision.reason,
            now_ns=self._clock.now_ns(),
        )

    def _schedule_time(self) -> int:
        """Return the seconds since the epoch that schedules count: a clock that is set back undoes no entry."""
        now_s = self._clock.now_ns() // SECOND_NS
        self._latest_s = now_s if self._latest_s - now_s > SET_BACK_S else max(self._latest_s, now_s)
        return self._latest_s

    def _decide(
        self,
        view: View,
        service: Service,
        scaling: Autoscaling,
        found: ScalingMeasurements,
        now: float,
        doors: Doors,
    ) -> ScalingDecision:
        present, history = service.spec.replicas, self.services[service.id]
        if history is None or history.expected != present:  # set by a user, so it stays for a window
            history = self.services[service.id] = Recommendations(present, now)

        def has_settled(id: TaskId) -> bool:
            return now - self._running_since.get(id, now) >= SETTLE_S

        tasks = view.find(Task, service_id=service.id)
        totals = totals_of(service.id, scaling, found, doors.proxies)
        readings = readings_of(service, scaling, tasks, found.usages, has_settled, totals)
        self._note_problem(service, readings, now)
        self._counts.unknown += readings.unknown
        decision = decide(service, scaling, readings, history, now)
        if decision.replicas is None and not blocked(service):
            decision = to_zero(present, scaling, doors.idle.get(service.id), history, now) or decision
        if decision.replicas is not None and decision.replicas < present:
            held = held_by(view, stack_of_service(service))
            return replace(decision, replicas=None, reason=held) if held else decision
        if decision.replicas is None:
            return decision
        within, why = self._quota.within(view, service, decision.replicas)
        return replace(
            decision, replicas=within if within != present else None, reason=why or decision.reason
        )

    def _note_problem(self, service: Service, readings: Readings, now: float) -> None:
        problem = "; ".join(one.unknown for one in readings.measures if one.problem)
        if not problem or blocked(service):
            self._problems.pop(service.id, None)
        else:
            _, since = self._problems.get(service.id, ("", now))
            self._problems[service.id] = problem, since

    def due_problem(self, id: ServiceId, now: float) -> MeasureProblem | None:
        """Return the change of the stored problem that the last decision about a service leads to, or None."""
        service = self._view().lookup(Service, id)
        if service is None or id not in self.services or blocked(service):
            return None
        problem, since = self._problems.get(id, ("", now))
        # The words may change with each attempt, so only the first ones are written.
        if bool(problem) is bool(service.autoscaling_problem) or (problem and now - since < PROBLEM_AFTER_S):
            return None
        return MeasureProblem(service_id=id, problem=problem)

    def outdated_problems(self) -> list[MeasureProblem]:
        """Return the changes that clear problems after autoscaling was removed."""
        return [MeasureProblem(service_id=id, problem="") for id in sorted(self._outdated)]

    def note_change(self, one: Scaling) -> None:
        """Record that a change was written."""
        history = self.services.get(one.service_id)
        if history is not None:
            history.expected = one.replicas
        self._counts.changes["up" if one.replicas > one.present else "down"] += 1


def write_problem(tx: Transaction, one: MeasureProblem) -> None:
    """Write the problem with a service's measures, or clear it."""
    service = tx.lookup(Service, one.service_id)
    if service is not None and service.removed_at is None and service.autoscaling_problem != one.problem:
        tx.put(replace(service, autoscaling_problem=one.problem))


def door_nodes(view: View, doors: Collection[ServiceId]) -> frozenset[NodeId]:
    """Return the nodes whose proxies may have requests.  A node that is down has none, as far as anyone can know.

    Args:
        doors: The services of the front door.
    """
    return frozenset(
        task.node_id
        for id in sorted(doors)
        for task in view.find(Task, service_id=id)
        if _may_have_requests(task)
        and (node := view.lookup(Node, task.node_id)) is not None
        and node.status.state is not NodeState.DOWN
    )


def has_door(view: View, node_id: NodeId) -> bool:
    """Return whether the node's proxy may have requests.  Finds it without looking at all services."""
    return any(
        (service := view.lookup(Service, task.service_id)) is not None and is_door(service.spec.labels)
        for task in view.find(Task, node_id=node_id)
        if _may_have_requests(task)
    )


def _may_have_requests(task: Task) -> bool:
    return (
        bool(task.node_id)
        and TaskState.ASSIGNED.number <= task.status.state.number <= TaskState.RUNNING.number
    )


def idle_times(doors: Collection[NodeId], reports: IdleReports) -> IdleTimes:
    """Return the seconds without a request at any proxy, of the services that every one of ``doors`` reports."""
    first, *others = [reports.get(node, {}) for node in doors] or [{}]
    return {
        id: min((seconds, *(one[id] for one in others)))
        for id, seconds in first.items()
        if all(id in one for one in others)
    }


def without_used(due: Iterable[Scaling], idle: IdleTimes) -> list[Scaling]:
    """Return the changes without those to zero, unless ``idle`` still has no request.

    The decision is about reports that are up to 15 s old, and a WebSocket may have begun since.
    """
    return [one for one in due if one.replicas or idle.get(one.service_id, 0.0) >= one.scaling.idle_after_s]


def write_replicas(tx: Transaction, one: Scaling, check_quota: CheckQuota) -> bool:
    """Set the number of replicas, as ``docker service scale`` does.

    Returns False if a user has changed the service meanwhile.  A rollback does not restore the number, so the previous
    spec gets it too.

    Raises:
        PermissionDenied: The stack's quota does not allow the number at present.
    """
    service = tx.rely_on(Service, one.service_id)
    if (
        service is None
        or service.removed_at is not None
        or service.spec.replicas != one.present
        or autoscaling_of(service.spec.labels) != one.scaling
        or blocked(service, one.replicas)
        or (one.replicas < one.present and is_held_at_commit(tx, stack_of_service(service)))
    ):
        return False
    put_replicas(tx, service, one.replicas, one.reason, one.now_ns, check_quota)
    return True


def put_replicas(
    tx: Transaction, service: Service, replicas: int, reason: str, now_ns: int, check_quota: CheckQuota
) -> None:
    """Put a service with another number of tasks, and the reason.  A staged update of it continues.

    Raises: PermissionDenied: beyond the quota.
    """
    spec, previous = with_replicas(service.spec, replicas), service.previous_spec
    check_quota(tx, spec, service)
    if previous is not None:
        previous = with_number_within_range(previous, replicas)
    done = Autoscaled(before=service.spec.replicas, after=replicas, reason=reason, at=timestamp(now_ns))
    tx.put(
        replace(
            service,
            spec=spec,
            previous_spec=previous,
            update_status=continued(service, spec) or service.update_status,
            autoscaled=done,
        )
    )
