"""Decides whether an ended task gets a successor, and when the successor may start.

If a task has ended, or its node is removed, down or drained, it is *replaced*: it is retired, and its slot gets a
successor with desired state READY.  The successor is assigned and prepared at once, during the restart delay.  It
starts when the delay is over and no task in the slot is still stopping.

A task that could not even be prepared (REJECTED, for example because its image is missing) is retried with growing
delays, even if the policy sets no delay, because attempts that fail in a millisecond must not keep the leader busy.
The same holds for a task that repeatedly ends soon after its start, because a crash loop without a delay would create
tasks as fast as it can.

A successor waits until its predecessor must have stopped, plus a margin (``stop_seconds_max``). swarmkit waits a
minute, whatever the stop grace period is.

Each successor stores the input of the next decision: its delay, and the number of consecutive failures before it.
Therefore neither the history limit nor a change of leader affects a delay.  The number of attempts in a slot is not
stored.  It is the number of tasks with the same spec version whose predecessor had ended by itself (the task history
keeps as many as the policy needs).  The successor of a moved task is not an attempt, because drains, preemptions,
evictions and lost nodes are not failures of the task.  A service whose containers never fail can therefore be moved any
number of times.

Source: swarmkit, manager/orchestrator/restart/restart.go and manager/orchestrator/taskinit/init.go.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import inf

from msgspec.structs import replace

from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.orchestrator.changes import (
    Cause,
    FillSlot,
    ReplaceTask,
    RetireTask,
    StartTask,
    Step,
    cause_to_leave,
)
from skep.manager.orchestrator.decision_inputs import Situation
from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.manager.orchestrator.replacement.outdated_tasks import is_dirty, is_old_one
from skep.manager.orchestrator.slots import Slot, age, history, last_of, wanted
from skep.model.node import Availability, is_lost
from skep.model.options.labels import drain_s
from skep.model.service import RestartCondition, RestartPolicy, UpdateOrder
from skep.model.staging.updates import is_undecided
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.model.values.times import SECOND_NS

DEFAULT_DELAY_S = 5.0
"""Restart delay of a policy without one.  Docker documents the same default."""
REJECTED_DELAYS_S = (0.0, 0.25, 1.0, 2.0)
"""Minimum delays after the first, second and further consecutive rejections.  The last value holds for all later
ones.
"""
CRASH_DELAYS_S = (0.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Minimum delays after tasks that ended soon after their start (``ObservedTimes.was_stable``).

A single crash causes no delay.
"""
DAMPED_BELOW_S = 1.0
"""A user's restart delay that is shorter than this is raised to the minimum delays, because it would cause a tight
loop.
"""
STOP_MARGIN_S = 30.0
"""Seconds added to the time that a task may take to stop.

They cover the transfer of the stop order to the node, which a restarting etcd may delay by ten seconds, and the report.
"""
SILENCES = 2
"""Minimum margin in heartbeat grace periods.

If the stop order does not reach the node, the node is down by then, even if the leader changes.
"""


def restart_steps(slot: Slot, situation: Situation) -> list[Step]:
    """Return the steps for the slot's tasks that ended or lost their node."""
    current = wanted(slot)
    if len(current) > 1 and situation.service.old_version is not None:
        # An old task of a staged update that was restarted is younger than the new one.
        old = tuple([task for task in current if is_old_one(task, situation)])
        new = tuple([task for task in current if task not in old])
        if is_undecided(situation.service):
            return [*_restarts(old, slot, situation), *_restarts(new, slot, situation)]
        current = (*old, *new)
    return _restarts(current, slot, situation)


def _restarts(current: Slot, slot: Slot, situation: Situation) -> list[Step]:
    """Return the steps for the ``current`` tasks of the slot, of which the last one takes over from the others."""
    steps: list[Step] = []
    for task in current:
        if not (task.status.state.is_terminal or situation.is_misplaced(task)):
            if (leaves_at := situation.leaves_at(task)) < inf:
                steps.append(Recheck(leaves_at))
            continue
        if not task.status.state.is_terminal and situation.moves_start_first(task):
            continue  # its replacement runs first (``evacuation_steps``)
        cause = cause_of(task, situation)
        if task is not current[-1]:
            # An update has already created a newer task in the slot.
            steps.append(RetireTask(task, cause=cause))
        elif _is_superseded(task, current, situation) or not should_restart(
            task, slot, situation.seen, situation.max_attempts
        ):
            steps.append(RetireTask(task, cause=cause))
        elif (starts_at := start_time(task, slot, situation)) > situation.now:
            # The task could not even be prepared. The next attempt waits for this task's delay as well. Otherwise a
            # missing image would be requested in a tight loop.
            steps.append(Recheck(starts_at))
        else:
            steps.append(ReplaceTask(task, _successor(task, slot, situation), cause))
    return steps


