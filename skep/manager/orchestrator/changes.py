"""The orchestrator's changes.  Each is plain data, which ``apply`` writes in one small transaction.

A change is decided on one state and applied to a possibly newer one, so ``apply`` checks the preconditions again.  A
change that is applied twice or too late does nothing.  The watch then shows the newer state, and a new decision
follows.
"""

from collections.abc import Iterable
from enum import Enum
from typing import TypeAlias, assert_never

import msgspec
from msgspec.structs import replace

from skep.errors import NamesAnother, SkepError, Unavailable
from skep.manager.acme.own_certificates import check_certificates
from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.nodes.trust import check_rights
from skep.manager.orchestrator.replacement.enforcement import is_unfit
from skep.manager.orchestrator.slots import age
from skep.manager.services.dependent_services import check_dependencies, requiring, restart_dependents
from skep.manager.services.disruption_budget import is_available
from skep.manager.services.freezes import is_held_at_commit, stack_of_service
from skep.manager.services.job_runs import settled
from skep.manager.services.quotas import claim_service
from skep.manager.services.registry_auth import follow_rollback
from skep.manager.services.removal import hide_service
from skep.manager.services.routes import check_routes
from skep.manager.services.spec_history import keep_spec
from skep.model.node import Availability, Node, is_lost
from skep.model.options.autoscaling import with_number_kept
from skep.model.service import ENDED, PAUSED, Service, SpecAuthor, UpdateSplit, UpdateState, UpdateStatus
from skep.model.staging.updates import split_of_rollback
from skep.model.task import Restart, StopCause, Task, TaskState, TaskStatus
from skep.model.values.ids import IdSource, NodeId, TaskId
from skep.model.values.meta import Version
from skep.model.values.stacks import stack_of
from skep.model.values.times import MILLISECOND_NS, SECOND_NS, Timestamp, timestamp, unix_ns
from skep.store.interface import Transaction
from skep.store.keys import HEAD
from skep.store.kinds import as_before_update, as_run, has_unreadable_status


class FillSlot(msgspec.Struct, frozen=True):
    """Create a task in a free slot, which is ``slot`` for a replicated service or job and ``node_id`` for a global one.

    Attributes:
        desired: READY only prepares the task, and ``start_steps`` starts it later.  For a job, RUNNING means COMPLETE.
        delay_s: Seconds from the task's creation until it may start.
        failures: Number of tasks before it that failed in a row.
        alongside: The slot's tasks on nodes that no longer fit, which run until the new task does (``evacuation``).
        node_id: For a replicated service, the target of a move for an even spread.
        is_old: Whether a staged update lets the slot have a task of the old version (``UpdateSplit.old``).
    """

    service: Service
    slot: int = 0
    node_id: NodeId = NodeId("")
    desired: TaskState = TaskState.RUNNING
    delay_s: float = 0.0
    failures: int = 0
    alongside: tuple[TaskId, ...] = ()
    is_old: bool = False


class Cause(Enum):
    """Reason to retire a task that has not ended.  Nothing is written if the reason no longer holds when the change is
    applied.
    """

    NODE_IS_LOST = "its node is down or gone"
    NODE_IS_LOST_AND_DRAINED = "its node is drained and down"
    NODE_IS_UNFIT = "its node is drained, or does not meet its constraints"
    NODE_IS_TOO_SMALL = "its node has less than its tasks have reserved"
    MOVES = "it moves to another node for an even spread"
    DOES_NOT_RUN = "it does not run"
    IS_LATE = "no node took it before the run's deadline"


class RetireTask(msgspec.Struct, frozen=True):
    """Stop a task.  SHUTDOWN keeps it in the slot's history, REMOVE deletes it once it has stopped.

    Attributes:
        successor: The task that takes over.  If it has ended meanwhile, before the leader could notice, nothing is
            written.
        is_due: Whether the slot is filled again once the node accepts tasks.
        is_refused: Whether every node refused the successor because of this task.  If the successor has a node by then,
            nothing is written, and the update continues with both tasks.
        service: The service at the time of the decision (``decided_for``).  If its spec has changed since, nothing is
            written.
        keeps: Tasks that have to be available still, by the disruption budget.  Otherwise nothing is written.
    """

    task: Task
    desired: TaskState = TaskState.SHUTDOWN
    successor: TaskId | None = None
    is_due: bool = False
    cause: Cause | None = None
    service: Service | None = None
    is_refused: bool = False
    keeps: tuple[TaskId, ...] = ()


