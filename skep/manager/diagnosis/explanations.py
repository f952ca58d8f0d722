"""Explains, in sentences and figures, why a task or service is not in its desired state.

Everything is derived from the stored objects.  The sentences come from ``reasons``.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from skep.manager.autoscaling.decision import AT_ZERO
from skep.manager.diagnosis.departures import count_text, is_serving, split_off_replacements
from skep.manager.diagnosis.reasons import (
    LOOP_FROM,
    CauseKind,
    TaskProblem,
    because,
    exit_code,
    failure_of,
    hostname,
    is_stable,
    last_failure,
    name_of,
    problem_of,
    slot_of,
    without_past_attempt,
)
from skep.manager.diagnosis.scaling_explanations import AutoscalingExplanation
from skep.manager.diagnosis.service_problems import problems_of
from skep.manager.orchestrator.jobs import is_done
from skep.manager.orchestrator.replacement.early_failures import step_seconds_max
from skep.manager.orchestrator.slots import Slot, group_by_node, group_by_slot
from skep.manager.orchestrator.slots import wanted as wanted_of
from skep.manager.orchestrator.unplaceable import UNPLACEABLE_S, fails_early
from skep.manager.scheduler.explaining.explain import NodeVerdict
from skep.manager.scheduler.returning import absence
from skep.manager.services.job_runs import is_left_out, of_present_run, restarts_in
from skep.model.needs import needs_of
from skep.model.node import Node
from skep.model.node_reports.node_refusals import placement_text
from skep.model.options.autoscaling import is_at_zero
from skep.model.options.dependencies import WAITS_FOR, is_wait
from skep.model.options.labels import is_stopped
from skep.model.service import (
    PAUSED,
    UNDER_WAY,
    HealthState,
    Service,
    ServiceHealth,
    ServiceSpec,
    UpdateStatus,
)
from skep.model.staging.updates import end_of_present_step
from skep.model.task import Restart, Task, TaskState, state_age
from skep.model.task_end import EndCause, TaskEnd, signal_of
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.times import SECOND_NS, ZERO_TIME, Timestamp, timestamp, unix_ns

IS_STOPPED = "stopped"
"""Reason of a healthy service without tasks that a user has stopped."""
_WAITS_FOR_FIRST_RUN = "it waits for its first run"
"""Reason of a healthy job without tasks whose schedule has not started a run yet."""
NO_NODE = "no node is eligible"
"""Reason of a healthy global service or global job without tasks."""
_NOT_CREATED = "its tasks are not created yet"
REASONS_MAX = 10
"""Largest number of different reasons in the explanation of a service.  The most frequent come first."""


class TaskExplanation(ApiObject):
    """Response of ``GET /skep/tasks/{id}/explain``.

    ``nodes`` is set for a task that waits for a node, ``exit_code`` and ``signal`` for a task whose process ended.
    """

    task_id: TaskId
    since: Timestamp
    service_id: ServiceId = ServiceId("")
    state: TaskState = always(TaskState.NEW)
    desired_state: TaskState = always(TaskState.RUNNING)
    summary: str = always("")
    message: str = ""
    err: str = ""
    node_id: NodeId = NodeId("")
    exit_code: int | None = None
    signal: str = ""
    end: TaskEnd | None = None
    """Reason why the task ended, with its last log lines.  For a task that does not run yet, the reason why its
    predecessor failed.
    """
    nodes: tuple[NodeVerdict, ...] = ()
    placement: str = ""
    """Reason for the choice of its node, at the time of the decision."""
    smallest_change: str = ""
    """The smallest change that would let the task run, if no node takes it."""


class Reason(ApiObject):
    """A reason why some of a service's tasks are not running."""

    example: TaskId
    name: str = ""
    """The example's name: ``web.2``, or ``web.w1`` for a global service."""
    summary: str = always("")
    tasks: int = always(0)


class UpdateExplanation(ApiObject):
    """Progress of an update or a rollback."""

    deadline: Timestamp | None = None
    """Time at which the update fails without progress.  None while the update waits for a period to pass."""
    step: str = always("")
    waiting_for: str = always("")


