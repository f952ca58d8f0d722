"""Why a task or a service is not in its desired state, in one sentence and in figures.

Everything is read from the objects; nothing is stored for it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from skep.manager.autoscaling.decision import blocked, readings_of, recommendation, shown_reason
from skep.manager.job_listing import schedule_words
from skep.manager.job_runs import of_present_run
from skep.manager.orchestrator.jobs import is_done
from skep.manager.orchestrator.slots import Slot, group_by_node, group_by_slot
from skep.manager.orchestrator.slots import wanted as wanted_of
from skep.manager.orchestrator.update import step_seconds_max
from skep.manager.scheduler.explain import NodeVerdict
from skep.model.autoscaling import TaskUsage, autoscaling_of
from skep.model.dependencies import WAITS_FOR, is_wait
from skep.model.encoding import ApiObject, always
from skep.model.ids import NodeId, ServiceId, TaskId
from skep.model.node import Node
from skep.model.service import UNDER_WAY, Autoscaled, Service, UpdateStatus
from skep.model.task import Restart, Task, TaskState
from skep.model.task_end import TaskEnd, signal_of
from skep.model.times import SECOND_NS, Timestamp, timestamp, unix_ns

REASONS_MAX = 10
"""Different reasons that the explanation of a service lists, the most frequent first."""

_LOOP_FROM = 2
"""So many failures in a row are called a crash loop."""


class TaskExplanation(ApiObject):
    """Response of ``GET /skep/tasks/{id}/explain``.

    ``nodes`` is set for a task that waits for a node; ``exit_code`` and ``signal`` for one whose process ended.
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
    """Why it ended, with its last lines."""
    nodes: tuple[NodeVerdict, ...] = ()


class Reason(ApiObject):
    """Why some tasks of a service are not running."""

    example: TaskId
    name: str = ""
    """Of the example: ``web.2``, or ``web.w1`` of a global service."""
    summary: str = always("")
    tasks: int = always(0)


class UpdateExplanation(ApiObject):
    """Of an update, or a rollback, that is under way."""

    deadline: Timestamp | None = None
    """When the update fails without progress; None: it waits for time to pass."""
    step: str = always("")
    waiting_for: str = always("")


class MeasureExplanation(ApiObject):
    """What autoscaling goes by: ``cpu`` or ``memory``; percent, on average over the measured tasks."""

    name: str = ""
    target: int = 0
    average: float | None = None
    """None: no task is measured."""


class AutoscalingExplanation(ApiObject):
    """Of an autoscaled service."""

    least: int = 0
    most: int = 0
    measures: tuple[MeasureExplanation, ...] = ()
    unknown: int = always(0)
    """Tasks that are not measured."""
    summary: str = always("")
    """Why the number of tasks is as it is."""
    last: Autoscaled | None = None
    """Its last change by autoscaling."""


class ServiceExplanation(ApiObject):
    """Response of ``GET /skep/services/{id}/explain``."""

    service_id: ServiceId
    summary: str = always("")
    is_as_wanted: bool = always(False)
    """All wanted tasks run, or the job has completed."""
    running: int = always(0)
    wanted: int = always(0)
    done: int = 0
    """Slots of a one-shot service whose task has ended with exit code 0."""
    ended_at: Timestamp = Timestamp("")
    """Of a job that has completed."""
    reasons: tuple[Reason, ...] = always(())
    """Of wanted tasks that do not run, the most frequent first."""
    failures: tuple[Reason, ...] = always(())
    """Of tasks that ended by themselves and are kept as history."""
    schedule: str = ""
    """Of a job with a schedule: its next run, in a sentence."""
    update_status: UpdateStatus | None = None
    update: UpdateExplanation | None = None
    """Of an update that is under way."""
    autoscaling: AutoscalingExplanation | None = None


def explain_task(task: Task, node: Node | None, verdicts: Sequence[NodeVerdict] = ()) -> TaskExplanation:
    """The explanation of ``task``.  ``verdicts``: of all nodes, for a task that waits for one."""
    code = _exit_code(task)
    return TaskExplanation(
        task_id=task.id,
        service_id=task.service_id,
        state=task.status.state,
        desired_state=task.desired_state,
        since=task.status.timestamp,
        summary=_with_verdicts(task, verdicts) if verdicts else summary(task, node),
        message=task.status.message,
        err=task.status.err,
        node_id=task.node_id,
        exit_code=code,
        signal=signal_of(code) if code is not None else "",
        end=task.status.end,
        nodes=tuple(verdicts),
    )


