"""Derives the progress of services towards their spec from their tasks, and decides whether waiting can help.  Pure."""

import math
import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from skep.errors import FailedPrecondition
from skep.model.node_reports.node_refusals import is_no_node
from skep.model.options.labels import JOB_TTL, is_stopped
from skep.model.options.schedules import CRON
from skep.model.service import ENDED, UNDER_WAY, RestartCondition, Service, ServiceSpec, UpdateState
from skep.model.staging.updates import WITHOUT_TASKS, end_of_step, resting_step, tasks_of_step
from skep.model.task import Task, TaskState
from skep.model.values.times import SECOND_NS

UP_TO_DATE: Final[Mapping[str, Sequence[str]]] = {"_up-to-date": ["true"]}
"""The filter of ``GET /tasks`` for tasks that match the present spec, including its ports."""

FAILURES_MAX: Final = 5
"""Consecutive failures of a task after which a wait ends.  A task that needs another service usually starts by the
third attempt.  The delay between attempts grows, so the tenth would come minutes later.
"""
UNPREPARED_MAX: Final = 2
"""Consecutive failures after which a wait ends if the image, the program or a mount is missing.  One failure may be due
to a registry that was unavailable for a moment.
"""
STEADY_S: Final = 5.0
"""Seconds for which a service has to run after a start or a failure, unless its update settings have a monitor time.
Source: docker/cli, cli/command/service/progress (verification).
"""
UNPLACED_S: Final = 60.0
"""Seconds for which a task may lack a node before a wait ends.  Tasks that an update stops have left their nodes by
then.
"""
TOO_LARGE_S: Final = 10.0
"""The same if no node is as large as the task needs, or no task will free an address of its network.  A node that is
just joining has reported its size by then.
"""
UNPLACED: Final[Mapping[str, tuple[float, str]]] = {
    "no-node": (UNPLACED_S, "no node has accepted a task for {s:.0f} s"),
    "too-large": (TOO_LARGE_S, "no node can accept a task"),
    "no-address": (TOO_LARGE_S, "no address becomes free, because no task on the network is stopping"),
    "dependency": (UNPLACED_S, "the service that it waits for has not become ready for {s:.0f} s"),
    "left": (UNPLACED_S, "their nodes have been down for {s:.0f} s"),
    "not-allocated": (UNPLACED_S, "a task has waited for its networks and ports for {s:.0f} s"),
}
"""Seconds until a wait ends, and the text of its error, by the kind of the problem."""

GIVEN_UP_S: Final = 1.0
"""Seconds from giving up a task to the end of a wait.  A service that was scaled has its new tasks by then."""

_UNDONE: Final = (
    UpdateState.ROLLBACK_STARTED,
    UpdateState.ROLLBACK_PAUSED,
    UpdateState.ROLLBACK_COMPLETED,
)
"""States of an update after which the service does not have the wanted spec."""
_STUCK: Final = (UpdateState.PAUSED, *_UNDONE)
_ROLLBACK: Final = (UpdateState.ROLLBACK_STARTED, UpdateState.ROLLBACK_COMPLETED)
_BY_HAND: Final = ("manually requested rollback", "rollback completed")
"""Messages of a rollback that a user requested.  After a failed update, they name its cause."""
_NAMED_CAUSE: Final = re.compile(r"\btask \w+\b.*: ")
"""In the message of an update: a task, and why it stopped the update.  Managers of earlier versions leave out why."""
_FAILED: Final = (TaskState.FAILED, TaskState.REJECTED)
_UNPREPARED: Final = frozenset({"rejected", "start-failed"})
_NOT_STARTED: Final = "starting container failed"
_NO_NODE: Final = "no node is eligible"
_COUNTDOWN: Final = re.compile(r"(?:; )?next attempt in .*")


class ServiceProblem(msgspec.Struct, frozen=True, rename="pascal"):
    """The worst problem among a service's tasks (``GET /skep/services/{id}/explain``)."""

    kind: str = ""
    failures: int = 0
    """Consecutive failures in the task's slot."""
    task_id: str = msgspec.field(name="TaskID", default="")
    is_given_up: bool = False
    """Whether its restart policy allows no further attempt."""