class ServiceExplanation(ApiObject):
    """Response of ``GET /skep/services/{id}/explain``."""

    service_id: ServiceId
    summary: str = always("")
    """The reason, how often tasks failed, and how many run."""
    reason: str = always("")
    """Reason why the service is not in its desired state.  It does not change between two attempts.

    Empty if the service is in its desired state and no update is paused.
    """
    problem: TaskProblem | None = None
    """The task problem that ``reason`` describes."""
    restart_summary: str = ""
    """Number of failures, and time of the next attempt."""
    state: HealthState = always(HealthState.CONVERGING)
    is_healthy: bool = always(False)
    """Whether ``state`` is healthy."""
    since: Timestamp = Timestamp("")
    """Start of the problem or of the pause of an update, or empty if unknown."""
    running: int = always(0)
    desired: int = always(0)
    completed: int = 0
    """Slots of a one-shot service whose task ended with exit code 0."""
    ended_at: Timestamp = Timestamp("")
    """Time at which the job completed."""
    reasons: tuple[Reason, ...] = always(())
    """Reasons why desired tasks do not run, the most important first."""
    failures: tuple[Reason, ...] = always(())
    """Failures of tasks that ended by themselves and are kept as history."""
    schedule: str = ""
    """The next run of a scheduled job, as a sentence."""
    update_status: UpdateStatus | None = None
    update: UpdateExplanation | None = None
    """Progress of the current update."""
    autoscaling: AutoscalingExplanation | None = None
    smallest_change: str = ""
    """The smallest change that would let a task run that no node takes, as a sentence."""

    @property
    def health(self) -> ServiceHealth:
        """The part that lists of services show."""
        if self.is_healthy:
            return ServiceHealth(reason=self.reason)
        return ServiceHealth(
            state=self.state,
            reason=self.reason,
            restart_summary=self.restart_summary,
            since=self.since,
            weight=_weight(self.state, self.problem),
        )


def explain_task(
    task: Task,
    node: Node | None,
    verdicts: Sequence[NodeVerdict] = (),
    slot: Iterable[Task] = (),
    nodes: Mapping[NodeId, Node] | None = None,
    now_ns: int = 0,
    spec: ServiceSpec | None = None,
) -> TaskExplanation:
    """Return the explanation of ``task``.

    Args:
        verdicts: Verdicts of all nodes, for a task that waits for a node.
        slot: Tasks of the same slot.
        nodes: Nodes of the cluster.
        now_ns: Unix time.  With 0, no running task is in a crash loop.
        spec: Spec of its service.
    """
    code = exit_code(task)
    return TaskExplanation(
        task_id=task.id,
        service_id=task.service_id,
        state=task.status.state,
        desired_state=task.desired_state,
        since=task.status.timestamp,
        summary=_with_verdicts(task, verdicts, nodes or {}, spec)
        if verdicts
        else summary(task, node, slot, nodes, now_ns, spec),
        message=task.status.message,
        err=task.status.err,
        node_id=task.node_id,
        exit_code=code,
        signal=signal_of(code) if code is not None and not _is_killed_by_skep(task) else "",
        end=task.status.end or _last_end_of(task, slot),
        nodes=tuple(verdicts),
        placement=placement_text(task.placement_record) if task.placement_record else "",
    )


def _last_end_of(task: Task, slot: Iterable[Task]) -> TaskEnd | None:
    """Return the end of the failed task that ``task`` replaces, if ``task`` is active but not running yet."""
    failed = (
        last_failure(task, slot) if task.is_active and task.status.state is not TaskState.RUNNING else None
    )
    return failed.status.end if failed is not None else None


def _is_killed_by_skep(task: Task) -> bool:
    """Return whether Skep itself sent the signal that ended the task.  The signal then explains nothing."""
    ends = (EndCause.UNHEALTHY.value, EndCause.STOP_TIMEOUT.value)
    return task.status.end is not None and task.status.end.cause in ends