def explain_service(
    service: Service,
    tasks: Sequence[Task],
    *,
    wanted: int,
    nodes: dict[NodeId, Node],
    is_new: Callable[[Task], bool] = lambda _: True,
    done: int = 0,
) -> ServiceExplanation:
    """Why ``service`` has fewer running tasks than ``wanted``, or the result of a job.

    Args:
        done: slots of a one-shot service that are done, which need no running task.
        is_new: whether a task matches the present spec.
    """
    is_job = service.job_status is not None
    if is_job:
        tasks = of_present_run(service, tasks)
    waiting: list[tuple[Task, str]] = []
    failed: list[tuple[Task, str]] = []
    running = 0
    for task in tasks:
        if task.is_active:
            if task.status.state is TaskState.RUNNING:
                running += 1
            else:
                waiting.append((task, summary(task, nodes.get(task.node_id))))
        elif task.status.state in (TaskState.FAILED, TaskState.REJECTED):
            failed.append((task, summary(task, nodes.get(task.node_id))))
    reasons, failures = _counted(waiting, service, nodes), _counted(failed)
    if is_job:
        text, is_as_wanted = _of_job(service, tasks, running, reasons, nodes)
    else:
        loop = _crash_loop([task for task, _ in waiting], [task for task, _ in failed])
        text, is_as_wanted = _of_service(running, wanted, reasons, failures, loop, done)
    return ServiceExplanation(
        service_id=service.id,
        summary=text,
        is_as_wanted=is_as_wanted,
        ended_at=_last_end(tasks) if is_job and is_as_wanted else Timestamp(""),
        running=running,
        wanted=wanted,
        done=done,
        reasons=reasons,
        failures=failures,
        schedule=schedule_words(service),
        update_status=service.update_status,
        update=explain_update(service, tasks, is_new=is_new, nodes=nodes, summary=summary),
    )


def summary(task: Task, node: Node | None) -> str:
    """One sentence about ``task``; the same for tasks that wait for the same thing."""
    status, where = task.status, _hostname(node, task)
    match status.state:
        case TaskState.NEW:
            return _waiting(task) or "it waits for its networks and ports"
        case TaskState.PENDING:
            return _waiting(task) or "it waits for a node"
        case TaskState.ASSIGNED:
            return f"{where} has not taken it yet"
        case TaskState.ACCEPTED | TaskState.PREPARING:
            return f"{where} prepares it: image, mounts and networks" + _because(status.err)
        case TaskState.READY:
            is_held = task.desired_state is TaskState.READY
            if is_held and task.restart is not None and task.restart.delay:
                return f"next attempt at {task.restart.not_before[11:19]} UTC{loop_words(task.restart)}"
            return "it is prepared and waits for its turn to start" if is_held else f"{where} starts it"
        case TaskState.STARTING:
            return f"{where} waits for it to become healthy" + _because(status.err)
        case TaskState.RUNNING if task.preemption is not None:
            return f"it leaves {where}: {task.preemption.words}"
        case TaskState.RUNNING:
            return f"it runs on {where}"
        case TaskState.FAILED:
            return _ending(task)
        case TaskState.REJECTED:
            return f"{where} could not prepare it" + _because(status.err)
        case TaskState.SHUTDOWN if task.preemption is not None:
            return f"it was {task.preemption.words}"
        case _:
            return status.err or status.message or status.state.value


def next_attempt(task: Task, now_ns: int) -> str:
    """When the next task after failed ones starts: ``next attempt in 6 s (crash loop, 5th)``; else empty."""
    restart = task.restart
    is_held = task.desired_state is TaskState.READY and not task.status.state.is_terminal
    if restart is None or not restart.delay or not is_held:
        return ""
    seconds = max((unix_ns(restart.not_before) - now_ns) / SECOND_NS, 0)
    return f"next attempt in {seconds:.0f} s{loop_words(restart)}"


def loop_words(restart: Restart) -> str:
    """The crash loop's part of the sentence, if tasks of the slot fail repeatedly."""
    return f" (crash loop, {_ordinal(restart.failures)})" if restart.failures >= _LOOP_FROM else ""


def _ordinal(number: int) -> str:
    """``1st``, ``2nd``, ``11th``."""
    is_teen = number % 100 in (11, 12, 13)
    return f"{number}{'th' if is_teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


_NEVER_STARTED = "starting container failed"
_CONTAINER_GONE = "No such container"


def _ending(task: Task) -> str:
    code = _exit_code(task)
    if code is None:
        return "it failed" + _because(task.status.err)
    if task.status.err.startswith(_NEVER_STARTED):
        return "its process could not be started" + _because(task.status.err)
    if task.status.err.startswith(_CONTAINER_GONE):
        return "its container was gone before it ended" + _because(task.status.err)
    name = signal_of(code)
    return f"its process ended with code {code}" + (f" ({name})" if name else "") + _because(task.status.err)


