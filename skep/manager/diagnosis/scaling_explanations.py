"""Explains the number of an autoscaled service's tasks."""

from collections.abc import Callable, Collection, Mapping, Sequence

from skep.manager.autoscaling.decision import Measure, blocked, readings_of, recommendation, shown_reason
from skep.manager.autoscaling.totals import totals_of
from skep.model.measures.readings import ScalingMeasurements
from skep.model.options.autoscaling import Autoscaling, autoscaling_of
from skep.model.service import Autoscaled, Service
from skep.model.task import Task
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId
from skep.model.values.times import SECOND_NS


class MetricExplanation(ApiObject):
    """One metric that autoscaling uses: ``cpu``, ``memory``, ``requests``, ``rps``, ``query`` or ``queue``.

    ``cpu`` and ``memory`` are in percent.  The others are totals of the service, which are divided among the tasks.
    """

    name: str = ""
    target: float = 0
    """Target of one task."""
    average: float | None = None
    """Average of the measured tasks, or None if none is measured."""
    total: float | None = None
    """The total, or None if it is not known."""
    problem: str = ""
    """Reason why a total is not known, or only in part."""


class AutoscalingExplanation(ApiObject):
    """State of a service's autoscaling."""

    min: int = always(0)
    max: int = 0
    """The range, at present if the service has a schedule."""
    is_scheduled: bool = False
    """Whether the range is the schedule's."""
    metrics: tuple[MetricExplanation, ...] = ()
    unmeasured: int = always(0)
    """Tasks without a measurement."""
    summary: str = always("")
    """The reason for the current number of tasks."""
    last_change: Autoscaled | None = None
    """The last change by autoscaling."""


def _metric(one: Measure) -> MetricExplanation:
    if one.is_total:
        total = one.sum if one.sum or not one.problem else None
        return MetricExplanation(name=one.name, target=one.target, total=total, problem=one.problem)
    average = round(one.average, 1) if one.known else None
    return MetricExplanation(name=one.name, target=one.target, average=average)


def _why_last_stays(
    service: Service,
    scaling: Autoscaling,
    found: ScalingMeasurements,
    doors: Mapping[NodeId, str],
    frozen: str,
) -> str:
    """Return why the last task of a service that may be scaled to zero runs, or an empty text."""
    if scaling.least or service.spec.replicas != 1:
        return ""
    if not doors:
        return "its last task stays, because no proxy of the front door counts its requests"
    silent = sorted(name for id, name in doors.items() if service.id not in found.idle.get(id, {}))
    if silent:
        return f"its last task stays, because its requests on {', '.join(silent)} are not known"
    if frozen:
        return f"its last task stays: {frozen}"
    idle_s = min(found.idle[id][service.id] for id in doors)
    return f"its last task stops after {scaling.idle_after_s:g} s without a request, {idle_s:.0f} s of which are over"


def explain_autoscaling(
    service: Service,
    tasks: Sequence[Task],
    found: ScalingMeasurements,
    within_quota: Callable[[int], tuple[int, str]],
    *,
    proxies: Collection[NodeId] = (),
    doors: Mapping[NodeId, str] | None = None,
    frozen: str = "",
    now_ns: int = 0,
) -> AutoscalingExplanation | None:
    """Return the inputs of autoscaling, or None if the service is not autoscaled.

    The stabilization window is missing: only the leader has it.

    Args:
        within_quota: Returns how many of N tasks the quota of the service's stack allows, and why not more.
        proxies: Nodes on which a task of the front door runs.
        doors: Names of the nodes whose proxies may have requests.
        frozen: Why Skep does not scale down now, or an empty text.
    """
    scaling = autoscaling_of(service.spec.labels)
    if scaling is None:
        return None
    scaling = scaling.at(now_ns // SECOND_NS)
    totals = totals_of(service.id, scaling, found, proxies)
    readings = readings_of(service, scaling, tasks, found.usages, totals=totals)
    asked = recommendation(service.spec.replicas, scaling, readings)
    reason = blocked(service) or shown_reason(service.spec.replicas, scaling, readings, frozen)
    if not blocked(service) and asked.replicas > service.spec.replicas:
        reason = within_quota(asked.replicas)[1] or reason
    elif not blocked(service) and (stays := _why_last_stays(service, scaling, found, doors or {}, frozen)):
        reason = f"{reason}; {stays}"
    return AutoscalingExplanation(
        min=scaling.least,
        max=scaling.most,
        is_scheduled=scaling.is_scheduled,
        metrics=tuple(map(_metric, readings.measures)),
        unmeasured=readings.unknown,
        summary=reason,
        last_change=service.autoscaled,
    )