def explain_service(
    service: Service,
    tasks: Sequence[Task],
    *,
    wanted: int,
    nodes: Mapping[NodeId, Node],
    now_ns: int,
    is_new: Callable[[Task], bool] = lambda _: True,
    done: int = 0,
    running: int | None = None,
    active: int | None = None,
    left_out: int = 0,
    can_begin: Callable[[], bool] = lambda: False,
) -> ServiceExplanation:
    """Return why ``service`` is not in its desired state, or the result of a job.

    Args:
        wanted: Number of tasks that should run.
        now_ns: Unix time.  Running tasks of a crash loop need it (``reasons.loop_ends_ns``).
        done: Finished slots of a one-shot service, which need no running task.
        is_new: Returns whether a task matches the current spec.
        running: Number of running tasks, also if they are being stopped.  Counted in ``tasks`` if None.
        active: Number of slots with a task that should run and has not ended.  Counted in ``tasks`` if None.
        left_out: Number of slots with one running task that ``tasks`` lacks.
        can_begin: Returns whether a node will start the run of a global job that has no tasks yet.
    """
    is_job, update = service.job_status is not None, service.update_status or UpdateStatus()
    every, tasks = (tasks, of_present_run(service, tasks)) if is_job else ((), tasks)
    running = _running(tasks) if running is None else running
    active = len({slot_of(task) for task in tasks if task.is_active}) if active is None else active
    found = [
        without_past_attempt(one, now_ns)
        for one in problems_of(service, tasks, nodes, wanted=wanted, now_ns=now_ns, every=every)
    ]
    problems, hint = split_off_replacements(found, service, tasks, nodes)
    if is_job:
        text, reason, is_healthy = _of_job(service, tasks, running, problems, nodes, can_begin)
    else:
        count = count_text(tasks, running, wanted, left_out) + (f", {done} done" if done else "")
        text, reason, is_healthy = _of_service(service, running, wanted, done, problems, active, hint, count)
    worst = problems[0] if problems and not is_healthy else None
    state = _state(update, worst, is_healthy=is_healthy)
    return ServiceExplanation(
        service_id=service.id,
        summary=text,
        reason=_with_update(service, reason, worst),
        problem=worst,
        restart_summary=worst.restart_summary if worst is not None else "",
        state=state,
        is_healthy=state is HealthState.HEALTHY,
        since=_since(update, worst),
        ended_at=_last_end(tasks) if is_job and is_healthy else Timestamp(""),
        running=running,
        desired=wanted,
        completed=done,
        reasons=_counted_problems(one for one in problems if one.pending_task_id),
        failures=_failures(tasks),
        update_status=service.update_status,
        update=explain_update(service, tasks, is_new=is_new, nodes=nodes, now_ns=now_ns),
    )


def _running(tasks: Iterable[Task]) -> int:
    return sum(map(is_serving, tasks))


def _failures(tasks: Iterable[Task]) -> tuple[Reason, ...]:
    return _counted(
        [
            (task, failure_of(task)[1])
            for task in tasks
            if not task.is_active and task.status.state in (TaskState.FAILED, TaskState.REJECTED)
        ]
    )


def _state(update: UpdateStatus, worst: TaskProblem | None, *, is_healthy: bool) -> HealthState:
    """Return the state of a service.  It is degraded if waiting alone may not help."""
    if update.state in PAUSED or (worst is not None and worst.weight < CauseKind.WAITING.weight):
        return HealthState.DEGRADED
    return HealthState.HEALTHY if is_healthy else HealthState.CONVERGING


def _weight(state: HealthState, worst: TaskProblem | None) -> int:
    if worst is not None:
        return worst.weight
    return 0 if state is HealthState.DEGRADED else CauseKind.PROGRESSING.weight


def _since(update: UpdateStatus, worst: TaskProblem | None) -> Timestamp:
    if worst is not None and worst.since != ZERO_TIME:
        return worst.since
    return (update.state in PAUSED and update.started_at) or Timestamp("")


def _slot_of(task: Task, tasks: Iterable[Task]) -> list[Task]:
    return [one for one in tasks if slot_of(one) == slot_of(task)]


