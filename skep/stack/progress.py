"""How far a service is on the way to its spec, from its tasks: pure."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from skep.model.service import RestartCondition, Service, UpdateState
from skep.model.task import Task, TaskState

UP_TO_DATE: Final[Mapping[str, Sequence[str]]] = {"_up-to-date": ["true"]}
"""The filter of ``GET /tasks`` for the tasks that match the present spec, ports included."""

_STUCK = (
    UpdateState.PAUSED,
    UpdateState.ROLLBACK_STARTED,
    UpdateState.ROLLBACK_PAUSED,
    UpdateState.ROLLBACK_COMPLETED,
)


class ServiceProgress(msgspec.Struct, frozen=True):
    """``text``: for people.  ``is_stuck``: it does not go on by itself."""

    text: str
    is_done: bool = False
    is_stuck: bool = False


def progress_of(
    service: Service, tasks: Sequence[Task], current: Collection[str] | None = None
) -> ServiceProgress:
    """Return how far ``service`` is on the way to its spec.

    Args:
        tasks: its tasks, ended ones too.
        current: ids of the tasks that the leader leaves as they are (the filter ``_up-to-date``).  None: those of the
            present version of the spec, or with the same template where versions are not known.
    """
    if current is None:
        current = {task.id for task in tasks if _is_current(task, service)}
    if (
        ended := _ended(service, tasks, current)
    ) is not None:  # an update takes every early end for a failure
        return ended
    update = service.update_status
    if update is not None and update.state in _STUCK:
        return ServiceProgress(_stuck(update.state, update.message, _cause(tasks)), is_stuck=True)
    mode = service.spec.mode
    if mode.replicated_job is not None or mode.global_job is not None:
        return _job(service, tasks)
    wanted = [task for task in tasks if task.desired_state == TaskState.RUNNING]
    running = sum(task.status.state is TaskState.RUNNING and task.id in current for task in wanted)
    count = max(len(wanted), service.spec.replicas if mode.global_ is None else 0)
    is_updating = update is not None and update.state is UpdateState.UPDATING
    if running == count == len(wanted) and not is_updating and (count or mode.global_ is None):
        return ServiceProgress(f"{running} of {count} tasks run", is_done=True)
    return ServiceProgress(f"{running} of {count} tasks run{_cause(tasks) if running < count else ''}")


def _stuck(state: UpdateState, message: str, cause: str) -> str:
    """Why an update does not go on; ``cause``: of a task, which the message may have already."""
    text = message
    if not message.startswith(("update ", "rollback ")):  # as of one that was paused by its user
        text = f"the update is {state.value}: {message}"
    return text if cause.strip(" ()") in text else f"{text}{cause}"


def _ended(service: Service, tasks: Sequence[Task], present: Collection[str]) -> ServiceProgress | None:
    """Of a service whose tasks may end and are not started again (``restart: no``); None: it is none, or goes on."""
    policy = service.spec.task_template.restart_policy
    if policy is None or policy.condition is RestartCondition.ANY:
        return None
    current = [task for task in tasks if task.id in present]
    complete = sum(task.status.state is TaskState.COMPLETE for task in current)
    if complete and complete == service.spec.replicas:
        return ServiceProgress(f"{complete} of {complete} tasks completed", is_done=True)
    is_failed = any(task.status.state in (TaskState.FAILED, TaskState.REJECTED) for task in current)
    if (
        policy.condition is RestartCondition.NONE
        and is_failed
        and not any(task.is_active for task in current)
    ):
        return ServiceProgress(f"its tasks ended and are not started again{_cause(current)}", is_stuck=True)
    return None


def _is_current(task: Task, service: Service) -> bool:
    if task.spec_version is not None and service.spec_version is not None:
        return task.spec_version == service.spec_version
    # The API leaves out the runtime of a task that is a container.
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
        else len(current)
    )
    if complete >= count and (count or job is not None):
        return ServiceProgress(f"completed {complete} of {count}", is_done=True)
    return ServiceProgress(f"completed {complete} of {count}{_cause(current)}")


def _cause(tasks: Iterable[Task]) -> str:
    """Why the newest task that is not well is not; empty: nothing is known."""
    failed = (TaskState.FAILED, TaskState.REJECTED)
    unwell = [
        task
        for task in tasks
        if task.status.state in failed or (task.status.err and not task.status.state.is_terminal)
    ]
    if not unwell:
        return ""
    last = max(unwell, key=lambda task: task.status.timestamp)
    return f" ({last.status.err or last.status.message})"