class ReplaceTask(msgspec.Struct, frozen=True):
    """Retire ``task`` and fill its slot again, both or neither.

    If ``task`` was assigned to a node after the decision, the successor is only prepared: that node has to stop
    ``task`` first.  ``keeps`` is as in ``RetireTask``.
    """

    task: Task
    successor: FillSlot
    cause: Cause | None = None
    keeps: tuple[TaskId, ...] = ()


class StartTask(msgspec.Struct, frozen=True):
    """Start a prepared task: its desired state changes from READY to RUNNING (of a job to COMPLETE)."""

    task: Task


class SetUpdateStatus(msgspec.Struct, frozen=True):
    """Write the status of the update to ``service.spec_version``.

    With a ``split``, nothing is written if the split has changed since the decision.
    """

    service: Service
    state: UpdateState
    message: str
    split: UpdateSplit | None = None


class RollBack(msgspec.Struct, frozen=True):
    """Restore the previous spec, because the update to ``service.spec_version`` failed."""

    service: Service
    message: str


class RemoveService(msgspec.Struct, frozen=True):
    """Remove a job that has ended, as a user would, unless a service requires it (``skep.depends-on``)."""

    service: Service


class SettleRun(msgspec.Struct, frozen=True):
    """Write that a job's current run is over, or that a global run has its final set of nodes.

    The transaction checks all tasks and nodes again, because a run that is over never becomes active again.

    Attributes:
        is_over: Whether the decision found nothing left to do.
        is_late: Whether no further node may start the run.
    """

    service: Service
    is_over: bool = False
    is_late: bool = False


ROLLED_BACK = "update rolled back"
"""First words of the message of a rollback."""

Change: TypeAlias = (
    FillSlot | RetireTask | ReplaceTask | StartTask | SetUpdateStatus | RollBack | RemoveService | SettleRun
)
Step: TypeAlias = Change | Recheck


def fallback_for(change: Change, error: SkepError) -> Change | None:
    """Return the change to write if ``change`` was permanently refused, or None to retry ``change``.

    A rollback may be refused because the previous spec needs an object, such as a secret, that was removed meanwhile.
    """
    if not isinstance(change, RollBack):
        return None
    is_others = isinstance(error, NamesAnother) and error.stack != stack_of(change.service.spec.labels)
    why = error.unnamed if isinstance(error, NamesAnother) and is_others else str(error)
    message = _paused_instead(change.message, why)
    return SetUpdateStatus(change.service, UpdateState.PAUSED, message)


def _paused_instead(message: str, why: str) -> str:
    """Return the message of a pause that replaces a rollback with ``message``."""
    return f"update paused{message.removeprefix(ROLLED_BACK)}: cannot roll back: {why}"


def decided_for(service: Service, step: Step) -> Step:
    """Return ``step`` so that it does nothing once the spec of ``service`` has changed."""
    if isinstance(step, RetireTask) and service.removed_at is None:
        return replace(step, service=service)
    return step


def cause_to_leave(task: Task, node: Node | None) -> Cause | None:
    """Return the reason why ``task`` must leave its ``node``, or None if it has ended or leaves for another reason."""
    if task.status.state.is_terminal or node is None:
        return None
    if is_lost(node):
        is_drained = node.spec.availability is Availability.DRAIN
        return Cause.NODE_IS_LOST_AND_DRAINED if is_drained else Cause.NODE_IS_LOST
    if is_unfit(node, task):
        return Cause.NODE_IS_UNFIT
    return Cause.MOVES if task.relocation is not None else None


def key_of(change: Change) -> str:
    """Return a key for the part of the service that a change concerns.  One decision has at most one change per key."""
    match change:
        case FillSlot(_, slot, node_id):
            return f"{slot or node_id}"
        case RetireTask(task) | ReplaceTask(task) | StartTask(task):
            return task.id
    return type(change).__name__