def _with_update(service: Service, reason: str, worst: TaskProblem | None) -> str:
    """Add to ``reason`` that the update is paused.  A task's failure comes first."""
    update = service.update_status
    if update is None or update.state not in PAUSED:
        return reason
    if worst is not None and CauseKind(worst.kind).is_failure:
        return f"{reason}; its {'rollback' if 'rollback' in update.state.value else 'update'} is paused"
    return update.message or reason


def summary(
    task: Task,
    node: Node | None,
    slot: Iterable[Task] = (),
    nodes: Mapping[NodeId, Node] | None = None,
    now_ns: int = 0,
    spec: ServiceSpec | None = None,
) -> str:
    """Return a sentence about ``task``: why it does not run, and how often it failed.

    Earlier failures are not mentioned once a task runs so long that the crash loop of its slot has ended.
    """
    status = task.status
    match status.state:
        case TaskState.RUNNING if task.preemption is not None:
            return f"it leaves {hostname(node, task)}: {task.preemption.words}"
        case TaskState.RUNNING if is_stable(task, now_ns):
            return f"it runs on {hostname(node, task)}"
        case TaskState.SHUTDOWN if task.preemption is not None:
            return f"it was {task.preemption.words}"
        case TaskState.SHUTDOWN | TaskState.ORPHANED if task.stop_cause is not None:
            why = task.stop_cause.words(hostname(node, task))
            was = "stopped" if status.state is TaskState.SHUTDOWN else "lost"
            return f"it was {was}, because {why}{because(status.err)}"
        case TaskState.FAILED | TaskState.REJECTED:
            return failure_of(task)[1]
        case _ if status.state.is_terminal:
            return status.err or status.message or status.state.value
    known = nodes if nodes is not None else {node.id: node} if node is not None else {}
    problem = without_past_attempt(problem_of(task, slot, known, spec=spec), now_ns)
    return "; ".join(filter(None, (problem.reason, problem.restart_summary)))


def next_attempt(task: Task, now_ns: int) -> str:
    """Return when the next task of a failing slot starts, like ``next attempt in 6 s (crash loop, 5th)``, or an empty
    text.
    """
    restart = task.restart
    is_held = task.desired_state is TaskState.READY and not task.status.state.is_terminal
    if restart is None or not restart.delay or not is_held:
        return ""
    seconds = max((unix_ns(restart.not_before) - now_ns) / SECOND_NS, 0)
    return f"next attempt in {seconds:.0f} s{loop_words(restart)}"


def loop_words(restart: Restart) -> str:
    """Return the crash loop's part of the sentence, or an empty text without a crash loop."""
    return f" (crash loop, {_ordinal(restart.failures)})" if restart.failures >= LOOP_FROM else ""


def _ordinal(number: int) -> str:
    """``1st``, ``2nd``, ``11th``."""
    is_teen = number % 100 in (11, 12, 13)
    return f"{number}{'th' if is_teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def _with_verdicts(
    task: Task, verdicts: Sequence[NodeVerdict], nodes: Mapping[NodeId, Node], spec: ServiceSpec | None
) -> str:
    if task.status.err.startswith(WAITS_FOR):
        return f"it {task.status.err}"
    willing = sum(not one.reasons for one in verdicts)
    if willing:
        return f"{willing} of {len(verdicts)} nodes could take it now: the scheduler has not come to it yet"
    if not task.status.err:
        return f"none of {len(verdicts)} nodes can take it"
    return problem_of(task, (), nodes, spec=spec).reason