def cause_of(task: Task, situation: Situation) -> Cause | None:
    """Return ``cause_to_leave``, also for a task that its node has become too small for."""
    node = situation.node_of(task)
    cause = cause_to_leave(task, node)
    if node is None or is_lost(node) or task.status.state.is_terminal:
        return cause
    if task.preemption is not None or any(situation.is_drained(one.id) for one in task.volumes):
        return None  # it leaves whether or not the node fits, and also during a change freeze
    return cause or (Cause.NODE_IS_TOO_SMALL if task.id in situation.overcommitted(node.id) else None)


def _is_superseded(task: Task, current: Slot, situation: Situation) -> bool:
    """Return whether another task of the slot, on a usable node, matches the service's current spec.

    An update can leave such a task behind if another update replaces it and is rolled back before the task could run.
    """
    return any(
        other is not task
        and not other.status.state.is_terminal
        and not situation.is_misplaced(other)
        and not is_dirty(other, situation)
        for other in current
    )


def start_steps(slot: Slot, situation: Situation) -> Iterator[Step]:
    """Start the prepared tasks that are due, and recheck when the others are."""
    for task in wanted(slot):
        if task.desired_state is not TaskState.READY or task.status.state.is_terminal:
            continue
        if _waits_for_update(task, slot, situation):
            continue  # the update retires the task's predecessor first
        starts_at = start_time(task, slot, situation)
        if starts_at <= situation.now:
            yield StartTask(task)
        elif starts_at < inf:
            yield Recheck(starts_at)


def should_restart(task: Task, slot: Slot, seen: ObservedTimes, max_attempts: int = 0) -> bool:
    """Return whether the restart policy allows a successor of ``task``, which ended or lost its node.

    If the policy has a window, only restarts of this leader's term count, because the times of earlier ones are
    unknown.  A slot that an earlier leader gave up stays given up.  If that leader retired a task because of its node,
    ``is_due`` says whether the slot must still be filled.

    Args:
        max_attempts: The limit if the policy has none (``Situation.max_attempts``), whatever its window.  0 means
            no limit.
    """
    policy = task.spec.restart_policy or RestartPolicy()
    match policy.condition or RestartCondition.ANY:
        case RestartCondition.NONE:
            return False
        case RestartCondition.ON_FAILURE if task.status.state is TaskState.COMPLETE:
            return False
    limit = policy.attempts_limit or max_attempts
    if not limit or not task.ended_by_itself:
        return True
    attempts = attempts_of(slot, task)
    if not policy.attempts_limit or not policy.window:
        return len(attempts) < limit
    ended_at = seen.ended(task)
    if ended_at is None:
        return True
    if not seen.saw_end(task):
        return task.is_wanted or (task.restart is not None and task.restart.is_due)
    window_opens_at = ended_at - policy.window / SECOND_NS
    recent = [
        other
        for other in attempts
        if seen.saw_created(other) and window_opens_at < seen.created(other) <= ended_at
    ]
    return len(recent) < limit


def attempts_of(slot: Slot, task: Task) -> list[Task]:
    """Return the tasks that ``max_attempts`` counts: same version as ``task``, and the predecessor ended by itself.

    A younger task than ``task`` was surplus: its replacement on another node, when a drain was undone.
    """
    made = [
        other
        for other in history(slot)
        if other.spec_version == task.spec_version and age(other) <= age(task)
    ]
    return [successor for predecessor, successor in pairwise(made) if predecessor.ended_by_itself]


def delay_s(task: Task) -> float:
    """Return the restart delay of the task's policy, in seconds."""
    policy = task.spec.restart_policy
    if policy is None or policy.delay is None:
        return DEFAULT_DELAY_S
    return policy.delay / SECOND_NS


def start_time(task: Task, slot: Slot, situation: Situation) -> float:
    """Return when a task with desired state READY may start, on the clock of ``situation.seen``.

    A time in the past means at once.  A future time may become earlier when something changes.
    """
    if task.desired_state is not TaskState.READY:
        return situation.now
    delay = task.restart.delay if task.restart is not None else 0
    starts_at = situation.seen.created(task) + delay / SECOND_NS
    return max([starts_at, *(stopped_at(other, situation) for other in _still_stopping(slot, situation))])


def refill(fill: FillSlot, slot: Slot, situation: Situation) -> FillSlot:
    """Return ``fill`` with the remaining restart delay, for a rollback that fills a slot that was given up.

    SwarmKit creates such a task without a delay, repeatedly if it fails at once.
    """
    last = last_of(slot)
    if last is None or not last.ended_by_itself or should_restart(last, slot, situation.seen):
        return fill
    successor = _successor(last, slot, situation)
    ended_at = situation.seen.ended(last)
    waited_s = situation.now - ended_at if ended_at is not None else 0.0
    if (left_s := successor.delay_s - waited_s) > 0:
        return replace(successor, delay_s=left_s)
    return replace(fill, failures=successor.failures)


