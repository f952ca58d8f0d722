"""Decides how many tasks an autoscaled service should have.  Pure.

As in Kubernetes' HorizontalPodAutoscaler, the wanted number is the total usage of all tasks divided by the target usage
of one task.  If the number would grow, tasks without a measurement count as idle.  If it would shrink, tasks that do
not run yet or have just started count as exactly at the target.  A running task whose node reports nothing then
prevents the change, because it might be among the tasks to remove.  A difference of up to ``TOLERANCE`` changes
nothing.

Other measures are totals of the service (``totals``), also divided by the target of one task.  A total that is not
known, or only in part, can let the number grow, but never shrink.  The measure that needs the most tasks decides.

The number grows at once, at most by a factor of two in each step.  It shrinks only to the largest number that was
recommended within the service's window, so that a short pause of the load removes no task.  After it has grown, it does
not shrink for a whole window.

Source: kubernetes, pkg/controller/podautoscaler/{horizontal,replica_calculator}.go.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil
from typing import Final

import msgspec

from skep.model.options.autoscaling import (
    Autoscaling,
    TaskUsage,
    is_at_zero,
    memory_of_a_task,
    nano_cpus_of_a_task,
)
from skep.model.options.labels import is_stopped
from skep.model.service import PAUSED, UNDER_WAY, Service
from skep.model.task import Task, TaskState
from skep.model.values.counts import counted
from skep.model.values.ids import TaskId

PERIOD_S = 15.0
"""Seconds between two decisions about a service."""
SETTLE_S = 10.0
"""Seconds for which a running task counts as just started.  It uses resources for its start, and has little load
yet.
"""
TOLERANCE = 0.1
"""Relative difference that changes nothing.  Kubernetes has the same default."""
AT_ZERO: Final = "scaled to zero"
_TASKS_MAX: Final = 1e9
"""Largest number of tasks that is computed, above each range.  A quotient of two finite numbers may be infinite."""
GROWTH_MAX = 2
"""Maximum factor by which the number grows in one step."""


class Measure(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of a service.

    Attributes:
        sum: Sum of the measured tasks' usage in percent, or the total of the service.
        known: Number of measured tasks.
        problem: Reason why a total is not known, or only in part.
    """

    name: str
    target: float
    sum: float
    known: int = 0
    is_total: bool = False
    problem: str = ""

    @property
    def average(self) -> float:
        """Average of the measured tasks, in percent."""
        return self.sum / self.known if self.known else 0.0

    @property
    def unknown(self) -> str:
        """Return the problem with the measure's name, or an empty text."""
        return f"{self.name} not known: {self.problem}" if self.problem else ""


class Readings(msgspec.Struct, frozen=True, kw_only=True):
    """The measurements of a service's tasks.

    Attributes:
        unknown: Number of desired tasks without a measurement.
        silent: Number of tasks among ``unknown`` that have been running for a while.
    """

    measures: tuple[Measure, ...]
    unknown: int = 0
    silent: int = 0


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """The number of replicas that the measurements recommend, within the range, and the reason."""

    replicas: int
    reason: str


class Recommendations:
    """The recommendations of one leader for one service.  Finds the maximum within a window in amortized constant
    time.
    """

    def __init__(self, replicas: int, now: float) -> None:
        """Start with the present number of tasks.  Another leader or a user has set it, so it is kept for a window."""
        self.since = now
        """Since when this leader knows the service, or the number that a user or a request has set."""
        self.expected = replicas
        """The number at this leader's last check or change.  If the service has another number, a user has set it."""
        self._falling: deque[tuple[float, int]] = deque([(now, replicas)])
        """Recommendations in decreasing order.  Earlier entries that are not larger than a new one are dropped, because
        they cannot be the maximum again.
        """

    def add(self, replicas: int, now: float) -> None:
        """Record a recommendation."""
        while self._falling and self._falling[-1][1] <= replicas:
            self._falling.pop()
        self._falling.append((now, replicas))

    def largest(self, window_s: float, now: float) -> int:
        """Return the largest recommendation of the window.  Call ``add`` first."""
        while len(self._falling) > 1 and self._falling[0][0] <= now - window_s:
            self._falling.popleft()
        return self._falling[0][1]


class ScalingDecision(msgspec.Struct, frozen=True, kw_only=True):
    """The number of ``replicas`` to write, or None to keep the current one, with the ``reason``."""

    replicas: int | None
    reason: str


def readings_of(
    service: Service,
    scaling: Autoscaling,
    tasks: Sequence[Task],
    usages: Mapping[TaskId, TaskUsage],
    has_settled: Callable[[TaskId], bool] = lambda _: True,
    totals: Iterable[Measure] = (),
) -> Readings:
    """Collect the measurements of the service's ``tasks``.

    Args:
        has_settled: Returns whether a task has run for a while.
        totals: Measures of the whole service.
    """
    running = [
        task.id
        for task in tasks
        if task.is_wanted and task.status.state is TaskState.RUNNING and has_settled(task.id)
    ]
    known = [usages[id] for id in running if id in usages]
    cpus, memory = nano_cpus_of_a_task(service.spec), memory_of_a_task(service.spec)
    measures = []
    if scaling.cpu is not None:
        total = 100 * sum(usage.nano_cpus for usage in known) / cpus
        measures.append(Measure(name="cpu", target=scaling.cpu, sum=total, known=len(known)))
    if scaling.memory is not None and memory:
        total = 100 * sum(usage.memory_bytes for usage in known) / memory
        measures.append(Measure(name="memory", target=scaling.memory, sum=total, known=len(known)))
    return Readings(
        measures=(*measures, *totals),
        unknown=max(service.spec.replicas - len(known), 0),
        silent=len(running) - len(known),
    )


