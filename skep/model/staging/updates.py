"""Staged updates: labels with which an update moves connections to the new tasks in steps (``skep.update``).

``canary`` starts a few new tasks in addition to the old ones and raises their share of new connections step by step.
``blue-green`` starts all of them, gives them all new connections at once, and keeps the old ones for a time.
"""

import re
from collections.abc import Mapping
from math import inf
from typing import Final

import msgspec
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.model.door.routes import has_routes
from skep.model.door.traffic import COUNT_MAX, sum_of_counts
from skep.model.measures.queries import (
    UPDATE_PROMETHEUS,
    UPDATE_QUERY,
    MetricQuery,
    checked_expression,
    checked_url,
)
from skep.model.options.overlap import why_stop_first
from skep.model.service import (
    EndpointSpec,
    PublishMode,
    Service,
    ServiceSpec,
    TaskSpec,
    UpdateConfig,
    UpdateFailureAction,
    UpdateSplit,
    UpdateState,
    UpdateStatus,
)
from skep.model.staging.shares import ALL_PERCENT
from skep.model.values.counts import counted
from skep.model.values.times import SECOND_NS, Timestamp, duration_ns, exact_duration

UPDATE: Final = "skep.update"
CANARY: Final = "canary"
BLUE_GREEN: Final = "blue-green"
UPDATE_STEPS: Final = "skep.update.steps"
"""Shares of new connections, in percent."""
UPDATE_STEP_TIME: Final = "skep.update.step-time"
"""Time that each step lasts at least."""
UPDATE_KEEP: Final = "skep.update.keep"
"""Time for which blue-green keeps the old tasks after the switch."""
UPDATE_PROMOTE: Final = "skep.update.promote"
"""``manual`` lets each step wait for ``skep update promote``."""
MAX_ERRORS: Final = "skep.update.max-errors"
MAX_LATENCY: Final = "skep.update.max-latency"
"""RequestBounds for HTTP requests to new tasks over the front door: failed ones, and the mean time of a response."""
QUERY_MAX: Final = "skep.update.query-max"
QUERY_MIN: Final = "skep.update.query-min"
"""The bounds of that value."""
QUERY_WAIT: Final = "skep.update.query-wait"
"""Time for which the value may be out of bounds, or unknown, before the update rolls back."""
UPDATE_LABELS: Final = (
    UPDATE,
    UPDATE_STEPS,
    UPDATE_STEP_TIME,
    UPDATE_KEEP,
    UPDATE_PROMOTE,
    MAX_ERRORS,
    MAX_LATENCY,
    UPDATE_PROMETHEUS,
    UPDATE_QUERY,
    QUERY_MAX,
    QUERY_MIN,
    QUERY_WAIT,
)
_ONLY: Final = {UPDATE_STEPS: CANARY, UPDATE_STEP_TIME: CANARY, UPDATE_KEEP: BLUE_GREEN}
"""Labels that belong to one kind of update."""

AUTO: Final = "auto"
MANUAL: Final = "manual"
DEFAULT_STEPS: Final = (5, 25)
"""Few users see a bad version in the first step, and the second one shows how it bears load."""
STEPS_MAX: Final = 20
"""Most steps of an update.  More than that would be a mistake."""
DEFAULT_STEP_S: Final = 60.0
"""Long enough for some health checks, which docker runs every 30 seconds by default."""
DEFAULT_KEEP_S: Final = 600.0
"""Long enough to notice errors that only many users find, and to switch back."""
DEFAULT_QUERY_WAIT_S: Final = 60.0
"""Four answers.  A Prometheus restarts within this time, and users of a bad version should not wait longer."""
STEP_S_MAX: Final = 7 * 24 * 3600.0
"""Longest time of a step.  More than a week is a mistake."""
_PERCENT: Final = re.compile(r"([1-9][0-9]?|100)%", re.ASCII)


class UpdateStage(msgspec.Struct, frozen=True):
    """A step of a staged update.

    Attributes:
        percent: Share of new connections for the new tasks.  None to treat all tasks alike.
        slots_percent: Share of the slots that have a new task, rounded up.
        least_s: Least time in seconds.  Infinity for a step that waits for a user.
        keeps_old: Whether old tasks stay although their successors run.  False in the last step.
    """

    percent: int | None
    slots_percent: int
    least_s: float = 0.0
    keeps_old: bool = True