class ServiceProgress(msgspec.Struct, frozen=True):
    """A service's progress towards its spec."""

    count: str
    """A text such as ``1 of 2 tasks run``."""
    cause: str = ""
    """Reason why not all tasks run.  Empty if unknown."""
    is_done: bool = False
    is_stuck: bool = False
    """Whether it cannot converge without a user's action."""
    is_explained: bool = False
    """Whether its tasks show all that the managers know."""
    is_resting: bool = False
    """Whether its update waits for a user, or only for the end of tasks without connections."""
    is_final: bool = False
    """Whether its tasks have ended as intended, so that none can fail again."""
    steady_s: float = 0.0
    """Seconds for which a service that is done has to stay so before a wait ends."""
    started_at: str = ""
    """Start of its youngest task, which is another one after a restart between two looks."""
    is_updating: bool = False
    """Whether an update is under way.  Its settings then decide what follows a failure."""
    problem: ServiceProblem = ServiceProblem()
    """The worst problem that the tasks show."""
    without_nodes: str = ""
    """Reason why a global service without tasks, or a global job, waits for nothing if the managers find it healthy.
    Empty for others.
    """

    @property
    def text(self) -> str:
        """Return the progress as one line of text."""
        return f"{self.count}: {self.cause}" if self.cause else self.count


class Explanation(msgspec.Struct, frozen=True, rename="pascal"):
    """The reason, from the managers, why a service is not in its desired state.  Managers of earlier versions send
    none.
    """

    reason: str = ""
    problem: ServiceProblem | None = None
    is_healthy: bool = False
    desired: int = 0
    """Number of tasks that should run."""


def explanation_of(response: Any) -> Explanation:
    """Decode the response to ``GET /skep/services/{id}/explain``.  A response of another form counts as empty."""
    try:
        return msgspec.convert(response, Explanation)
    except msgspec.ValidationError:
        return Explanation()


def explained(
    progress: ServiceProgress,
    explanation: Explanation,
    *,
    current: Collection[str],
    failures_max: int,
    unplaced_s: float = 0.0,
    given_up_s: float = 0.0,
    seen: int = 0,
) -> ServiceProgress:
    """Return ``progress`` with the managers' reason, and with ``is_stuck`` set if waiting cannot help.

    The reason has what the error of a task lacks, such as the last line of its output.

    Args:
        current: ids of the tasks with the present spec.  Only their failures count.
        failures_max: consecutive failures that make waiting hopeless, or 0 for no limit.
        unplaced_s: seconds for which a task has waited for a node, or for its networks and ports.
        given_up_s: seconds for which the restart policy has allowed no further attempt.
        seen: failures of one slot since the wait began.  The caller counts them because the cluster keeps few ended
            tasks.
    """
    if progress.is_done:
        return progress
    if progress.is_stuck:
        return replace(progress, cause=explanation.reason or progress.cause)
    if progress.without_nodes and explanation.is_healthy and not explanation.desired:
        return replace(progress, cause=progress.without_nodes, is_done=True)
    problem = explanation.problem or progress.problem
    cause = explanation.reason or progress.cause
    if problem.task_id and problem.task_id not in current:
        problem = replace(problem, failures=0)
    problem = replace(problem, failures=max(problem.failures, seen))
    why = why_hopeless(problem, failures_max, unplaced_s)
    is_current = problem.task_id in current and not progress.is_updating
    if problem.is_given_up and is_current and given_up_s >= GIVEN_UP_S:
        why = "not restarted, by its restart policy"
    if not why:
        return replace(progress, cause=cause, problem=problem)
    return replace(progress, cause=f"{why}: {cause}" if cause else why, is_stuck=True)


def why_hopeless(problem: ServiceProblem, failures_max: int, unplaced_s: float) -> str:
    """Return why waiting for a service with ``problem`` cannot help, or an empty string if it can."""
    if not failures_max:
        return ""
    bound = min(UNPREPARED_MAX, failures_max) if problem.kind in _UNPREPARED else failures_max
    if problem.failures >= bound:
        return f"{problem.failures} failures in a row" if problem.failures > 1 else "failed"
    bound_s, words = UNPLACED.get(problem.kind, (math.inf, ""))
    return words.format(s=unplaced_s) if unplaced_s >= bound_s else ""


