"""Restarts: whether an ended task gets a successor, and when that one may start.

A task that ended, or whose node is gone, down or drained, is *replaced*: it is retired, and a successor takes its
slot with desired state READY.  The successor is placed and prepared at once, so that preparing overlaps with the
restart delay; it is started when the delay is over and nothing of the slot is still stopping.

What cannot even be prepared (REJECTED: a missing image, say) is tried again later and later, also without a delay in
the policy: an attempt that can fail in a millisecond must not keep the leader busy with nothing else.  So is what ends
soon after it ran, again and again: a crash loop without a delay of its own would start tasks as fast as it can.

Each successor carries what the next decision needs: its delay, and how many before it failed in a row.  So
neither the history that is kept nor a change of leader changes a delay.  How often a slot was restarted is not counted
anywhere: it is the number of tasks that the slot has had with the same version of the spec, less the first (the task
history keeps as many as the policy needs).

Source: swarmkit, manager/orchestrator/restart/restart.go and manager/orchestrator/taskinit/init.go.
"""

from collections.abc import Iterator
from math import inf

from skep.manager.orchestrator.changes import FillSlot, Recheck, ReplaceTask, RetireTask, StartTask, Step
from skep.manager.orchestrator.dirty import is_dirty
from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.manager.orchestrator.situation import Situation
from skep.manager.orchestrator.slots import Slot, history, is_lost, is_stopping, wanted
from skep.model.ids import NodeId
from skep.model.node import Availability
from skep.model.service import RestartCondition, RestartPolicy, UpdateOrder
from skep.model.task import Task, TaskState
from skep.model.times import SECOND_NS