def recommendation(present: int, scaling: Autoscaling, readings: Readings) -> Recommendation:
    """Return the recommendation of the metric that needs the most tasks."""
    asked = [(wanted(present, measure, readings), measure) for measure in readings.measures]
    if not asked:
        return Recommendation(replicas=scaling.clamped(present), reason="no measurements")
    number, measure = max(asked, key=lambda one: one[0])
    unknown = [one.unknown for one in readings.measures if one.problem and one is not measure]
    reason = "; ".join((_reason(measure, readings), *unknown))
    # Only ``to_zero`` removes the last task.
    return Recommendation(replicas=scaling.clamped(max(number, min(present, 1))), reason=reason)


def _reason(measure: Measure, readings: Readings) -> str:
    if measure.is_total:
        figure = f"{measure.name} {measure.sum:.4g}, target {measure.target:g} for each task"
        known = figure if measure.sum or not measure.problem else ""
        return "; ".join(filter(None, (known, measure.unknown)))
    tasks = measure.known + readings.unknown
    if not measure.known:
        return f"none of its {counted(tasks, 'task')} is measured"
    return f"{measure.name} {measure.average:.0f}%, target {measure.target:g}%, over {measure.known} of {tasks} tasks"


def wanted(present: int, measure: Measure, readings: Readings) -> int:
    """Return the number of tasks by one metric, or the current one if the metric is not conclusive."""
    if present <= 0 or not (measure.known or measure.is_total):
        return present
    at_least = min(measure.sum / measure.target, _TASKS_MAX)
    """Number of tasks that would exactly meet the target with the usage of the measured tasks."""
    if at_least > present * (1 + TOLERANCE):
        return ceil(at_least)
    at_most = at_least if measure.is_total else at_least + readings.unknown
    may_shrink = not (measure.problem if measure.is_total else readings.silent)
    if may_shrink and at_most < present * (1 - TOLERANCE):
        return max(ceil(at_most), 1)
    return present


def blocked(service: Service, least: int = 0) -> str:
    """Return the reason why the number must not change, whatever the load is, or an empty string.

    Args:
        least: The least number at present, by the schedule.  Above 0, it starts a service that is scaled to zero.
    """
    if is_stopped(service.spec.labels):
        return "the service is stopped"
    if is_at_zero(service.spec):
        if not least:
            return AT_ZERO
    elif not service.spec.replicas:
        return "it was scaled to 0: autoscaling is off until it has a task again"
    state = service.update_status.state if service.update_status is not None else None
    if state in UNDER_WAY:
        return "an update or rollback is in progress"
    if state in PAUSED:
        return "its update is paused"
    return ""


def decide(
    service: Service, scaling: Autoscaling, readings: Readings, history: Recommendations, now: float
) -> ScalingDecision:
    """Decide about one service at ``now`` (monotonic seconds), and record the recommendation in ``history``."""
    present = service.spec.replicas
    if why := blocked(service, scaling.least):
        history.add(present, now)
        return ScalingDecision(replicas=None, reason=why)
    if (clamped := scaling.clamped(present)) != present:
        history.add(clamped, now)
        whose = " of its schedule" if scaling.is_scheduled else ""
        reason = f"{present} is outside the range {scaling.least} to {scaling.most}{whose}"
        return ScalingDecision(replicas=clamped, reason=reason)
    asked = recommendation(present, scaling, readings)
    history.add(asked.replicas, now)
    if asked.replicas > present:
        return ScalingDecision(replicas=min(asked.replicas, GROWTH_MAX * present), reason=asked.reason)
    lowest = history.largest(scaling.down_after_s, now)
    if lowest < present:
        return ScalingDecision(replicas=lowest, reason=asked.reason)
    return ScalingDecision(replicas=None, reason=held(asked, present, scaling, readings))


def to_zero(
    present: int, scaling: Autoscaling, idle_s: float | None, history: Recommendations, now: float
) -> ScalingDecision | None:
    """Return the decision to remove the last task of a service without requests, or None.

    Args:
        idle_s: Seconds without a request, or None if unknown.
    """
    after_s = scaling.idle_after_s
    # The leader's own observation covers requests that are too recent for the reports.
    if scaling.least or present != 1 or idle_s is None or min(idle_s, now - history.since) < after_s:
        return None
    return ScalingDecision(replicas=0, reason=f"no request for {after_s:g} s")


def held(
    asked: Recommendation, present: int, scaling: Autoscaling, readings: Readings, frozen: str = ""
) -> str:
    """Return the reason why the number does not change.

    Args:
        frozen: Why Skep does not scale down now, or an empty text.
    """
    if asked.replicas < present:
        until = f"but {frozen}" if frozen else f"scaling down after {scaling.down_after_s:g} s"
        return f"{asked.reason}: {asked.replicas} would suffice, {until}"
    above = any(measure.sum / measure.target > present * (1 + TOLERANCE) for measure in readings.measures)
    if above and present == scaling.most:
        whose = " of its schedule" if scaling.is_scheduled else ""
        return f"{asked.reason}: it is at its maximum number of tasks{whose}"
    return asked.reason


def shown_reason(present: int, scaling: Autoscaling, readings: Readings, frozen: str = "") -> str:
    """Return the reason as far as any manager can know it.  Only the leader knows the recommendations of the window.

    Args:
        frozen: Why Skep does not scale down now, or an empty text.
    """
    asked = recommendation(present, scaling, readings)
    if asked.replicas > present:
        return f"{asked.reason}: it needs {asked.replicas}"
    return held(asked, present, scaling, readings, frozen)