def _of_service(
    service: Service,
    running: int,
    wanted: int,
    done: int,
    problems: Sequence[TaskProblem],
    active: int,
    hint: str,
    count: str,
) -> tuple[str, str, bool]:
    """Return the summary, the reason, and whether the service is in its desired state.

    Args:
        hint: About tasks that must leave their node.
        done: Number of tasks that ended and that their restart policy does not restart.
        count: How many tasks run.
    """
    update = service.update_status or UpdateStatus()
    is_updating = update.state in UNDER_WAY and not is_stopped(service.spec.labels)
    has_numbers = wanted - done <= min(running, active) and running <= wanted
    if has_numbers and not problems and not is_updating:
        if is_stopped(service.spec.labels):
            return f"{IS_STOPPED}: skep service start {service.spec.name} starts its tasks", IS_STOPPED, True
        if is_at_zero(service.spec):
            scaled = service.autoscaled
            since = f" since {scaled.at[:19]}Z" if scaled is not None and not scaled.after else ""
            return f"{AT_ZERO}{since}", AT_ZERO, True
        if done:
            text = f"{done} of {wanted} tasks done"
            hint = "; ".join(filter(None, (f"{running} running" if running else "", hint)))
        else:
            lacks_nodes = not wanted and service.spec.mode.global_ is not None
            hint = NO_NODE if lacks_nodes and not hint else hint
            text = f"{running} of {wanted} tasks run"
            text += "" if update.state in PAUSED or lacks_nodes else ": healthy"
        return f"{text}; {hint}" if hint else text, hint, True
    if not problems:
        if active + done < wanted:
            reason = _NOT_CREATED
        elif (is_updating or update.state in PAUSED) and update.message:
            reason = update.message
        else:
            reason = "its old tasks are being stopped" if running > wanted else "its tasks are being replaced"
        return f"{reason}; {count}", reason, False
    worst = problems[0]
    return "; ".join(filter(None, (worst.reason, worst.restart_summary, count))), worst.reason, False


def _of_job(
    service: Service,
    tasks: Sequence[Task],
    running: int,
    problems: Sequence[TaskProblem],
    nodes: Mapping[NodeId, Node],
    can_begin: Callable[[], bool],
) -> tuple[str, str, bool]:
    """Return the summary, the reason, and whether the job is in its desired state.

    A job has completed, has failed with a cause, or makes progress.  ``tasks`` belong to its current iteration.
    """
    if service.job_status is not None and service.job_status.awaits_first_run:
        return _WAITS_FOR_FIRST_RUN, _WAITS_FOR_FIRST_RUN, True
    job = service.spec.mode.replicated_job
    slots: Mapping[int, Slot] | Mapping[NodeId, Slot] = (
        group_by_slot(tasks) if job is not None else group_by_node(tasks)
    )
    done = sum(is_done(slot) for slot in slots.values())
    # Without a further task, a slot has failed, or the run continues without it.
    without = [slot for slot in slots.values() if not is_done(slot) and not wanted_of(slot)]
    stopped: list[Slot] = []
    given_up: list[Slot] = []
    for slot in without:
        (stopped if is_left_out(service, slot) else given_up).append(slot)
    total = (job.total_completions or 0) if job is not None else len(slots) - len(stopped)
    completed = f"{done} of {total} completed"
    away = _away([slot[-1] for slot in stopped], nodes) if job is None else ""
    if job is None and not slots and can_begin():
        return f"{_NOT_CREATED}; {completed}", _NOT_CREATED, False
    if done >= total:
        lacks_nodes = job is None and not total and not away
        text = f"; {away}" if away else f": {NO_NODE}" if lacks_nodes else ""
        return f"{completed}{text}", NO_NODE if lacks_nodes else away, True
    if given_up:
        cause, end = _failed(given_up, nodes, is_global=job is None)
        return f"FAILED: {cause}; {end}{completed}", f"failed: {cause}", False
    progress = "; ".join(filter(None, (f"{completed}, {running} running", away)))
    if not problems:
        reason = f"{running} running" if running else _NOT_CREATED
        return progress, "; ".join(filter(None, (reason, away))), False
    worst = problems[0]
    return "; ".join(filter(None, (worst.reason, worst.restart_summary, progress))), worst.reason, False


def _failed(slots: Sequence[Slot], nodes: Mapping[NodeId, Node], *, is_global: bool) -> tuple[str, str]:
    """Return the cause of the last failed one of the ``slots`` without a completed task, and how its attempts ended."""
    slot = max(slots, key=lambda slot: (slot[-1].ended_in_failure, state_age(slot[-1])))
    last, node = slot[-1], nodes.get(slot[-1].node_id)
    if last.ended_in_failure:
        others = f" and {len(slots) - 1} more" if len(slots) > 1 else ""
        where = hostname(node, last) if is_global else f"slot {last.shown_slot}"
        return summary(last, node), f"{where}{others} gave up {restarts_in(slot)}; "
    stopped, one = ("its task was", "") if len(slots) == 1 else (f"{len(slots)} tasks were", ", one")
    if last.stop_cause is None:
        return f"{stopped} stopped{one} on {hostname(node, last)}", ""
    return f"{stopped} stopped{one or ','} because {last.stop_cause.words(hostname(node, last))}", ""