DEFAULT_DELAY_S = 5.0
REJECTED_DELAYS_S = (0.0, 0.25, 1.0, 2.0)
"""Least delay after the first, second, ... rejection in a row; the last one holds for any more."""
CRASH_DELAYS_S = (0.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""The same where the last one ended soon after it ran (``ObservedTimes.was_stable``).  A single crash costs nothing."""
DAMPED_BELOW_S = 1.0
"""A delay that the user set is what happens, from here on; a shorter one would be a tight loop, and is damped."""
STOP_TIMEOUT_S = 60.0
"""A successor waits no longer than this for what it replaces to stop (swarmkit's defaultOldTaskTimeout)."""


def restart_steps(slot: Slot, situation: Situation) -> list[Step]:
    """What to do about the tasks of one slot that ended or lost their node."""
    steps: list[Step] = []
    current = wanted(slot)
    for task in current:
        if not (task.status.state.is_terminal or situation.is_misplaced(task)):
            if (leaves_at := situation.leaves_at(task)) < inf:
                steps.append(Recheck(leaves_at))
            continue
        if task is not current[-1]:
            # An update has already put a newer task into the slot.
            steps.append(RetireTask(task))
        elif _is_superfluous(task, current, situation) or not should_restart(task, slot, situation.seen):
            steps.append(RetireTask(task))
        elif (starts_at := start_time(task, slot, situation)) > situation.now:
            # It could not even be prepared: its own delay holds for the next attempt too, or a missing
            # image would be asked for in a tight loop.
            steps.append(Recheck(starts_at))
        else:
            steps.append(ReplaceTask(task, _successor(task, slot, situation)))
    return steps


def _is_superfluous(task: Task, current: Slot, situation: Situation) -> bool:
    """Whether another task of the slot, in its place, is what the service asks for now.

    An update leaves such a one that was overtaken by another, and is returned to before it could run.
    """
    return any(
        other is not task
        and not other.status.state.is_terminal
        and not situation.is_misplaced(other)
        and not is_dirty(other, situation)
        for other in current
    )


def start_steps(slot: Slot, situation: Situation) -> Iterator[Step]:
    """Starts of prepared tasks whose time has come; when to look again for the others."""
    for task in wanted(slot):
        if task.desired_state is not TaskState.READY or task.status.state.is_terminal:
            continue
        if _is_held_back(task, slot, situation):
            continue  # the update retires what it is to take over from
        starts_at = start_time(task, slot, situation)
        yield StartTask(task) if starts_at <= situation.now else Recheck(starts_at)


def should_restart(task: Task, slot: Slot, seen: ObservedTimes) -> bool:
    """Whether the restart policy gives ``task``, which ended or lost its node, a successor.

    Within a window only restarts of this term count, since of earlier ones nobody knows when they were; and what an
    earlier leader has given up stays so.
    """
    policy = task.spec.restart_policy or RestartPolicy()
    match policy.condition or RestartCondition.ANY:
        case RestartCondition.NONE:
            return False
        case RestartCondition.ON_FAILURE if task.status.state is TaskState.COMPLETE:
            return False
    if not policy.max_attempts:
        return True
    successors = [other for other in history(slot) if other.spec_version == task.spec_version][1:]
    if not policy.window:
        return len(successors) < policy.max_attempts
    ended_at = seen.ended(task)
    if ended_at is None:
        return True
    if not seen.saw_end(task):
        return task.is_wanted
    window_opens_at = ended_at - policy.window / SECOND_NS
    attempts = [
        other
        for other in successors
        if seen.saw_created(other) and window_opens_at < seen.created(other) <= ended_at
    ]
    return len(attempts) < policy.max_attempts


def delay_s(task: Task) -> float:
    """The restart delay that ``task`` asks for."""
    policy = task.spec.restart_policy
    if policy is None or policy.delay is None:
        return DEFAULT_DELAY_S
    return policy.delay / SECOND_NS


def start_time(task: Task, slot: Slot, situation: Situation) -> float:
    """When a task with desired state READY may start, on the clock of ``situation.seen``.

    Anything up to now means: at once.  A later moment may come forward when something changes meanwhile.
    """
    if task.desired_state is not TaskState.READY:
        return situation.now
    delay = task.restart.delay if task.restart is not None else 0
    starts_at = situation.seen.created(task) + delay / SECOND_NS
    retired_at = [situation.seen.retired(other) for other in _waited_for(slot, situation)]
    return max([starts_at, *(at + STOP_TIMEOUT_S for at in retired_at)])


def _successor(task: Task, slot: Slot, situation: Situation) -> FillSlot:
    """The task that takes the slot over; started at once where nothing has to be waited for."""
    is_same = task.spec == situation.service.spec.task_template
    failures = failures_in_a_row(task, situation) if is_same else 0
    delay = _pause_s(task, failures) if is_same and _is_delayed(task, situation) else 0.0
    starts_now = delay == 0 and not _waited_for(slot, situation) and not _is_held_back(task, slot, situation)
    starts_now = starts_now and (task.status.state.is_terminal or is_lost(situation.node_of(task)))
    return FillSlot(
        situation.service,
        task.slot,
        NodeId("") if task.slot else task.node_id,
        TaskState.RUNNING if starts_now else TaskState.READY,
        delay,
        failures,
    )


def _pause_s(last: Task, failures: int) -> float:
    """Seconds between the end of ``last`` and its successor's start: what the user set, else damped as it must be."""
    wanted_s = delay_s(last)
    if _is_set(last) and wanted_s >= DAMPED_BELOW_S:
        return wanted_s
    delays_s = REJECTED_DELAYS_S if last.status.state is TaskState.REJECTED else CRASH_DELAYS_S
    return max(wanted_s, _nth(delays_s, failures - 1) if failures else 0.0)


def _is_set(task: Task) -> bool:
    return task.spec.restart_policy is not None and task.spec.restart_policy.delay is not None


def failures_in_a_row(last: Task, situation: Situation) -> int:
    """How many tasks of the slot up to ``last`` were rejected, or ended by themselves soon after they ran.

    One that was stopped, or lost its node, in such a row is none of them and does not end the row.
    """
    before = last.restart.failures if last.restart is not None else 0
    if last.status.state is TaskState.REJECTED:
        return before + 1
    if situation.seen.was_stable(last, situation.now):
        return 0
    return before + (last.status.state in (TaskState.COMPLETE, TaskState.FAILED))


def _nth(delays_s: tuple[float, ...], index: int) -> float:
    """The delay at ``index``; beyond the end the last one holds."""
    return delays_s[min(max(index, 0), len(delays_s) - 1)]


def _is_delayed(predecessor: Task, situation: Situation) -> bool:
    """Whether the successor of ``predecessor`` starts under the restart delay, what a task is being the same as before.

    Not when it was stopped on purpose or had to leave a drained node.
    """
    if predecessor.status.state.is_terminal:
        return predecessor.status.state is not TaskState.SHUTDOWN
    node = situation.node_of(predecessor)
    is_drained = node is not None and node.spec.availability is Availability.DRAIN
    return is_lost(node) and bool(predecessor.node_id) and not is_drained


def _is_held_back(task: Task, slot: Slot, situation: Situation) -> bool:
    """Whether ``task`` is only prepared while an older one is meant to run on: an update, stop-first."""
    is_first = wanted(slot)[:1] in ((), (task,))
    return not is_first and situation.rollout_config.order is not UpdateOrder.START_FIRST


def _waited_for(slot: Slot, situation: Situation) -> list[Task]:
    """What of the slot is still stopping, on a node that can be expected to say so."""
    return [task for task in slot if is_stopping(task) and not is_lost(situation.node_of(task))]
