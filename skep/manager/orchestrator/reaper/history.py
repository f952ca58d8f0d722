"""Decides how many ended tasks a slot keeps, and when removed objects are deleted.

A removed task is deleted as soon as it has stopped, or at once if it never started.  Each slot keeps as many ended
tasks as the cluster's history limit allows, and always the youngest.  With ``max_attempts`` it keeps at least one more
than that number, and as many tasks that ended by themselves, because they count as restarts.  The tasks of a global
service or job on a node are deleted after the node's removal.  Otherwise each short-lived node would leave some behind
forever.  A removed service is deleted with its last task.  A version of a spec is deleted when no task refers to it.

Source: swarmkit, manager/orchestrator/taskreaper/task_reaper.go; manager/orchestrator/global/global.go (the tasks of a
removed node).
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise

from skep.manager.orchestrator.slots import Slot, age, has_reported_end, last_of
from skep.model.node import Node
from skep.model.options.schedules import max_attempts_of
from skep.model.service import UNDER_WAY, RestartPolicy, Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import TaskId
from skep.model.values.meta import Version
from skep.model.values.times import Timestamp, unix_ns

DEFAULT_LIMIT = 5
"""Ended tasks that a slot keeps if the cluster sets no limit, as in Docker."""


def is_disposable(task: Task) -> bool:
    """Return whether a removed task can be deleted, because no node holds anything for it."""
    is_idle = task.status.state < TaskState.ASSIGNED or task.status.state.is_terminal
    return task.desired_state >= TaskState.REMOVE and is_idle


def is_past_attachment(task: Task, node: Node | None) -> bool:
    """Return whether the task represents a plain container that has ended or lost its node.  Such tasks need no
    history.
    """
    return task.spec.network_attachment_spec is not None and (node is None or task.status.state.is_terminal)


def is_of_gone_slot(task: Task, node: Node | None) -> bool:
    """Return whether the task belongs to a removed node's slot and its end is known (check ``is_orphaned`` first)."""
    is_in_node_slot = bool(task.service_id) and not task.slot and bool(task.node_id)
    return node is None and is_in_node_slot and not task.is_assigned


def is_live(task: Task, node: Node | None) -> bool:
    """Return whether the task must stay, because it is desired, has not ended, and its node exists."""
    return (
        task.is_active
        and task.spec.network_attachment_spec is None
        and (node is not None or not task.node_id)
    )


def is_orphaned(task: Task, node: Node | None) -> bool:
    """Return whether the task's end will never be reported, because its node left the cluster."""
    return node is None and bool(task.node_id) and task.is_assigned


def surplus_history(
    slot: Sequence[Task],
    limit: int,
    iteration: Version | None = None,
    updating: Collection[Version | None] = (),
    attempts: int = 0,
    times: Sequence[Timestamp] = (),
) -> Slot:
    """Return the tasks of one slot that exceed its history limit, oldest first.

    Tasks that decisions depend on are kept, whatever the limit: the slot's youngest and last task (for its restart
    delay, and whether the slot may be filled again), and the tasks named below.

    Args:
        slot: The slot's tasks.
        limit: Maximum number of the slot's ended tasks plus its wanted one.  Negative means no limit.
        iteration: A job's current iteration.  Its completed tasks are kept, because their work would otherwise be
            repeated.
        updating: The versions of the update in progress, of which a staged update that was scaled has several.  The
            tasks that decide about its success are kept.
        attempts: How many tasks that ended by themselves to keep of each version of a wanted task, because restarts are
            counted by them, or more if a task's own policy counts more.  Tasks that were moved must not displace them.
        times: Times from which attempts count (``counted_from``).  Earlier ones decide nothing, so a later one does.
    """
    if limit < 0 or len(slot) <= limit:
        return ()
    present = [task for task in slot if not _is_past(task)]
    ordered = tuple(sorted(slot, key=age))
    last = last_of(ordered) or ordered[-1]
    kept = {last.id}
    for version in updating:
        made = [task for task in ordered if task.spec_version == version]
        kept.update(task.id for row in _rows(made, times) for task in _judged(row))
    if updating:
        # An attempt of an earlier version with the same task spec shows that the update need not wait for the next one.
        kept |= {
            before.id for before, after in pairwise(ordered) if after.is_wanted and before.ended_by_itself
        }
    # An old task may run on after attempts at a newer spec, which may have another policy.
    for decided in (ordered[-1], last, *(task for task in present if task.is_wanted)):
        same = [task for task in ordered if task.spec_version == decided.spec_version]
        kept |= _counted(same, iteration, max(attempts, _attempts_kept(decided.spec.restart_policy)))
    past = [
        task
        for task in ordered[:-1]
        if _is_past(task) and task.id not in kept and not _counts(task, iteration)
    ]
    # Among the unfinished tasks only a desired task counts, and not a task that is stopping or on a lost node.
    size = len(slot) - len(present) + any(task.is_wanted for task in present)
    return tuple(past[: max(size - limit, 0)])