IN_PROGRESS: Final = "update in progress"
"""Docker's message."""
WITHOUT_TASKS: Final = "a task, without which the update stays in its step"
"""End of the step of a service that was scaled to 0."""
_PERCENTAGE: Final = re.compile(r"(100|[0-9]{1,2}(?:\.[0-9]{1,2})?)%", re.ASCII)
_NUMBER: Final = re.compile(r"-?[0-9]{1,12}(?:\.[0-9]{1,9})?", re.ASCII)
SHOWN_MAX: Final = 100
"""Most characters of a query in a sentence."""
REQUESTS_MIN: Final = 20
"""Fewest requests of which a rate is judged.  Fewer ones exceed a bound if this many would, however the others end."""


class TaskRequests(msgspec.Struct, frozen=True, kw_only=True):
    """Recent HTTP requests to a task over the front door.  ``milliseconds``: of all responses together."""

    requests: int = 0
    errors: int = 0
    milliseconds: int = 0

    def __add__(self, other: "TaskRequests") -> "TaskRequests":
        return TaskRequests(
            requests=sum_of_counts(self.requests, other.requests),
            errors=sum_of_counts(self.errors, other.errors),
            milliseconds=sum_of_counts(self.milliseconds, other.milliseconds),
        )

    @property
    def is_plausible(self) -> bool:
        """Return whether a node can have counted this.  Nodes are not trusted, and may report any number."""
        return all(0 <= one <= COUNT_MAX for one in (self.requests, self.errors, self.milliseconds))


class RequestBounds(msgspec.Struct, frozen=True):
    """Limits for requests to new tasks.  None for no limit."""

    errors_percent: float | None = None
    latency_s: float | None = None

    def exceeded(self, seen: TaskRequests) -> str:
        """Return which limit the requests exceed, or an empty text."""
        if not seen.requests:
            return ""
        percent, mean_s = 100 * seen.errors / seen.requests, seen.milliseconds / seen.requests / 1000
        # Missing requests count as successes.
        least_percent = 100 * seen.errors / max(seen.requests, REQUESTS_MIN)
        if self.errors_percent is not None and least_percent > self.errors_percent:
            return (
                f"because {seen.errors} of {seen.requests} requests to new tasks failed ({percent:.3g} %), more than "
                f"{self.errors_percent:g} %"
            )
        if seen.requests >= REQUESTS_MIN and self.latency_s is not None and mean_s > self.latency_s:
            return (
                f"because responses of new tasks took {mean_s:.3g} s on average "
                f"({counted(seen.requests, 'request')}), more than {self.latency_s:g} s"
            )
        return ""


class QueryBounds(msgspec.Struct, frozen=True):
    """A query whose figure must be within bounds.  ``wait_s``: seconds before an update rolls back."""

    query: MetricQuery
    least: float = -inf
    most: float = inf
    wait_s: float = DEFAULT_QUERY_WAIT_S

    def exceeded(self, figure: float) -> str:
        """Return which bound the figure exceeds, without the figure, or an empty text."""
        if figure > self.most:
            return f"its query returns more than {self.most:g}"
        return f"its query returns less than {self.least:g}" if figure < self.least else ""


class QueryVerdict(msgspec.Struct, frozen=True):
    """Verdict from the latest answer to an update's query.  Times are the leader's monotonic seconds.

    Attributes:
        asked_at: Time at which it was asked.
        figure: Its value, or None without an answer.
        why_not: Reason why the update may not continue, or an empty text.
        failing_since: Time of the first of the answers for which that is so, without an interruption.
    """

    asked_at: float = -inf
    figure: float | None = None
    why_not: str = ""
    failing_since: float = inf