def apply(tx: Transaction, change: Change, new_id: IdSource, now: Timestamp) -> None:
    """Write ``change``, unless its preconditions no longer hold.  ``now`` is a timestamp for display."""
    match change:
        case FillSlot():
            _fill(tx, change, new_id, now)
        case RetireTask(task, desired, successor, is_due, cause, service, is_refused, keeps):
            if service is not None and not _is_current_at_commit(tx, service):
                return
            may_run = desired is TaskState.REMOVE
            if _is_overtaken(tx, task, cause, may_run=may_run) or not _are_available(tx, keeps):
                return
            if successor is None or _can_take_over(tx, successor, is_refused=is_refused):
                _retire(tx, task.id, desired, now, is_due=is_due, cause=cause)
        case ReplaceTask(task, successor, cause, keeps):
            if _is_overtaken(tx, task, cause) or not _are_available(tx, keeps):
                return
            # Both or neither, because a slot that was only emptied would be filled at once, without the restart delay.
            if _is_current(tx, successor.service) and _retire(
                tx, task.id, TaskState.SHUTDOWN, now, cause=cause
            ):
                if _is_assigned_since(tx, task):
                    successor = replace(successor, desired=TaskState.READY)
                _fill(tx, successor, new_id, now)
        case StartTask(task):
            current = tx.lookup(Task, task.id)
            if current is not None and current.desired_state < TaskState.RUNNING:
                goal = TaskState.RUNNING if current.job_iteration is None else TaskState.COMPLETE
                tx.put(replace(current, desired_state=goal))
        case SetUpdateStatus():
            _set_update_status(tx, change, now)
        case RollBack(service, message):
            _roll_back(tx, service, message, now)
        case RemoveService(ended):
            job = tx.rely_on(Service, ended.id, HEAD, "job")
            was_run_or_retried = job is not None and job.job_status != ended.job_status
            if job is not None and job.spec_version == ended.spec_version and not was_run_or_retried:
                tx.rely_on_all(Service)  # a service that requires the job may be created at the same time
                if not tx.unreadable(Service) and not requiring(tx, job.spec.name):
                    hide_service(tx, job, now)
        case SettleRun(service, is_over, is_late):
            job = tx.rely_on(Service, service.id, HEAD, "job")
            if job is not None and job.job_status == service.job_status:
                status = settled(tx, job, is_over=is_over, is_late=is_late)
                if status != job.job_status:
                    tx.put(replace(job, job_status=status))
        case _:
            assert_never(change)


def _fill(tx: Transaction, change: FillSlot, new_id: IdSource, now: Timestamp) -> None:
    service = tx.lookup(Service, change.service.id)
    if service is None or not _is_current(tx, change.service):
        return
    service = as_before_update(tx, service) if change.is_old else as_run(tx, service)
    rivals = tx.find(Task, slot=f"{service.id}/{change.slot or change.node_id}")
    iteration = service.job_status.job_iteration if service.job_status is not None else None
    if any(
        task.is_active
        and (task.spec_version, task.job_iteration) == (service.spec_version, iteration)
        # Such a task runs until the new one does (``evacuation``).
        and not (task.id in change.alongside or _is_on_drained_node(tx, task))
        for task in rivals
    ):
        return
    is_job_start = iteration is not None and change.desired is TaskState.RUNNING
    tx.put(
        Task(
            id=TaskId(new_id()),
            created_at=_after(service, rivals, now),
            spec=service.spec.task_template,
            service_id=service.id,
            slot=change.slot,
            node_id=change.node_id,
            status=TaskStatus(timestamp=now, state=TaskState.NEW, message="created"),
            desired_state=TaskState.COMPLETE if is_job_start else change.desired,
            job_iteration=iteration,
            spec_version=service.spec_version,
            restart=_restart(change, rivals, now),
        )
    )


def _is_on_drained_node(tx: Transaction, task: Task) -> bool:
    node = tx.rely_on(Node, task.node_id, HEAD) if task.node_id else None
    return node is not None and node.spec.availability is Availability.DRAIN