def _waiting(task: Task) -> str:
    return f"it {task.status.err}" if task.status.err.startswith(WAITS_FOR) else task.status.err


def _with_verdicts(task: Task, verdicts: Sequence[NodeVerdict]) -> str:
    if task.status.err.startswith(WAITS_FOR):
        return _waiting(task)
    willing = sum(not one.refusals for one in verdicts)
    if willing:
        return f"{willing} of {len(verdicts)} nodes could take it now: the scheduler has not come to it yet"
    return task.status.err or f"none of {len(verdicts)} nodes can take it"


def _of_service(
    running: int,
    wanted: int,
    reasons: Sequence[Reason],
    failures: Sequence[Reason],
    crash_loop: str = "",
    done: int = 0,
) -> tuple[str, bool]:
    """The summary, and whether the service is in its desired state."""
    if done and running + done >= wanted and not reasons:
        return f"{done} of {wanted} tasks done" + (f", {running} run" if running else ""), True
    if running >= wanted and not reasons:
        return f"{running} of {wanted} tasks run: as wanted", True
    text = f"{running} of {wanted} tasks run"
    if crash_loop:
        return f"{text}; {crash_loop}", False
    if reasons:
        return f"{text}; {reasons[0].tasks} wait: {reasons[0].summary}", False
    if failures:
        return f"{text}; {failures[0].tasks} failed: {failures[0].summary}", False
    return text, False


def _crash_loop(waiting: Sequence[Task], failed: Sequence[Task]) -> str:
    """That tasks of a slot fail again and again, and of what: more to the point than what the next one waits for."""
    loops = [task for task in waiting if task.restart is not None and task.restart.failures >= _LOOP_FROM]
    if not loops or not failed:
        return ""
    worst = max(loops, key=lambda task: (task.restart.failures if task.restart is not None else 0, task.id))
    slot = _slot(worst)
    last = max(
        [task for task in failed if _slot(task) == slot] or failed,
        key=lambda task: (task.created_at, task.id),
    )
    assert worst.restart is not None
    lines = last.status.end.lines if last.status.end is not None else ()
    said = f', last line "{lines[-1].text}"' if lines else ""
    attempt = ""
    if worst.status.state is TaskState.READY and worst.restart.delay:
        attempt = f"; next attempt at {worst.restart.not_before[11:19]} UTC"
    return f"crash loop, {worst.restart.failures} failures in a row: {_ending_in_short(last)}{said}{attempt}"


def _ending_in_short(task: Task) -> str:
    """``exit 3``, ``exit 137 (SIGKILL)``, or as ``summary`` where no process ended."""
    code = _exit_code(task)
    if task.status.state is not TaskState.FAILED or code is None:
        return task.status.err or _ending(task)
    if task.status.err.startswith((_NEVER_STARTED, _CONTAINER_GONE)):
        return _ending(task)
    name = signal_of(code)
    return f"exit {code}" + (f" ({name})" if name else "")


def _of_job(
    service: Service,
    tasks: Sequence[Task],
    running: int,
    reasons: Sequence[Reason],
    nodes: Mapping[NodeId, Node],
) -> tuple[str, bool]:
    """The same of a job: completed, failed with the cause, or its progress.

    ``tasks``: of its present iteration.
    """
    if service.job_status is not None and service.job_status.awaits_first_run:
        return "it waits for its first run", True
    job = service.spec.mode.replicated_job
    slots: Mapping[int, Slot] | Mapping[NodeId, Slot] = (
        group_by_slot(tasks) if job is not None else group_by_node(tasks)
    )
    done = sum(is_done(slot) for slot in slots.values())
    total = (job.total_completions or 0) if job is not None else len(slots)
    completed = f"{done} of {total} completed"
    given_up = {key: slot for key, slot in slots.items() if not is_done(slot) and not wanted_of(slot)}
    if done >= total:
        return completed, True
    if given_up:
        key, slot = min(given_up.items(), key=lambda item: str(item[0]))
        where = f"slot {key}" if job is not None else _hostname(nodes.get(slot[-1].node_id), slot[-1])
        others = f" and {len(given_up) - 1} more" if len(given_up) > 1 else ""
        attempts = f"{len(slot)} attempt{'' if len(slot) == 1 else 's'}"
        last = summary(slot[-1], nodes.get(slot[-1].node_id))
        return f"FAILED: {completed}; {where}{others} gave up after {attempts}, the last: {last}", False
    waits = f"; {reasons[0].tasks} wait: {reasons[0].summary}" if reasons else ""
    return f"{completed}, {running} run{waits}", False


def _last_end(tasks: Iterable[Task]) -> Timestamp:
    stamps = (task.status.timestamp for task in tasks if task.status.state is TaskState.COMPLETE)
    return max(stamps, key=unix_ns, default=Timestamp(""))