def _away(tasks: Sequence[Task], nodes: Mapping[NodeId, Node]) -> str:
    """Return on which node a global job waits to run again, like ``not on w2, which is down``."""
    if not tasks:
        return ""
    names = sorted(
        f"{hostname(node, task)}{absence(node) if node is not None else ''}"
        for task, node in ((one, nodes.get(one.node_id)) for one in tasks)
    )
    return f"not on {names[0]}" if len(names) == 1 else f"not on {len(names)} nodes, such as {names[0]}"


def _last_end(tasks: Iterable[Task]) -> Timestamp:
    stamps = (task.status.timestamp for task in tasks if task.status.state is TaskState.COMPLETE)
    return max(stamps, key=unix_ns, default=Timestamp(""))


def _counted(tasks: Iterable[tuple[Task, str]]) -> tuple[Reason, ...]:
    counts: Counter[str] = Counter()
    examples: dict[str, TaskId] = {}
    for task, words in tasks:
        counts[words] += 1
        examples.setdefault(words, task.id)
    return tuple(
        Reason(summary=words, tasks=number, example=examples[words])
        for words, number in counts.most_common(REASONS_MAX)
    )


def _counted_problems(problems: Iterable[TaskProblem]) -> tuple[Reason, ...]:
    """Count the reasons of problems, in the given order: the most important first."""
    found = list(problems)
    counts: Counter[str] = Counter(one.reason for one in found)
    examples = {one.reason: one for one in reversed(found)}
    return tuple(
        Reason(
            summary=words,
            tasks=number,
            example=examples[words].pending_task_id,
            name=examples[words].name,
        )
        for words, number in list(counts.items())[:REASONS_MAX]
    )


# -- the progress of an update ---------------------------------------------------------------------------------------


def explain_update(
    service: Service,
    tasks: Sequence[Task],
    *,
    is_new: Callable[[Task], bool],
    nodes: Mapping[NodeId, Node],
    now_ns: int,
) -> UpdateExplanation | None:
    """Return the progress of the service's update, or None without a current update.

    Args:
        is_new: Returns whether a task matches the current spec.
        now_ns: Unix time.
    """
    status = service.update_status
    if status is None or status.state not in UNDER_WAY or is_stopped(service.spec.labels):
        return None
    wanted = [task for task in tasks if task.is_wanted]
    new = [task for task in wanted if is_new(task)]
    slots = set(map(slot_of, wanted))
    done = {slot_of(task) for task in new if task.status.state is TaskState.RUNNING}
    step = f"{len(done)} of {len(slots)} tasks are new" if slots else "its tasks have ended"
    leads = [task for task in new if task.status.state is not TaskState.RUNNING]
    if not leads:
        is_last = len(done) == len(slots)
        words = "the monitor time of the last step" if is_last else "the delay before the next step"
        words = end_of_present_step(service) or words
        return UpdateExplanation(step=step, waiting_for=words)
    first = min(leads, key=lambda task: (task.created_at, task.id))
    # The deadline starts once the previous tasks of the slot have stopped.
    is_held = first.desired_state is TaskState.READY and all(
        one is first or slot_of(one) != slot_of(first) for one in wanted
    )
    seconds = step_seconds_max(service.spec)
    if fails_early(first, service.spec, needs_of(service.spec), nodes.values):
        seconds = min(seconds, UNPLACEABLE_S)
    due_ns = unix_ns(first.created_at) + round(seconds * SECOND_NS)
    words = summary(first, nodes.get(first.node_id), _slot_of(first, tasks), nodes, now_ns, service.spec)
    return UpdateExplanation(
        step=step,
        waiting_for=f"task {name_of(first, service, nodes)}: {words}",
        deadline=None if is_held or is_wait(first.status.err) else timestamp(due_ns),
    )