def _are_available(tx: Transaction, ids: Iterable[TaskId]) -> bool:
    """Return whether all these tasks are available, and let the commit fail if that changes."""
    for id in ids:
        task = tx.rely_on(Task, id, HEAD, "status")
        if task is None or not is_available(task, tx.lookup(Node, task.node_id)):
            return False
    return True


def _restart(change: FillSlot, slot: Iterable[Task], now: Timestamp) -> Restart | None:
    if not (change.delay_s or change.failures):
        return None
    delay = round(change.delay_s * SECOND_NS)
    return Restart(
        failures=change.failures,
        delay=delay,
        not_before=timestamp(unix_ns(now) + delay),
        since=_failing_since(slot) if change.failures else None,
    )


def _failing_since(slot: Iterable[Task]) -> Timestamp | None:
    """Return the time at which the current series of failures in ``slot`` began, by the clock of the failed task's
    node.
    """
    last = max(slot, key=age, default=None)
    if last is None:
        return None
    before = last.restart
    return before.since if before is not None and before.failures and before.since else last.status.timestamp


def _is_current(tx: Transaction, decided: Service) -> bool:
    """Return whether the service is unchanged since the decision.  Otherwise a new decision follows."""
    service = tx.lookup(Service, decided.id)
    return (
        service is not None
        and service.removed_at is None
        and as_run(tx, service).spec_version == decided.spec_version
        and _run_of(service) == _run_of(decided)
        and not _is_paused_since(service, decided)
    )


def _is_current_at_commit(tx: Transaction, decided: Service) -> bool:
    """Return ``_is_current``, and let the commit fail if that changes.  A new task relies on its service's spec in any
    case.
    """
    tx.rely_on(Service, decided.id, HEAD)
    return _is_current(tx, decided)


def _run_of(service: Service) -> Version | None:
    """Return the current run of a job, or None if it has not run yet or the service is not a job."""
    job = service.job_status
    return job.job_iteration if job is not None and not job.awaits_first_run else None


def _is_paused_since(service: Service, decided: Service) -> bool:
    """Return whether the update was paused after the decision, so that it must not start with further slots."""
    before = decided.update_status.state if decided.update_status is not None else None
    now = service.update_status.state if service.update_status is not None else None
    return now in PAUSED and before not in PAUSED


def _after(service: Service, slot: Iterable[Task], now: Timestamp) -> Timestamp:
    """Return a creation time for a new task: ``now``, or a later time if the task must follow something with a later
    timestamp.

    Only the order of these timestamps matters.  It shows which task of a slot is the predecessor of another, in whole
    milliseconds, because nodes report the times of their volumes in these (``slot_volumes``).  If a user
    retries a job or resumes an update, tasks created up to then do not count as failures.  The youngest task of all
    slots, which another leader may have stamped, determines that time.
    """
    job, update = service.job_status, service.update_status
    before = [task.created_at for task in slot]
    before += [job.retried_until] if job is not None and job.retried_until is not None else []
    before += [update.tolerated_until] if update is not None and update.tolerated_until is not None else []
    latest_ns = max(map(unix_ns, before), default=0)
    return now if unix_ns(now) > latest_ns else timestamp(latest_ns + MILLISECOND_NS)


def _is_assigned_since(tx: Transaction, decided: Task) -> bool:
    """Return whether the task, which had no node, was assigned to one after the decision."""
    task = tx.lookup(Task, decided.id)
    return decided.status.state < TaskState.ASSIGNED and task is not None and task.is_stopping


def _is_overtaken(tx: Transaction, task: Task, cause: Cause | None, *, may_run: bool = False) -> bool:
    """Return whether the cause has passed, or the task has begun to run since the decision.

    A task that runs may have to wait for its replacement, or for the service's minimum.  ``may_run``: it does not wait.
    """
    if not may_run and task.status.state is not TaskState.RUNNING and _runs_now(tx, task):
        return True
    return cause is not None and _has_passed(tx, cause, task)