def _counted(
    tasks: Iterable[tuple[Task, str]],
    service: Service | None = None,
    nodes: Mapping[NodeId, Node] | None = None,
) -> tuple[Reason, ...]:
    """``service`` and ``nodes``: of tasks that are wanted, whose names mean them."""
    counts: Counter[str] = Counter()
    examples: dict[str, Task] = {}
    for task, words in tasks:
        counts[words] += 1
        examples.setdefault(words, task)
    return tuple(
        Reason(
            summary=words,
            tasks=number,
            example=examples[words].id,
            name=_name(examples[words], service, nodes or {}) if service is not None else "",
        )
        for words, number in counts.most_common(REASONS_MAX)
    )


def _name(task: Task, service: Service, nodes: Mapping[NodeId, Node]) -> str:
    """As ``docker service ps`` shows it; empty: a task of a global service whose node is not known."""
    node = nodes.get(task.node_id)
    place = task.shown_slot or (node.description.hostname if node is not None else "")
    return f"{service.spec.name}.{place}" if place else ""


def _exit_code(task: Task) -> int | None:
    """Exit code of a process that ended; None for a task without one."""
    container = task.status.container_status
    has_ended = task.status.state in (TaskState.COMPLETE, TaskState.FAILED, TaskState.SHUTDOWN)
    return container.exit_code if has_ended and container is not None and container.container_id else None


def _hostname(node: Node | None, task: Task) -> str:
    if node is None:
        return f"node {task.node_id}" if task.node_id else "no node"
    return node.description.hostname or f"node {node.id}"


def _because(error: str) -> str:
    return f": {error}" if error else ""


# -- the progress of an update ---------------------------------------------------------------------------------------


def explain_update(
    service: Service,
    tasks: Iterable[Task],
    *,
    is_new: Callable[[Task], bool],
    nodes: Mapping[NodeId, Node],
    summary: Callable[[Task, Node | None], str],
) -> UpdateExplanation | None:
    """The progress of the update of ``service``; None: there is none.

    Args:
        is_new: whether a task matches the present spec.
        summary: one sentence about a task.
    """
    if service.update_status is None or service.update_status.state not in UNDER_WAY:
        return None
    wanted = [task for task in tasks if task.is_wanted]
    new = [task for task in wanted if is_new(task)]
    slots = set(map(_slot, wanted))
    done = {_slot(task) for task in new if task.status.state is TaskState.RUNNING}
    step = f"{len(done)} of {len(slots)} tasks are new"
    leads = [task for task in new if task.status.state is not TaskState.RUNNING]
    if not leads:
        is_last = len(done) == len(slots)
        words = "the monitor time of the last step" if is_last else "the delay before the next step"
        return UpdateExplanation(step=step, waiting_for=words)
    first = min(leads, key=lambda task: (task.created_at, task.id))
    # The deadline begins when the tasks before it have stopped.
    is_held = first.desired_state is TaskState.READY and all(
        one is first or _slot(one) != _slot(first) for one in wanted
    )
    due_ns = unix_ns(first.created_at) + round(step_seconds_max(service.spec) * SECOND_NS)
    return UpdateExplanation(
        step=step,
        waiting_for=f"task {first.id}: {summary(first, nodes.get(first.node_id))}",
        deadline=None if is_held or is_wait(first.status.err) else timestamp(due_ns),
    )


def _slot(task: Task) -> tuple[int, NodeId]:
    """A global service's tasks have their node as slot."""
    return task.slot, NodeId("") if task.slot else task.node_id


def explain_autoscaling(
    service: Service,
    tasks: Sequence[Task],
    usages: Mapping[TaskId, TaskUsage],
    within_quota: Callable[[int], tuple[int, str]],
) -> AutoscalingExplanation | None:
    """What the leader goes by, without its window, which it alone knows; None: the service is not autoscaled.

    ``within_quota``: the most tasks up to a number that its stack's quota allows, and why not more.
    """
    scaling = autoscaling_of(service.spec.labels)
    if scaling is None:
        return None
    readings = readings_of(service, scaling, tasks, usages)
    asked = recommendation(service.spec.replicas, scaling, readings)
    reason = blocked(service) or shown_reason(service.spec.replicas, scaling, readings)
    if not blocked(service) and asked.replicas > service.spec.replicas:
        reason = within_quota(asked.replicas)[1] or reason
    return AutoscalingExplanation(
        least=scaling.least,
        most=scaling.most,
        measures=tuple(
            MeasureExplanation(
                name=one.name, target=one.target, average=round(one.average, 1) if one.known else None
            )
            for one in readings.measures
        ),
        unknown=readings.unknown,
        summary=reason,
        last=service.autoscaled,
    )
