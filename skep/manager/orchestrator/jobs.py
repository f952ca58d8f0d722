"""Jobs: tasks that run to completion, a total number of times (replicated) or once on each node (global).

A slot of a job is done once one of its tasks has completed.  After a failed task the restart policy decides.  If it
allows no further attempt, the slot stays occupied, so that a job that cannot succeed comes to an end.  Each update is a
new *iteration*, which starts from the beginning.  Tasks of earlier iterations are stopped, and ended ones stay as
history.  Until all of them have stopped, tasks of the new iteration are only prepared.  Otherwise both would do the
same work, such as a backup, at the same time.

Differences from swarmkit: a slot whose attempts are used up is not started again.  An iteration does not start while
tasks of the previous one run.  A run of a scheduled global job is fixed to the nodes on which it started
(``manager.services.job_runs``).  A task of a scheduled job has a default limit of attempts, so that a failing run ends
before it delays later runs.

Source: swarmkit, manager/orchestrator/jobs/{replicated,global}/reconciler.go.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from math import inf
from typing import Any

from msgspec.structs import replace

from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.orchestrator.changes import (
    Cause,
    FillSlot,
    RemoveService,
    ReplaceTask,
    RetireTask,
    SettleRun,
    Step,
)
from skep.manager.orchestrator.decision_inputs import Situation
from skep.manager.orchestrator.replacement.restart import (
    cause_of,
    restart_steps,
    should_restart,
    start_steps,
    stopped_at,
)
from skep.manager.orchestrator.replicated import check_number
from skep.manager.orchestrator.slots import (
    Slot,
    first_state,
    group_by_node,
    group_by_slot,
    has_unread_end,
    history,
    wanted,
)
from skep.manager.services.job_runs import (
    is_candidate,
    is_ending,
    is_fixed,
    is_over,
    nodes_of,
    of_present_run,
    result,
    starts_until_ns,
)
from skep.model.options.labels import job_ttl_s
from skep.model.service import ReplicatedJob, Service
from skep.model.task import Task, TaskState
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS, unix_ns


def next_steps(situation: Situation) -> list[Step]:
    """Return the steps for a job now, and when to decide again.

    Idempotent: after the changes are applied, the next call returns no further change unless something else happens.
    """
    service = situation.service
    iteration = iteration_of(service)
    present = of_present_run(service, situation.tasks)
    steps: list[Step] = [_retired(task) for task in situation.tasks if _is_left_over(task, iteration)]
    if is_over(service) or (service.job_status is not None and service.job_status.awaits_first_run):
        return steps
    slots: Mapping[Any, Slot]
    if service.spec.mode.replicated_job is not None:
        slots = group_by_slot(present)
        fills = _missing_runs(service, service.spec.mode.replicated_job, slots, situation)
    else:
        slots = group_by_node(present)
        fills = _missing_nodes(service, slots, situation)
        steps += _late(present, situation)
        steps += [
            RetireTask(task, cause=cause_of(task, situation))
            for slot in slots.values()
            for task in wanted(slot)
            if _must_leave(task, situation)
        ]
        slots = {
            key: slot
            for key, slot in slots.items()
            if not any(_must_leave(task, situation) for task in wanted(slot))
        }
    # A task was replaced because its node was lost, but has completed after all.
    steps += [RetireTask(task) for slot in slots.values() if is_done(slot) for task in slot if task.is_active]
    filled = {fill.slot or fill.node_id for fill in fills}
    steps += fills
    starts_at = _last_stops_at(iteration, situation)
    is_held = starts_at > situation.now
    for key, slot in slots.items():
        if key not in filled and not is_done(slot) and not has_unread_end(slot):
            restarts = restart_steps(slot, situation)
            steps += restarts if restarts or is_held else start_steps(slot, situation)
    steps += _settled(slots, present, steps, situation)
    if is_held:
        return [*map(_prepared, steps), *([Recheck(starts_at)] if starts_at < inf else ())]
    return steps or _end(present, situation)


def iteration_of(service: Service) -> Version:
    """Return the job's current iteration."""
    return service.job_status.job_iteration if service.job_status is not None else Version()