def _has_passed(tx: Transaction, cause: Cause, task: Task) -> bool:
    """Return whether the cause has passed.  Other managers write as well, and the leader's view may have been older."""
    match cause:
        case Cause.NODE_IS_LOST:
            return not is_lost(tx.rely_on(Node, task.node_id, "status"))
        case Cause.NODE_IS_LOST_AND_DRAINED:
            # If its node has returned, it leaves as other tasks of drained nodes do.
            node = tx.rely_on(Node, task.node_id, HEAD, "status")
            is_drained = node is not None and node.spec.availability is Availability.DRAIN
            return node is not None and not (is_lost(node) and is_drained)
        case Cause.NODE_IS_UNFIT:
            node = tx.rely_on(Node, task.node_id, HEAD, "status")
            return node is not None and (not is_unfit(node, task) or _keeps_unfit(tx, node, task))
        case Cause.NODE_IS_TOO_SMALL:
            return _is_frozen(tx, task)
        case Cause.MOVES:
            present = tx.rely_on(Task, task.id, HEAD)
            return (present is not None and present.relocation is None) or _is_frozen(tx, task)
        case Cause.DOES_NOT_RUN:
            if has_unreadable_status(tx, task):
                raise Unavailable(f"the status of task {task.id} cannot be read")
            return _runs_now(tx, task)
        case Cause.IS_LATE:
            current = tx.rely_on(Task, task.id, "status")
            return current is not None and current.is_assigned
    assert_never(cause)


def _runs_now(tx: Transaction, task: Task) -> bool:
    """Return whether the task runs, and let the commit fail if that changes."""
    current = tx.rely_on(Task, task.id, "status")
    return current is not None and current.status.state is TaskState.RUNNING


def _keeps_unfit(tx: Transaction, node: Node, task: Task) -> bool:
    """Return whether a change freeze has begun since the decision.  It does not delay a drain and new constraints."""
    service = tx.lookup(Service, task.service_id)
    if node.spec.availability is Availability.DRAIN or service is None:
        return False
    return service.spec.task_template.placement == task.spec.placement and _is_frozen(tx, task)


def _is_frozen(tx: Transaction, task: Task) -> bool:
    """Return whether a change freeze holds for the task's service, and let the commit fail if that changes."""
    return is_held_at_commit(tx, stack_of_service(tx.lookup(Service, task.service_id)))


def _can_take_over(tx: Transaction, successor: TaskId, *, is_refused: bool) -> bool:
    """Return whether the task is still active, its node is not lost, and no other task takes its place.

    If it was refused, it has to be without a node still.  The commit fails if any of that changes.
    """
    task = tx.rely_on(Task, successor, HEAD, "status")
    if task is None or not task.is_active or task.preemption is not None:
        return False
    if task.node_id and is_lost(tx.rely_on(Node, task.node_id, "status")):
        return False
    return not is_refused or task.status.state <= TaskState.PENDING


_STOPS_BY_NODE = (Cause.NODE_IS_LOST, Cause.NODE_IS_LOST_AND_DRAINED, Cause.NODE_IS_UNFIT)


def _stop_cause(tx: Transaction, task: Task, cause: Cause | None) -> str:
    """Return what the history says about a task that leaves its node.  The node may be another one later."""
    if cause is Cause.MOVES:
        return str(StopCause.REBALANCED.value)
    if cause not in _STOPS_BY_NODE or not task.node_id:
        return ""
    node = tx.lookup(Node, task.node_id)
    if node is None:
        return StopCause.NODE_REMOVED.value
    if cause is Cause.NODE_IS_LOST:
        return StopCause.NODE_DOWN.value
    is_drained = node.spec.availability is Availability.DRAIN
    cause_there = StopCause.NODE_DRAINED if is_drained else StopCause.NODE_UNFIT
    return str(cause_there.value)