def progress_of(
    service: Service,
    tasks: Sequence[Task],
    current: Collection[str] | None = None,
    *,
    is_kept: bool = False,
) -> ServiceProgress:
    """Return the progress of ``service`` towards its spec.

    Args:
        tasks: the service's tasks, including ended ones.
        current: ids of the tasks that the leader does not replace (the filter ``_up-to-date``).  With None, these are
            the tasks with the present version of the spec, or with the same template if versions are unknown.
        is_kept: whether the present spec is the wanted one, even if a rollback has led to it.
    """
    if current is None:
        current = {task.id for task in tasks if _is_current(task, service)}
    mode = service.spec.mode
    if mode.replicated_job is not None or mode.global_job is not None:
        return _job(service, tasks)
    if is_stopped(service.spec.labels):
        return _stopping([task for task in tasks if not task.status.state.is_terminal])
    if (over := _over(service, tasks, current, is_kept=is_kept)) is not None:
        return over
    wanted = [task for task in tasks if task.desired_state == TaskState.RUNNING]
    done = _done_slots(tasks, current)
    slots = _wanted_slots(tasks) | done
    running = {
        _slot(task) for task in wanted if task.id in current and task.status.state is TaskState.RUNNING
    }
    # A slot of a one-shot service that is done needs no running task.
    updated, is_global = len(running | done), mode.global_ is not None
    count = max(len(slots), 0 if is_global else service.spec.replicas)
    update = service.update_status
    is_updating = update is not None and update.state in UNDER_WAY
    is_settled = len(wanted) == len(running) and updated == count
    is_all = is_settled and not is_updating and bool(count or not is_global)
    end = _end_of_rest(service, updated, count)
    if is_all or end:
        text = f"{updated} of {count} tasks updated, {_running(wanted)} running, waiting for {end}"
        return ServiceProgress(
            text if end else _running_text(updated, count, len(done - running)),
            is_done=True,
            steady_s=_steady_s(service, tasks, current),
            started_at=max((task.status.timestamp for task in wanted), default=""),
            is_resting=bool(end),
        )
    of_spec = _of_spec(tasks, current)
    cause, problem = _cause(of_spec) if updated < count else "", _problem(of_spec)
    if any(task.id not in current for task in wanted):
        # This counts slots, because an old and a new task of one slot may both run.
        text = f"{updated} of {count} tasks updated, {_running(wanted)} running"
    else:
        # The update has yet to replace the other tasks of a global one-shot service, which have ended.
        total = len(_youngest(tasks)) if is_global and is_updating else count
        text = _running_text(updated, total, len(done - running))
    no_node = "" if count else _NO_NODE
    return ServiceProgress(text, cause, problem=problem, is_updating=is_updating, without_nodes=no_node)


def _over(
    service: Service, tasks: Sequence[Task], current: Collection[str], *, is_kept: bool
) -> ServiceProgress | None:
    """Return the progress of a service whose tasks are done for good, or whose update is stuck, else None."""
    update = service.update_status
    is_rollback = is_kept and update is not None and update.state in _ROLLBACK
    is_undone = update is not None and update.state in _UNDONE and not is_rollback
    # This comes before a pause, because a leader of an earlier version pauses an update at every early end.
    if not is_undone and (ended := _ended(service, tasks, current)) is not None:
        return ended
    if update is not None and update.state in _STUCK and not is_rollback:
        return ServiceProgress(_stuck(update.state, update.message, _cause(tasks)), is_stuck=True)
    return None


def progress_after_deploy(
    service: Service,
    tasks: Sequence[Task],
    current: Collection[str] | None = None,
    *,
    is_kept: bool = False,
) -> ServiceProgress:
    """Return ``progress_of`` a service that a deploy has written.

    A scheduled job is done at once: its next run has the new spec.
    """
    if CRON in service.spec.labels:
        return ServiceProgress("it has a schedule", is_done=True)
    return progress_of(service, tasks, current, is_kept=is_kept)


def progress_without(name: str, spec: ServiceSpec | None) -> ServiceProgress:
    """Return the progress of a service that a deploy waits for and that no longer exists.

    Args:
        spec: the desired spec.  Its label may let the cluster remove a job as soon as it has ended.

    Raises: FailedPrecondition: someone else has removed it.
    """
    if spec is not None and JOB_TTL in spec.labels:
        return ServiceProgress(f"ended, and removed by its label {JOB_TTL}", is_done=True, is_final=True)
    raise FailedPrecondition(f"service {name} was removed meanwhile. Deploy again to create it.")


def _stopping(left: Sequence[Task]) -> ServiceProgress:
    """Return the progress of a service that is stopped, from the tasks that have yet to end."""
    text = f"tasks left to stop: {len(left)}" if left else "stopped"
    is_lost = bool(left) and all(task.status.state is TaskState.UNKNOWN for task in left)
    problem = ServiceProblem(kind="left" if is_lost else "")
    return ServiceProgress(text, _cause(left), is_done=not left, is_explained=True, problem=problem)