def _successor(task: Task, slot: Slot, situation: Situation) -> FillSlot:
    """Return the task that takes over the slot.  It starts at once unless it has to wait.

    While a staged update keeps the old tasks, an old task replaces an old task that ended.
    """
    is_old = is_undecided(situation.service) and is_dirty(task, situation)
    is_same = is_old or task.spec == situation.service.spec.task_template
    failures = failures_in_a_row(task, situation) if is_same else 0
    delay = _successor_delay_s(task, failures) if is_same and _is_delayed(task, situation) else 0.0
    starts_now = (
        delay == 0 and not _still_stopping(slot, situation) and not _waits_for_update(task, slot, situation)
    )
    starts_now = starts_now and (task.status.state.is_terminal or _counts_as_stopped(task, situation))
    return FillSlot(
        situation.service,
        task.slot,
        NodeId("") if task.slot else task.node_id,
        TaskState.RUNNING if starts_now else TaskState.READY,
        delay,
        failures,
        is_old=is_old,
    )


def _counts_as_stopped(task: Task, situation: Situation) -> bool:
    """Return whether ``task`` counts as stopped because its node is lost."""
    return is_lost(situation.node_of(task)) and situation.node_stops_at(task) <= situation.now


def _successor_delay_s(last: Task, failures: int) -> float:
    """Return the seconds from the end of ``last`` to its successor's start: the user's delay or the minimum delay."""
    wanted_s = delay_s(last)
    if _is_set(last) and wanted_s >= DAMPED_BELOW_S:
        return wanted_s
    delays_s = REJECTED_DELAYS_S if last.status.state is TaskState.REJECTED else CRASH_DELAYS_S
    return max(wanted_s, _nth(delays_s, failures - 1) if failures else 0.0)


def _is_set(task: Task) -> bool:
    return task.spec.restart_policy is not None and task.spec.restart_policy.delay is not None


def failures_in_a_row(last: Task, situation: Situation) -> int:
    """Count the tasks of the slot up to ``last`` that were rejected or ended by themselves soon after their start.

    A task that was stopped or lost its node does not count, and does not end the series.
    """
    before = last.restart.failures if last.restart is not None else 0
    if last.ended_by_itself and last.status.state is TaskState.REJECTED:
        return before + 1
    if situation.seen.was_stable(last, situation.now):
        return 0
    return before + last.ended_by_itself


def _nth(delays_s: tuple[float, ...], index: int) -> float:
    """Return the delay at ``index``, or the last one for larger indexes."""
    return delays_s[min(max(index, 0), len(delays_s) - 1)]


def _is_delayed(predecessor: Task, situation: Situation) -> bool:
    """Return whether the restart delay applies to the successor of ``predecessor`` if the spec is the same.

    It does not if the predecessor was stopped on purpose or its node is drained, even if it failed there.
    """
    node = situation.node_of(predecessor)
    if node is not None and node.spec.availability is Availability.DRAIN:
        return False
    if predecessor.status.state.is_terminal:
        return predecessor.status.state is not TaskState.SHUTDOWN
    return is_lost(node) and bool(predecessor.node_id)


def is_held(task: Task, slot: Slot, situation: Situation) -> bool:
    """Return whether ``start_steps`` will start the task once its delay is over and its predecessor has stopped."""
    return task.desired_state is TaskState.READY and not _waits_for_update(task, slot, situation)


def _waits_for_update(task: Task, slot: Slot, situation: Situation) -> bool:
    """Return whether ``task`` is only prepared while an older one still serves, as in a stop-first update.

    It does not wait for a task on a drained node, which waits for it.
    """
    current = wanted(slot)
    if len(current) > 1:
        current = tuple([one for one in current if one is task or not situation.moves_start_first(one)])
    is_first = current[:1] in ((), (task,))
    return not is_first and situation.rollout_config.order is not UpdateOrder.START_FIRST


def _still_stopping(slot: Slot, situation: Situation) -> list[Task]:
    """Return the slot's stopping tasks on nodes that will report the stop or stop the tasks by themselves."""
    return [task for task in slot if task.is_stopping and not _counts_as_stopped(task, situation)]


def stopped_at(task: Task, situation: Situation) -> float:
    """Return when a task that is stopping, or that is retired now, counts as stopped, whatever its node reports.

    A node that was down learns of the stop when it reconnects.
    """
    node = situation.node_of(task)
    if node is None or is_lost(node):
        return situation.node_stops_at(task)
    retired_at = situation.now if task.is_wanted else situation.seen.retired(task)
    since = max(retired_at, situation.seen.back(node))
    return since + stop_seconds_max(task, situation.service.spec.labels, situation.silence_s)


def stop_seconds_max(task: Task, labels: Mapping[str, str], silence_s: float = 0.0) -> float:
    """Return how long a task of a service with ``labels`` may take to stop, with a margin.

    The task drains twice: until no new connections arrive, and until its last connections have ended.  Then its stop
    grace period begins.

    Args:
        silence_s: Seconds without a heartbeat after which a node is down.
    """
    return 2 * drain_s(labels) + task.spec.stop_grace_s + max(STOP_MARGIN_S, SILENCES * silence_s)