def judged(
    before: QueryVerdict, bounds: QueryBounds, asked_at: float, figure: float | None, problem: str
) -> QueryVerdict:
    """Return the verdict after an attempt to ask the query.  ``problem``: why the attempt failed."""
    why_not = bounds.exceeded(figure) if figure is not None else f"its query has no answer: {problem}"
    since = min(before.failing_since, asked_at) if why_not else inf
    return QueryVerdict(asked_at, figure, why_not, since)


LAST: Final = UpdateStage(None, ALL_PERCENT, keeps_old=False)
_LAST_OF_BLUE_GREEN: Final = UpdateStage(ALL_PERCENT, ALL_PERCENT, keeps_old=False)
"""The old tasks, which no longer get connections, get none either until they end."""


def stages_of(labels: Mapping[str, str]) -> tuple[UpdateStage, ...]:
    """Return the steps of a service's updates.  Empty if they are not staged."""
    try:
        return _parsed(labels)
    except InvalidArgument:
        return ()


def check_staged_update(spec: ServiceSpec) -> None:
    """Refuse staged updates that cannot work.  Raises: InvalidArgument."""
    if not _parsed(spec.labels):
        return
    label = f"{UPDATE}={spec.labels[UPDATE]}"
    if _bounds(spec.labels) != RequestBounds() and not has_routes(spec.labels):
        name = MAX_ERRORS if MAX_ERRORS in spec.labels else MAX_LATENCY
        raise InvalidArgument(
            f"the label {name} counts HTTP requests over the front door, and the service has no route: run "
            f"skep service expose {spec.name} HOST, or remove {name}"
        )
    _query_bounds(spec.labels)
    if spec.mode.name != "replicated":
        raise InvalidArgument(f"the label {label} works on replicated services only: remove it")
    endpoint = spec.endpoint_spec
    for port in endpoint.ports if endpoint is not None else ():
        if port.publish_mode is PublishMode.HOST:
            raise InvalidArgument(
                f"the label {label} starts new tasks while the old ones run, but port {port.target_port} is published "
                "in host mode: publish it in ingress mode, or remove the label"
            )
    if endpoint is not None and endpoint.mode == "dnsrr":
        raise InvalidArgument(
            f"the label {label} needs a virtual address: choose --endpoint-mode vip, or remove the label"
        )
    if data := why_stop_first(spec):
        raise InvalidArgument(
            f"the label {label} starts new tasks while the old ones run, but both would write to {data}: set "
            "--update-order start-first if they may, or remove the label"
        )
    if (spec.update_config or UpdateConfig()).failure_action is UpdateFailureAction.CONTINUE:
        raise InvalidArgument(
            f"the label {label} rolls back after a failure, but the failure action is continue: set "
            "--update-failure-action rollback, or remove the label"
        )


def bounds_of(labels: Mapping[str, str]) -> RequestBounds | None:
    """Return the limits of a service's staged updates, or None without limits."""
    try:
        bounds = _bounds(labels) if UPDATE in labels else RequestBounds()
    except InvalidArgument:
        return None
    return bounds if bounds != RequestBounds() else None


def query_bounds_of(labels: Mapping[str, str]) -> QueryBounds | None:
    """Return the query of a service's staged updates with its bounds, or None without a query."""
    if UPDATE not in labels or UPDATE_QUERY not in labels:  # most services
        return None
    try:
        return _query_bounds(labels)
    except InvalidArgument:
        return None


def _query_bounds(labels: Mapping[str, str]) -> QueryBounds | None:
    examples = {
        UPDATE_QUERY: "sum(rate(errors_total[1m]))",
        UPDATE_PROMETHEUS: "http://prometheus.example.org:9090",
    }
    given = [name for name in (*examples, QUERY_MAX, QUERY_MIN, QUERY_WAIT) if name in labels]
    if not given:
        return None
    for name, example in examples.items():
        if name not in labels:
            raise InvalidArgument(f"the label {given[0]} needs {name}, such as {name}={example}")
    if QUERY_MAX not in labels and QUERY_MIN not in labels:
        raise InvalidArgument(f"the label {UPDATE_QUERY} needs a bound, such as {QUERY_MAX}=0.01")
    least, most = _number(labels, QUERY_MIN, -inf), _number(labels, QUERY_MAX, inf)
    if least > most:
        raise InvalidArgument(
            f"the label {QUERY_MIN} is more than {QUERY_MAX}: lower it, or remove one of them"
        )
    query = MetricQuery(
        url=checked_url(UPDATE_PROMETHEUS, labels[UPDATE_PROMETHEUS]),
        expression=checked_expression(UPDATE_QUERY, labels[UPDATE_QUERY]),
    )
    return QueryBounds(query, least, most, _seconds(labels, QUERY_WAIT, DEFAULT_QUERY_WAIT_S))