def is_done(slot: Iterable[Task]) -> bool:
    """Return whether the slot of a job has its completed task."""
    return any(task.status.state is TaskState.COMPLETE for task in slot)


def _last_stops_at(iteration: Version, situation: Situation) -> float:
    """Return when all tasks of earlier iterations count as stopped, or minus infinity if they have stopped.

    Infinity means that a task without a node is not retired yet.  It may still be assigned before its retirement, and
    the store may refuse that retirement, which is a separate change.
    """
    earlier = [task for task in situation.tasks if task.job_iteration != iteration]
    if any(task.is_active and not task.is_assigned for task in earlier):
        return inf
    return max((stopped_at(task, situation) for task in earlier if task.is_assigned), default=-inf)


def _prepared(step: Step) -> Step:
    """Return ``step``, changed so that it only prepares its task."""
    match step:
        case FillSlot():
            return replace(step, desired=TaskState.READY)
        case ReplaceTask(_, successor):
            return replace(step, successor=replace(successor, desired=TaskState.READY))
    return step


def _end(present: list[Task], situation: Situation) -> list[Step]:
    """Remove a finished job once its time to live has passed since its last task ended."""
    job = situation.service.job_status
    if job is not None and job.schedule is not None:
        return []  # a job with a schedule has a next run
    ttl_s = job_ttl_s(situation.service.spec.labels)
    ended = [situation.seen.ended(task) for task in present]
    if ttl_s is None or any(at is None for at in ended):
        return []
    if not ended:
        return _end_without_tasks(situation, ttl_s)
    over_at = max(at for at in ended if at is not None) + ttl_s
    return [RemoveService(situation.service) if over_at <= situation.now else Recheck(over_at)]


def _end_without_tasks(situation: Situation, ttl_s: float) -> list[Step]:
    """Remove a job whose run is over and whose tasks were deleted with their nodes.  Its time to live counts from the
    run's start.
    """
    job = situation.service.job_status
    if job is None or not job.present_outcome or job.last_execution is None:
        return []
    left_s = ttl_s - (situation.now_ns - unix_ns(job.last_execution)) / SECOND_NS
    return [RemoveService(situation.service) if left_s <= 0 else Recheck(situation.now + left_s)]


def _missing_runs(
    service: Service, job: ReplicatedJob, slots: Mapping[int, Slot], situation: Situation
) -> list[FillSlot]:
    """Return the runs to start now, within the concurrency limit and the number still to be completed."""
    total = job.total_completions or 0
    check_number(total)
    done = {number for number, slot in slots.items() if is_done(slot)}
    # If a replaced task has completed after all, its replacement counts as active until it is retired, because that may
    # fail.
    active = {number for number, slot in slots.items() if any(task.is_active for task in slot)}
    under_way = active | {number for number, slot in slots.items() if wanted(slot)} - done
    given_up = {number for number in slots if _is_given_up(slots[number], situation)} - done - under_way
    taken = done | under_way | given_up
    free_runs = min((job.max_concurrent or 0) - len(under_way), total - len(taken))
    free = (number for number in range(1, total + 1) if number not in taken)
    return [
        FillSlot(service, number, desired=first_state(slots.get(number, ())))
        for number in islice(free, max(free_runs, 0))
    ]


def _missing_nodes(service: Service, slots: Mapping[Any, Slot], situation: Situation) -> list[FillSlot]:
    """Return the runs to start on nodes that existed when this iteration was requested and have not had a run.

    After the deadline only nodes that have started the run receive another task.
    """
    is_late = _is_past_deadline(situation)
    return [
        FillSlot(service, 0, node.id, first_state(slots.get(node.id, ())))
        for node in nodes_of(service, situation.tasks, situation.nodes())
        if is_candidate(node, service)
        and not _is_taken(slots.get(node.id, ()), situation)
        and (_has_started(slots.get(node.id, ())) or not is_late)
    ]