def _end_of_rest(service: Service, updated: int, count: int) -> str:
    """Return what ends the present step of a staged update that waits for it, or an empty text."""
    step = resting_step(service)
    if step is None or (count and updated < tasks_of_step(step, count)):
        return ""
    return end_of_step(step, service.spec.name) if count else WITHOUT_TASKS


def _steady_s(service: Service, tasks: Sequence[Task], current: Collection[str]) -> float:
    """Return for how many seconds the running tasks have to stay so, as a task may end a moment after its start.

    The leader has monitored the tasks of a completed update itself.  A wait does not compare the times of starts with
    its own clock, so it also verifies tasks that have run for long.
    """
    if not any(task.is_active for task in tasks):
        return 0.0
    update, config = service.update_status, service.spec.update_config
    is_monitored = update is not None and update.state in ENDED
    if is_monitored and not failed_by_slot(tasks, current):
        return 0.0
    return config.monitor / SECOND_NS if config is not None and config.monitor else STEADY_S


def is_rolled_back_by_hand(service: Service) -> bool:
    """Return whether a user has requested the rollback that led to the present spec."""
    update = service.update_status
    return update is not None and update.state in _ROLLBACK and update.message in _BY_HAND


def _slot(task: Task) -> Hashable:
    """Return the slot of a task, or the node of a global service's task."""
    return task.slot or task.node_id or task.id


def _wanted_slots(tasks: Iterable[Task]) -> set[Hashable]:
    """Return the slots with a task that should run now or later.

    A task of a global service that waits for its restart belongs to a node that has no other task.
    """
    return {_slot(task) for task in tasks if task.desired_state == TaskState.RUNNING or _is_held(task)}


def _done_slots(tasks: Iterable[Task], current: Collection[str]) -> set[Hashable]:
    """Return the slots of a one-shot service that are done with the present spec.

    Only the youngest task of a slot counts: an ended task of an earlier deploy may have had the same spec.
    """
    return {slot for slot, task in _youngest(tasks).items() if task.id in current and task.is_done}


def _youngest(tasks: Iterable[Task]) -> dict[Hashable, Task]:
    """Return the youngest task of each slot that is not being removed."""
    kept = (task for task in tasks if task.desired_state < TaskState.REMOVE)
    return {_slot(task): task for task in sorted(kept, key=lambda task: task.created_at.rstrip("Z"))}


def _of_spec(tasks: Iterable[Task], current: Collection[str]) -> list[Task]:
    """Return the tasks with the present spec, without failures that the service has left behind.

    A younger task of the slot has another spec, or ended without a failure.  The failure says nothing about the present
    attempt, even if a rollback has restored the spec of that time.
    """
    slots: dict[Hashable, list[Task]] = {}
    for task in sorted(tasks, key=lambda task: task.created_at.rstrip("Z")):
        kept = slots.setdefault(_slot(task), [])
        is_current, state = task.id in current, task.status.state
        if not is_current or (state.is_terminal and state not in _FAILED):
            kept[:] = (one for one in kept if one.status.state not in _FAILED)
        if is_current:
            kept.append(task)
    return [task for kept in slots.values() for task in kept]


def _running_text(updated: int, count: int, done: int) -> str:
    """Return the count of tasks that run, with ``done`` tasks of a one-shot service, which have ended."""
    completed = f", {done} completed" if done else ""
    return f"{updated - done} of {count} tasks run{completed}"


def _is_held(task: Task) -> bool:
    """Return whether a task waits for its turn or for a restart."""
    return task.desired_state is TaskState.READY and not task.status.state.is_terminal


def _running(tasks: Iterable[Task]) -> int:
    """Return the number of slots with a running task."""
    return len({_slot(task) for task in tasks if task.status.state is TaskState.RUNNING})


def _stuck(state: UpdateState, message: str, cause: str) -> str:
    """Return why an update is stuck.

    ``cause``: a task's error, which the managers' message may already have, often in plainer words.
    """
    text = message
    if not message.startswith(("update ", "rollback ")):  # for example, the message of a pause by a user
        text = f"the update is {state.value}: {message}"
    is_named = cause in text or _NAMED_CAUSE.search(message) is not None
    return text if is_named else f"{text} ({cause})"