def _number(labels: Mapping[str, str], name: str, default: float) -> float:
    text = labels.get(name)
    if text is None:
        return default
    if _NUMBER.fullmatch(text) is None:
        raise InvalidArgument(f"invalid label {name}={text}: expected a number such as 0.01")
    return float(text)


def _bounds(labels: Mapping[str, str]) -> RequestBounds:
    errors: float | None = None
    if (text := labels.get(MAX_ERRORS)) is not None:
        if (found := _PERCENTAGE.fullmatch(text)) is None:
            raise InvalidArgument(f"invalid label {MAX_ERRORS}={text}: expected a percentage like 1% or 0.5%")
        errors = float(found[1])
    latency_s = _seconds(labels, MAX_LATENCY, inf)
    return RequestBounds(errors, latency_s if latency_s < inf else None)


def tasks_of_step(stage: UpdateStage, slots: int) -> int:
    """Return how many of the ``slots`` have a new task in a step."""
    return max(1, -(-slots * stage.slots_percent // ALL_PERCENT))


def message_of(stages: tuple[UpdateStage, ...], step: int) -> str:
    """Return the update's message during a step."""
    stage = stages[step]
    share = f"{stage.percent} % of new connections" if stage.keeps_old else "replacing the old tasks"
    if stage.least_s == inf:
        share += " until skep update promote"
    return f"{IN_PROGRESS}: step {step + 1} of {len(stages)}, {share}"


def end_of_step(stage: UpdateStage, name: str) -> str:
    """Return what ends a step of the service ``name`` once all its tasks run, in words."""
    if not stage.keeps_old:
        return "the monitor time of the last step"
    if stage.least_s == inf:
        return f"skep update promote {name}"
    is_minutes = stage.least_s >= 60 and stage.least_s % 60 == 0
    time = f"{stage.least_s / 60:g}m" if is_minutes else exact_duration(round(stage.least_s * SECOND_NS))
    if _is_switched(stage):
        return f"the end of the {time} for which old tasks are kept (skep update switch-back {name} returns to them)"
    return f"the end of the step, which lasts {time}"


def end_of_present_step(service: Service) -> str:
    """Return what ends the present step of a staged update, or an empty text without one."""
    status, stages = service.update_status, stages_of(service.spec.labels)
    if status is None or status.state is not UpdateState.UPDATING or status.split is None or not stages:
        return ""
    stage = stages[min(status.split.step, len(stages) - 1)]
    if _lacks_tasks(stage, service):
        return WITHOUT_TASKS
    words = end_of_step(stage, service.spec.name)
    bounds = query_bounds_of(service.spec.labels) if stage.keeps_old and stage.least_s < inf else None
    if bounds is None:
        return words
    return f"{words}, and a figure within the bounds of its query {bounds.query.expression[:SHOWN_MAX]}"


def _is_switched(stage: UpdateStage) -> bool:
    """Return whether new tasks have all new connections in a step that keeps the old ones."""
    return stage.keeps_old and stage.percent == ALL_PERCENT


def resting_step(service: Service) -> UpdateStage | None:
    """Return the present step of an update if a wait for its end makes no sense, or None.

    The step ends when a user promotes the update or scales up a service without tasks, or when old tasks without
    connections have been kept for their time.  It is recognized by the update's message, because Docker's API does not
    have the step.
    """
    status, stages = service.update_status, stages_of(service.spec.labels)
    if status is None or status.state is not UpdateState.UPDATING:
        return None
    named = (stage for step, stage in enumerate(stages) if message_of(stages, step) == status.message)
    return next(
        (one for one in named if one.least_s == inf or _is_switched(one) or _lacks_tasks(one, service)), None
    )


def _lacks_tasks(stage: UpdateStage, service: Service) -> bool:
    """Return whether the update stays in a step because the service has no tasks."""
    return stage.keeps_old and not service.spec.replicas


def is_undecided(service: Service) -> bool:
    """Return whether a staged update of the service has kept the old tasks so far."""
    status = service.update_status
    if status is None or status.state not in (UpdateState.UPDATING, UpdateState.PAUSED):
        return False
    stages = stages_of(service.spec.labels)
    if status.split is None or status.split.old is None or not stages:
        return False
    return stages[min(status.split.step, len(stages) - 1)].keeps_old


def split_of_rollback(service: Service) -> UpdateSplit | None:
    """Return the split during a rollback of the service, in which new tasks of a staged update no longer get
    connections.

    Once the last step has begun, the old tasks are too few, so new tasks serve until others replace them.
    """
    status = service.update_status
    if status is None or status.split is None:
        return None
    if status.split.old is None or is_undecided(service):
        return status.withdrawn
    earlier = status.split.withdrawn
    return UpdateSplit(percent=0, versions=earlier) if earlier else None


def percent_in_force(stage: UpdateStage, running: int, slots: int) -> int | None:
    """Return the share of connections for ``running`` new tasks: at most the step's, and none has more than its slot's
    part.
    """
    return None if stage.percent is None else min(stage.percent, ALL_PERCENT * running // max(1, slots))


def has_same_tasks(spec: ServiceSpec, new: ServiceSpec) -> bool:
    """Return whether an update from ``spec`` to ``new`` only moves tasks or starts the same ones again.

    Such an update has no steps.
    """

    def tasks(one: ServiceSpec) -> tuple[TaskSpec, EndpointSpec]:
        return replace(one.task_template, placement=None, force_update=0), one.endpoint_spec or EndpointSpec()

    return tasks(spec) == tasks(new)


def is_same_update(spec: ServiceSpec, new: ServiceSpec) -> bool:
    """Return whether a staged update to ``spec`` continues with ``new``: the tasks and the steps are the same."""
    before, after = ({name: one.labels.get(name) for name in UPDATE_LABELS} for one in (spec, new))
    return (spec.task_template, spec.endpoint_spec, before) == (new.task_template, new.endpoint_spec, after)


def continued(service: Service, new: ServiceSpec) -> UpdateStatus | None:
    """Return the status of the service's staged update if it continues with the spec ``new``, or None.

    The store drops a status that stays the same when the spec changes, so the changes are counted.
    """
    status = service.update_status
    if (
        status is None
        or status.split is None
        or status.state not in (UpdateState.UPDATING, UpdateState.PAUSED)
    ):
        return None
    if not is_same_update(service.spec, new):
        return None
    return replace(status, split=replace(status.split, changes=status.split.changes + 1))


def status_after(service: Service, new: ServiceSpec, now: Timestamp) -> UpdateStatus | None:
    """Return the status of the update to ``new``.

    A staged update continues if its tasks and steps stay the same.  If another update replaces it, its tasks no
    longer get connections, and the old tasks stay the old ones.
    """
    status = service.update_status or UpdateStatus()
    split, is_going = status.split, status.state in (UpdateState.UPDATING, UpdateState.PAUSED)
    if (present_update := continued(service, new)) is not None:
        return present_update
    begun = UpdateStatus(state=UpdateState.UPDATING, started_at=now, message=IN_PROGRESS)
    present, wanted = ((one.task_template, one.endpoint_spec) for one in (service.spec, new))
    if split is not None and split.old is not None and is_going and present == wanted:
        # Other steps for the same tasks, or no steps.
        again = replace(split, step=0, percent=0, changes=split.changes + 1)
        return replace(begun, split=again if stages_of(new.labels) else None)
    kept, index = service.spec, service.spec_version.index if service.spec_version is not None else None
    withdrawn: tuple[int, ...] = ()
    if split is not None and (is_undecided(service) or not is_going or split.old is None):
        withdrawn = (status.withdrawn or split).versions
    elif split is not None:
        withdrawn = split.withdrawn  # the last step has begun
    if is_undecided(service) and service.previous_spec is not None:
        kept, index = service.previous_spec, service.old_version
    is_back = is_going and service.previous_spec is not None and has_same_tasks(service.previous_spec, new)
    if stages_of(new.labels) and service.spec.replicas and not is_back and not has_same_tasks(kept, new):
        return replace(begun, split=UpdateSplit(percent=0, old=index, withdrawn=withdrawn))
    return replace(begun, split=UpdateSplit(percent=0, versions=withdrawn)) if withdrawn else None


def _parsed(labels: Mapping[str, str]) -> tuple[UpdateStage, ...]:
    kind = labels.get(UPDATE)
    if kind is None:
        if extra := next((name for name in UPDATE_LABELS if name in labels), None):
            raise InvalidArgument(f"the label {extra} needs the label {UPDATE}: add it, or remove {extra}")
        return ()
    if kind not in (CANARY, BLUE_GREEN):
        raise InvalidArgument(f"invalid label {UPDATE}={kind}: expected {CANARY} or {BLUE_GREEN}")
    if wrong := next((name for name, of in _ONLY.items() if name in labels and of != kind), None):
        raise InvalidArgument(f"the label {wrong} does not work with {UPDATE}={kind}: remove it")
    if (promote := labels.get(UPDATE_PROMOTE, AUTO)) not in (AUTO, MANUAL):
        raise InvalidArgument(f"invalid label {UPDATE_PROMOTE}={promote}: expected {AUTO} or {MANUAL}")
    is_manual = promote == MANUAL
    if kind == BLUE_GREEN:
        keep_s = _seconds(labels, UPDATE_KEEP, DEFAULT_KEEP_S)
        first = UpdateStage(0, ALL_PERCENT, inf if is_manual else 0.0)
        return first, UpdateStage(ALL_PERCENT, ALL_PERCENT, keep_s), _LAST_OF_BLUE_GREEN
    least_s = inf if is_manual else _seconds(labels, UPDATE_STEP_TIME, DEFAULT_STEP_S)
    return (*(UpdateStage(percent, percent, least_s) for percent in _steps(labels)), LAST)


def _steps(labels: Mapping[str, str]) -> tuple[int, ...]:
    text = labels.get(UPDATE_STEPS)
    if text is None:
        return DEFAULT_STEPS
    found = [_PERCENT.fullmatch(part.strip()) for part in text.split(",")]
    steps = [int(one[1]) for one in found if one is not None]
    if len(steps) < len(found) or len(steps) > STEPS_MAX or steps != sorted(set(steps)):
        raise InvalidArgument(
            f"invalid label {UPDATE_STEPS}={text}: expected up to {STEPS_MAX} rising percentages like 5%,25%,100%"
        )
    return tuple(step for step in steps if step < ALL_PERCENT)


def _seconds(labels: Mapping[str, str], name: str, default_s: float) -> float:
    text = labels.get(name)
    if text is None:
        return default_s
    duration = duration_ns(text)
    if duration is None or not 0 <= duration <= STEP_S_MAX * SECOND_NS:
        raise InvalidArgument(
            f"invalid label {name}={text}: expected a duration like 30s or 5m, at most {STEP_S_MAX / 3600:g} h"
        )
    return duration / SECOND_NS


def replaced_spec(service: Service) -> ServiceSpec | None:
    """Return the spec whose tasks a staged update in progress replaces, or None."""
    status = service.update_status
    is_updating = status is not None and status.state in (UpdateState.UPDATING, UpdateState.PAUSED)
    return service.previous_spec if is_updating and stages_of(service.spec.labels) else None


def rollback_target(service: Service) -> ServiceSpec:
    """Return the spec to which a rollback of the service's next update leads.

    It is the present one, or until the last step of a staged update the one before, whose tasks are the old ones.  The
    step is recognized by the update's message, as in ``resting_step``.
    """
    old, stages, status = replaced_spec(service), stages_of(service.spec.labels), service.update_status
    if old is None or status is None or status.message == message_of(stages, len(stages) - 1):
        return service.spec
    return old