def updating_versions(service: Service) -> Collection[Version | None]:
    """Return the versions of the update in progress."""
    status = service.update_status
    if status is None or status.state not in UNDER_WAY:
        return ()
    scaled = status.split.versions if status.split is not None and status.split.old is not None else ()
    return {service.spec_version, *(Version(index=index) for index in scaled)}


def counted_from(service: Service, newest_before_term: Timestamp) -> Sequence[Timestamp]:
    """Return the creation times of the newest task when the leader's term began, and when the update was resumed.

    Attempts that had ended by then decide nothing about the update.
    """
    resumed = service.update_status.tolerated_until if service.update_status is not None else None
    return (newest_before_term,) if resumed is None else (newest_before_term, resumed)


def _rows(attempts: Sequence[Task], times: Iterable[Timestamp]) -> Iterator[Sequence[Task]]:
    """Yield all ``attempts``, and the attempts up to each time and after it."""
    yield attempts
    for time in times:
        yield [task for task in attempts if unix_ns(task.created_at) <= unix_ns(time)]
        yield [task for task in attempts if unix_ns(task.created_at) > unix_ns(time)]


def _judged(attempts: Sequence[Task]) -> Sequence[Task]:
    """Return the ``attempts`` at one version in a slot that ``update`` may choose as the slot's lead.

    They are the first attempt that reported its end, because it may have run; the first that ended by itself, because
    earlier ones may have been stopped before they ran; and the last, because it may have ended after a time from which
    attempts count.
    """
    ended = [task for task in attempts if has_reported_end(task)]
    failed = [task for task in ended if task.ended_by_itself]
    return (*ended[:1], *failed[:1], *ended[-1:])


def _counted(same: Sequence[Task], iteration: Version | None, attempts: int) -> set[TaskId]:
    """Return the tasks of one version by which its restarts are counted (``restart.attempts_of``).

    Their successors are kept as well: without a successor that was moved, a later task would count as the restart.
    """
    ended = [task.id for task in same if task.ended_by_itself and task.job_iteration == iteration]
    kept = {*ended[max(len(ended) - attempts, 0) :]}
    return kept | {after.id for before, after in pairwise(same) if before.id in kept}


def _counts(task: Task, iteration: Version | None) -> bool:
    is_present = iteration is not None and task.job_iteration == iteration
    return is_present and task.status.state is TaskState.COMPLETE


def history_limit(service: Service, cluster_limit: int | None) -> int:
    """Return how many tasks each slot of ``service`` keeps."""
    policy = service.spec.task_template.restart_policy or RestartPolicy()
    if policy.attempts_limit:
        return policy.attempts_limit + 1
    return DEFAULT_LIMIT if cluster_limit is None else cluster_limit


def attempts_kept(service: Service) -> int:
    """Return how many tasks that ended by themselves each slot of ``service`` keeps for its ``max_attempts``.

    Args:
        service: For a job, the service as of its current run.
    """
    return _attempts_kept(service.spec.task_template.restart_policy, max_attempts_of(service.spec.labels))


def _attempts_kept(policy: RestartPolicy | None, default: int = 0) -> int:
    limit = (policy or RestartPolicy()).attempts_limit or default
    return limit + 1 if limit else 0


def _is_past(task: Task) -> bool:
    """Return whether the task has ended or will never run.

    An ended task that is still desired waits for its successor, which takes over its delay and count.  Only a completed
    task of a job stays desired forever.
    """
    is_run = task.job_iteration is not None and task.status.state is TaskState.COMPLETE
    if task.is_wanted and not is_run:
        return False
    return task.status.state.is_terminal or task.status.state < TaskState.ASSIGNED