def _has_started(slot: Iterable[Task]) -> bool:
    """Return whether the slot's node has started a task of the run.  A task without a container may have been refused
    resources.
    """
    return any(
        task.is_assigned or task.ended_by_itself or task.status.container_status is not None for task in slot
    )


def _is_taken(slot: Slot, situation: Situation) -> bool:
    return is_done(slot) or bool(wanted(slot)) or _is_given_up(slot, situation)


def _is_given_up(slot: Slot, situation: Situation) -> bool:
    """Return whether the slot's last task failed and its restart policy allows no successor.  True if unknown."""
    if has_unread_end(slot):
        return True
    past = history(slot)
    return (
        bool(past)
        and past[-1].ended_in_failure
        and not wanted(slot)
        and not should_restart(past[-1], slot, situation.seen, situation.max_attempts)
    )


def _is_past_deadline(situation: Situation) -> bool:
    """Return whether it is too late for a scheduled run to start on more nodes."""
    until_ns = starts_until_ns(situation.service)
    return until_ns is not None and situation.now_ns > until_ns


def _late(present: Iterable[Task], situation: Situation) -> list[Step]:
    """Retire tasks of a scheduled run that could not be placed before the deadline, or recheck then."""
    until_ns = starts_until_ns(situation.service)
    # A node that has started the run is in time, and the restart policy decides about its further tasks.
    late = (slot for slot in group_by_node(present).values() if not _has_started(slot))
    waiting = [task for slot in late for task in slot if task.is_active]
    if until_ns is None or not waiting:
        return []
    if _is_past_deadline(situation):
        return [RetireTask(task, cause=Cause.IS_LATE) for task in waiting]
    return [Recheck(situation.now + (until_ns - situation.now_ns + 1) / SECOND_NS)]


def _settled(
    slots: Mapping[Any, Slot], present: Sequence[Task], steps: Sequence[Step], situation: Situation
) -> list[Step]:
    """Return the step that records how a job's run ended, or that each node of a global run has its task."""
    service, job = situation.service, situation.service.job_status
    if job is None or any(isinstance(step, FillSlot) for step in steps):
        return []
    is_active = any(task.is_active for task in present) or is_ending(slots.values(), situation.node)
    is_idle = not steps and not is_active
    is_known = not any(map(has_unread_end, slots.values()))
    is_over, is_late = is_idle and is_known, _is_past_deadline(situation)
    settles = SettleRun(service, is_over, is_late)
    if service.spec.mode.replicated_job is not None:
        total = service.spec.mode.replicated_job.total_completions or 0
        has_ended = is_over and 0 < total <= len(slots)
        return [settles] if has_ended and result(service, slots.values()) != job.present_outcome else []
    if not is_fixed(service):
        found = result(service, slots.values()) if slots and is_over else ""
        return [settles] if found not in ("", job.present_outcome) else []
    has_nodes = any(task.job_iteration == job.job_iteration for task in situation.tasks)
    if not has_nodes and not is_late:
        return []  # no node may run it yet
    return [settles] if is_over or not job.has_fixed_nodes else []


def _must_leave(task: Task, situation: Situation) -> bool:
    return situation.is_misplaced(task) and not task.status.state.is_terminal


def _is_left_over(task: Task, iteration: Version) -> bool:
    """Return whether the task belongs to an earlier iteration and is not retired yet."""
    return task.job_iteration != iteration and task.is_wanted


def _retired(task: Task) -> RetireTask:
    """Keep an ended task as history.  Stop and delete a task of an earlier iteration that still runs."""
    return RetireTask(task, TaskState.SHUTDOWN if task.status.state.is_terminal else TaskState.REMOVE)