def _ended(service: Service, tasks: Sequence[Task], present: Collection[str]) -> ServiceProgress | None:
    """Return the progress of a service if its tasks have ended and are not restarted (``restart: no``), else None."""
    policy = service.spec.task_template.restart_policy
    if policy is None or policy.condition is RestartCondition.ANY:
        return None
    youngest = _youngest(tasks)
    current = [task for task in youngest.values() if task.id in present]
    done = _done_slots(tasks, present)
    # A global service has a slot on each of its nodes, also where its update has not replaced an ended task yet.
    is_global = service.spec.mode.global_ is not None
    count = len(youngest) if is_global else service.spec.replicas
    if done and len(done) == count:
        return ServiceProgress(f"{count} of {count} tasks completed", is_done=True, is_final=True)
    is_failed = any(task.status.state in _FAILED for task in current)
    if (
        policy.condition is RestartCondition.NONE
        and is_failed
        and not any(task.is_active for task in current)
    ):
        return ServiceProgress("its tasks ended and are not started again", _cause(current), is_stuck=True)
    return None


def _is_current(task: Task, service: Service) -> bool:
    if task.spec_version is not None and service.spec_version is not None:
        return task.spec_version == service.spec_version
    # The comparison ignores the field ``Runtime``, which the API omits in the tasks of containers.
    return replace(task.spec, runtime="") == replace(service.spec.task_template, runtime="")


def _job(service: Service, tasks: Sequence[Task]) -> ServiceProgress:
    if service.job_status is not None and service.job_status.awaits_first_run:
        return ServiceProgress("it waits for its first run", is_done=True)
    iteration = service.job_status.job_iteration if service.job_status is not None else None
    current = [task for task in tasks if iteration is None or task.job_iteration == iteration]
    complete = sum(task.status.state is TaskState.COMPLETE for task in current)
    job = service.spec.mode.replicated_job
    count = (
        (job.total_completions if job.total_completions is not None else 1)
        if job is not None
        else len({_slot(task) for task in current})
    )
    text = f"{complete} of {count} tasks completed"
    if complete >= count and (count or job is not None):
        return ServiceProgress(text, is_done=True, is_final=True)
    policy = service.spec.task_template.restart_policy
    failed = [task for task in current if task.status.state in _FAILED]
    is_given_up = policy is not None and policy.condition is RestartCondition.NONE
    if failed and is_given_up and not any(task.is_active for task in current):
        return ServiceProgress(f"{text}; the others are not started again", _cause(current), is_stuck=True)
    no_more = "" if job is not None else "no other node is eligible" if count else _NO_NODE
    return ServiceProgress(text, _cause(current), problem=_problem(current), without_nodes=no_more)


def _problem(tasks: Sequence[Task]) -> ServiceProblem:
    """Return the problem of the slot with most consecutive failures, as far as ended tasks are kept."""
    rows: dict[Hashable, list[Task]] = {}
    for task in sorted(tasks, key=lambda task: task.created_at.rstrip("Z")):
        row = rows.setdefault(_slot(task), [])
        if task.status.state in _FAILED:
            row.append(task)
        elif task.status.state is TaskState.RUNNING or task.status.state.is_terminal:
            row.clear()
    longest = max(
        filter(None, rows.values()), key=lambda row: (len(row), row[-1].created_at.rstrip("Z")), default=[]
    )
    if not longest:
        is_unplaced = any(
            task.status.state is TaskState.PENDING and is_no_node(task.status.err) for task in tasks
        )
        return ServiceProblem(kind="no-node") if is_unplaced else ServiceProblem()
    last = longest[-1]
    kind = "exit"
    if last.status.state is TaskState.REJECTED:
        kind = "rejected"
    elif last.status.err.startswith(_NOT_STARTED):
        kind = "start-failed"
    return ServiceProblem(kind=kind, failures=len(longest), task_id=last.id)


def failed_by_slot(tasks: Iterable[Task], current: Collection[str]) -> dict[str, Hashable]:
    """Return the slots of failed tasks with the present spec, by task id."""
    return {task.id: _slot(task) for task in _of_spec(tasks, current) if task.status.state in _FAILED}


def running_by_slot(tasks: Iterable[Task], current: Collection[str]) -> dict[str, Hashable]:
    """Return the slots of running tasks with the present spec, by task id."""
    return {
        task.id: _slot(task)
        for task in tasks
        if task.id in current and task.status.state is TaskState.RUNNING and task.is_wanted
    }


def _cause(tasks: Iterable[Task]) -> str:
    """Return the newest error of an unhealthy task, or an empty text.

    The time until the next attempt is left out, because the text would otherwise change constantly.
    """
    unwell = [
        task
        for task in tasks
        if task.status.state in _FAILED or (task.status.err and not task.status.state.is_terminal)
    ]
    texts = (
        _COUNTDOWN.sub("", task.status.err or task.status.message)
        for task in sorted(unwell, key=lambda task: task.status.timestamp, reverse=True)
    )
    return next(filter(None, texts), "")
