"""Task history: how many ended tasks a slot keeps, and when removed objects are deleted.

A task that is to be removed is deleted as soon as it has stopped (or if it never started).  Of each slot's ended
tasks as many are kept as the cluster's history limit says, and always the youngest; with ``max_attempts`` at least
one more than that, and so many that ended by themselves, because restarts are counted by them.  A slot of a global
service or job ends with its node: its tasks are deleted once the node was removed, or each node that comes and goes
would leave some behind for ever.  A removed service is deleted with its last task; a version of a spec is deleted when
no task refers to it.

Source: swarmkit, manager/orchestrator/taskreaper/task_reaper.go; manager/orchestrator/global/global.go (the tasks of a
removed node).
"""

from collections.abc import Iterable, Sequence

from skep.manager.orchestrator.slots import Slot, age, has_reported_end, is_assigned
from skep.model.meta import Version
from skep.model.node import Node
from skep.model.schedules import max_attempts_of
from skep.model.service import RestartPolicy, Service
from skep.model.task import Task, TaskState
from skep.store.kinds import SpecVersion

DEFAULT_LIMIT = 5


def is_disposable(task: Task) -> bool:
    """Whether a task that is to be removed can be deleted: no agent holds anything for it."""
    is_idle = task.status.state < TaskState.ASSIGNED or task.status.state.is_terminal
    return task.desired_state >= TaskState.REMOVE and is_idle


def is_past_attachment(task: Task, node: Node | None) -> bool:
    """Whether the task stood for a plain container that is gone, or whose node is: its history has no use."""
    return task.spec.network_attachment_spec is not None and (node is None or task.status.state.is_terminal)


def is_of_gone_slot(task: Task, node: Node | None) -> bool:
    """Whether the task belongs to a node slot whose node was removed, and its end is known (``is_orphaned`` before)."""
    is_in_node_slot = bool(task.service_id) and not task.slot and bool(task.node_id)
    return node is None and is_in_node_slot and not is_assigned(task)


def is_live(task: Task, node: Node | None) -> bool:
    """Whether the task can certainly not be removed: it is wanted, has not ended, and its node exists."""
    return (
        task.is_active
        and task.spec.network_attachment_spec is None
        and (node is not None or not task.node_id)
    )


def is_orphaned(task: Task, node: Node | None) -> bool:
    """Whether the task's end will never be reported, because its node left the cluster."""
    return node is None and bool(task.node_id) and is_assigned(task)


def surplus_history(
    slot: Sequence[Task],
    limit: int,
    iteration: Version | None = None,
    updating: Version | None = None,
    attempts: int = 0,
) -> Slot:
    """Tasks of one slot that exceed its history limit, oldest first.

    ``limit`` counts the tasks of the slot that ended and one that is to run; negative: no limit.  Whatever the limit,
    tasks that decisions depend on are kept: the youngest task of the slot (its delay, and that the slot was given up);
    the completed tasks of a job's present ``iteration``, which would be run once more; those by which the update
    to the version ``updating``, which is under way, is judged; and the last ``attempts`` that ended by themselves, by
    which restarts are counted (``restart.attempts_of``): tasks that were moved must not displace them.
    """
    if limit < 0 or len(slot) <= limit:
        return ()
    present = [task for task in slot if not _is_past(task)]
    ordered = sorted(slot, key=age)
    judged = _judged([task for task in ordered if updating is not None and task.spec_version == updating])
    version = ordered[-1].spec_version
    counted = [
        task
        for task in ordered
        if task.ended_by_itself and task.spec_version == version and task.job_iteration == iteration
    ]
    kept = (*judged, *counted[max(len(counted) - attempts, 0) :])
    past = [
        task for task in ordered[:-1] if _is_past(task) and task not in kept and not _counts(task, iteration)
    ]
    # Of the unfinished tasks only one that is wanted counts: one that is still stopping, or on a lost node, does not.
    size = len(slot) - len(present) + any(task.is_wanted for task in present)
    return tuple(past[: max(size - limit, 0)])


def _judged(attempts: Sequence[Task]) -> Sequence[Task]:
    """Those of a slot's ``attempts``, of one version, that ``update`` may take for the slot's lead.

    The first one that reported its end, as it may have run, and the first one that ended by itself, as earlier ones may
    have been stopped before they ran; and the last one, as a new leader does not judge by one that ended before its
    term.
    """
    ended = [task for task in attempts if has_reported_end(task)]
    failed = [task for task in ended if task.ended_by_itself]
    return (*ended[:1], *failed[:1], *ended[-1:])


def _counts(task: Task, iteration: Version | None) -> bool:
    is_present = iteration is not None and task.job_iteration == iteration
    return is_present and task.status.state is TaskState.COMPLETE


def history_limit(service: Service, cluster_limit: int | None) -> int:
    """Tasks that each slot of ``service`` keeps."""
    policy = service.spec.task_template.restart_policy or RestartPolicy()
    if policy.max_attempts:
        return policy.max_attempts + 1
    return DEFAULT_LIMIT if cluster_limit is None else cluster_limit


def attempts_kept(service: Service) -> int:
    """How many tasks that ended by themselves each slot of ``service`` keeps for its ``max_attempts``.

    ``service``: a job as its present run has it.
    """
    policy = service.spec.task_template.restart_policy or RestartPolicy()
    limit = policy.max_attempts or max_attempts_of(service.spec.labels)
    return limit + 1 if limit else 0


def unused_versions(
    service: Service, versions: Iterable[SpecVersion], tasks: Iterable[Task]
) -> list[SpecVersion]:
    """Versions of the service's spec that no task refers to; the present one is always kept."""
    used = {task.spec_version.index for task in tasks if task.spec_version is not None}
    if service.spec_version is not None:
        used.add(service.spec_version.index)
    if service.job_status is not None and service.job_status.spec_version is not None:
        used.add(service.job_status.spec_version.index)
    return [version for version in versions if version.index not in used]


def _is_past(task: Task) -> bool:
    """Whether the task has ended, or will never run.

    An ended task that is still wanted waits for its successor, which takes over its delay and count; only a completed
    run of a job is wanted for ever.
    """
    is_run = task.job_iteration is not None and task.status.state is TaskState.COMPLETE
    if task.is_wanted and not is_run:
        return False
    return task.status.state.is_terminal or task.status.state < TaskState.ASSIGNED