def _retire(
    tx: Transaction,
    id: TaskId,
    desired: TaskState,
    now: Timestamp,
    *,
    is_due: bool = False,
    cause: Cause | None = None,
) -> bool:
    """Retire the task.  Returns False if it was retired before."""
    task = tx.lookup(Task, id)
    if task is None or task.desired_state >= desired:
        return False
    task = replace(task, desired_state=desired)
    was_stopped = (
        desired is TaskState.SHUTDOWN
        and not task.status.state.is_terminal
        and not has_unreadable_status(tx, task)  # it may have ended by itself
    )
    was_surplus = desired is TaskState.SHUTDOWN and _is_surplus(tx, task)
    if is_due or was_stopped or was_surplus:
        restart = task.restart or Restart()
        task = replace(
            task,
            restart=replace(
                restart,
                is_due=restart.is_due or is_due,
                was_stopped=restart.was_stopped or was_stopped,
                was_surplus=was_surplus,
                stop_cause=_stop_cause(tx, task, cause) if was_stopped else restart.stop_cause,
            ),
        )
    if task.status.state < TaskState.ASSIGNED:
        # The task was never assigned, so no node will report its end.
        status = TaskStatus(timestamp=now, state=TaskState.SHUTDOWN, message="shutdown before assignment")
        task = replace(task, status=status)
    tx.put(task)
    return True


def _is_surplus(tx: Transaction, task: Task) -> bool:
    """Return whether an older task of the slot is wanted, or has done the work of a newer spec."""
    older = (
        one
        for one in tx.find(Task, slot=f"{task.service_id}/{task.slot or task.node_id}")
        if age(one) < age(task)
    )
    return any(one.is_wanted or (one.is_done and one.spec_index > task.spec_index) for one in older)


def _is_same_update(service: Service, decided: Service) -> bool:
    """Return whether the update of ``decided`` continues: users have not removed or updated the service, and not paused
    or resumed its update.
    """
    is_current = service.removed_at is None and service.spec_version == decided.spec_version
    return is_current and not _is_paused_since(service, decided) and not _is_resumed_since(service, decided)


def _is_resumed_since(service: Service, decided: Service) -> bool:
    """Return whether the update was resumed after the decision, so that it must not be paused by earlier failures."""
    before, now = decided.update_status or UpdateStatus(), service.update_status or UpdateStatus()
    is_other = before.state in PAUSED or before.tolerated_until != now.tolerated_until
    return now.state not in PAUSED and is_other


def _set_update_status(tx: Transaction, wanted: SetUpdateStatus, now: Timestamp) -> None:
    service, decided = tx.lookup(Service, wanted.service.id), wanted.service
    if service is None or not _is_same_update(service, decided):
        return
    before = service.update_status or UpdateStatus()
    if wanted.split is not None and before.split != decided.split:
        return
    is_final = wanted.state in ENDED
    split = None if is_final else wanted.split or before.split
    if (before.state, before.message, before.split) == (wanted.state, wanted.message, split):
        return
    status = UpdateStatus(
        state=wanted.state,
        started_at=before.started_at or now,
        completed_at=now if is_final else None,
        message=wanted.message,
        tolerated_until=before.tolerated_until,
        split=split,
    )
    tx.put(replace(service, update_status=status))


def _roll_back(tx: Transaction, wanted: Service, message: str, now: Timestamp) -> None:
    """Write the previous spec.  A newer spec by the user takes precedence, because the version is compared.

    This is the only spec that the leader writes.
    """
    service = tx.get(Service, wanted.id)
    if service.previous_spec is None or not _is_same_update(service, wanted):
        return
    previous = with_number_kept(service.previous_spec, service.spec)
    # Other services may have changed since, as before a rollback that a user requests.
    check_dependencies(tx, previous)
    check_routes(tx, previous, service.id)
    check_certificates(tx, previous, service.id)
    check_rights(tx, previous, service)
    if why := claim_service(tx, previous, service):
        # This is not an error. The message of the pause says why, and a user decides how to continue.
        pause = SetUpdateStatus(wanted, UpdateState.PAUSED, _paused_instead(message, why))
        _set_update_status(tx, pause, now)
        return
    before = service.update_status or UpdateStatus()
    status = UpdateStatus(
        state=UpdateState.ROLLBACK_STARTED,
        started_at=before.started_at or now,
        message=message,
        split=split_of_rollback(service),
    )
    follow_rollback(tx, service)
    restart_dependents(tx, service, previous.task_template, now)
    author = keep_spec(tx, service, previous, SpecAuthor(by="cluster", at=now))
    tx.put(replace(service, spec=previous, previous_spec=None, author=author, update_status=status))
