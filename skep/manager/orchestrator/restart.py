"""Restarts: whether an ended task gets a successor, and when the successor may start.

A task that ended, or whose node is gone, down or drained, is *replaced*: it is retired, and a successor takes its
slot with desired state READY.  The successor is assigned and prepared at once, so that preparing overlaps with the
restart delay; it is started when the delay is over and nothing in the slot is still stopping.

A task that could not even be prepared (REJECTED, for a missing image, say) is retried with growing delays, also
without a delay in the policy: an attempt that can fail in a millisecond must not keep the leader busy.  The same
holds for a task that ends soon after it started, again and again: without a delay, a crash loop would create tasks as
fast as it can.

A successor waits for its predecessor for as long as that may take to stop, and some more (``stop_seconds_max``);
swarmkit waits a minute, whatever the stop grace period.

Each successor carries the input of the next decision: its delay, and how many tasks before it failed in a row.  So
neither the history limit nor a change of leader changes a delay.  The number of attempts of a slot is not stored: it
is the number of tasks with the same version of the spec that replaced one that had ended by itself (the task history
keeps as many as the policy needs).  A task that replaced a moved one is not an attempt: drains, preemptions, evictions
and lost nodes are not failures of the task, and a service whose containers never fail is never given up.

Source: swarmkit, manager/orchestrator/restart/restart.go and manager/orchestrator/taskinit/init.go.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import inf

from msgspec.structs import replace

from skep.manager.orchestrator.changes import (
    FillSlot,
    Recheck,
    ReplaceTask,
    RetireTask,
    StartTask,
    Step,
    cause_to_leave,
)
from skep.manager.orchestrator.dirty import is_dirty
from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.manager.orchestrator.situation import Situation
from skep.manager.orchestrator.slots import Slot, history, is_lost, is_stopping, wanted
from skep.model.ids import NodeId
from skep.model.labels import drain_s
from skep.model.node import Availability
from skep.model.service import RestartCondition, RestartPolicy, UpdateOrder
from skep.model.task import Task, TaskState
from skep.model.times import SECOND_NS

DEFAULT_DELAY_S = 5.0
REJECTED_DELAYS_S = (0.0, 0.25, 1.0, 2.0)
"""Minimal delay after the first, second, ... rejection in a row; the last value holds for all further ones."""
CRASH_DELAYS_S = (0.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""The same for a task that ended soon after its start (``ObservedTimes.was_stable``).  A single crash costs nothing."""
DAMPED_BELOW_S = 1.0
"""A delay set by the user is used as it is from this value on; a shorter one would be a tight loop, and is raised."""
STOP_MARGIN_S = 30.0
"""Beyond the time that a task may take to stop: for the order to reach its node, which an etcd that restarts may delay
by ten seconds, and for the report."""
SILENCES = 2
"""But at least so many grace periods of heartbeats: a node that the order does not reach is down by then, also if the
leader changes."""


def restart_steps(slot: Slot, situation: Situation) -> list[Step]:
    """What to do about tasks of one slot that ended or lost their node."""
    steps: list[Step] = []
    current = wanted(slot)
    for task in current:
        if not (task.status.state.is_terminal or situation.is_misplaced(task)):
            if (leaves_at := situation.leaves_at(task)) < inf:
                steps.append(Recheck(leaves_at))
            continue
        cause = cause_to_leave(task, situation.node_of(task))
        if task is not current[-1]:
            # An update has already created a newer task in the slot.
            steps.append(RetireTask(task, cause=cause))
        elif _is_superseded(task, current, situation) or not should_restart(
            task, slot, situation.seen, situation.max_attempts
        ):
            steps.append(RetireTask(task, cause=cause))
        elif (starts_at := start_time(task, slot, situation)) > situation.now:
            # It could not even be prepared: its own delay applies to the next attempt too, or a missing image would
            # be requested in a tight loop.
            steps.append(Recheck(starts_at))
        else:
            steps.append(ReplaceTask(task, _successor(task, slot, situation), cause))
    return steps


def _is_superseded(task: Task, current: Slot, situation: Situation) -> bool:
    """Whether another task of the slot, on a usable node, matches the service's present spec.

    An update can leave such a task: it is overtaken by another update, which is rolled back before the task could
    run.
    """
    return any(
        other is not task
        and not other.status.state.is_terminal
        and not situation.is_misplaced(other)
        and not is_dirty(other, situation)
        for other in current
    )


def start_steps(slot: Slot, situation: Situation) -> Iterator[Step]:
    """Starts of prepared tasks that are due; when to decide again for the others."""
    for task in wanted(slot):
        if task.desired_state is not TaskState.READY or task.status.state.is_terminal:
            continue
        if _waits_for_update(task, slot, situation):
            continue  # the update retires its predecessor first
        starts_at = start_time(task, slot, situation)
        if starts_at <= situation.now:
            yield StartTask(task)
        elif starts_at < inf:
            yield Recheck(starts_at)


def should_restart(task: Task, slot: Slot, seen: ObservedTimes, max_attempts: int = 0) -> bool:
    """Whether the restart policy allows a successor of ``task``, which ended or lost its node.

    ``max_attempts``: the limit if the policy has none (``Situation.max_attempts``), whatever its window; 0: no limit.

    With a window only restarts of this term count, because the times of earlier ones are not known; and what an
    earlier leader has given up stays so.  A task that it retired for its node's sake says itself whether it was
    (``is_due``).
    """
    policy = task.spec.restart_policy or RestartPolicy()
    match policy.condition or RestartCondition.ANY:
        case RestartCondition.NONE:
            return False
        case RestartCondition.ON_FAILURE if task.status.state is TaskState.COMPLETE:
            return False
    limit = policy.max_attempts or max_attempts
    if not limit or not task.ended_by_itself:
        return True
    attempts = attempts_of(slot, task)
    if not policy.max_attempts:
        return len(attempts) < limit
    if not policy.window:
        return len(attempts) < policy.max_attempts
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
    return len(recent) < policy.max_attempts


def attempts_of(slot: Slot, task: Task) -> list[Task]:
    """Return what ``max_attempts`` counts: tasks of ``task``'s version that replaced one that had ended by itself."""
    made = [other for other in history(slot) if other.spec_version == task.spec_version]
    return [successor for predecessor, successor in pairwise(made) if predecessor.ended_by_itself]


def delay_s(task: Task) -> float:
    """The restart delay of ``task``'s policy."""
    policy = task.spec.restart_policy
    if policy is None or policy.delay is None:
        return DEFAULT_DELAY_S
    return policy.delay / SECOND_NS


def start_time(task: Task, slot: Slot, situation: Situation) -> float:
    """When a task with desired state READY may start, on the clock of ``situation.seen``.

    Any time up to now means: at once.  A later time can move forward when something changes meanwhile.
    """
    if task.desired_state is not TaskState.READY:
        return situation.now
    delay = task.restart.delay if task.restart is not None else 0
    starts_at = situation.seen.created(task) + delay / SECOND_NS
    return max([starts_at, *(stopped_at(other, situation) for other in _still_stopping(slot, situation))])


def refill(fill: FillSlot, slot: Slot, situation: Situation) -> FillSlot:
    """``fill``, which a rollback makes where a slot was given up: what is left of the restart delay holds.

    SwarmKit creates such a task without a delay, again and again if it fails at once.
    """
    past = history(slot)
    if not past or not past[-1].ended_by_itself or should_restart(past[-1], slot, situation.seen):
        return fill
    successor = _successor(past[-1], slot, situation)
    ended_at = situation.seen.ended(past[-1])
    waited_s = situation.now - ended_at if ended_at is not None else 0.0
    if (left_s := successor.delay_s - waited_s) > 0:
        return replace(successor, delay_s=left_s)
    return replace(fill, failures=successor.failures)


def _successor(task: Task, slot: Slot, situation: Situation) -> FillSlot:
    """The task that takes over the slot; started at once if there is nothing to wait for."""
    is_same = task.spec == situation.service.spec.task_template
    failures = failures_in_a_row(task, situation) if is_same else 0
    delay = _successor_delay_s(task, failures) if is_same and _is_delayed(task, situation) else 0.0
    starts_now = (
        delay == 0 and not _still_stopping(slot, situation) and not _waits_for_update(task, slot, situation)
    )
    starts_now = starts_now and (task.status.state.is_terminal or _is_gone(task, situation))
    return FillSlot(
        situation.service,
        task.slot,
        NodeId("") if task.slot else task.node_id,
        TaskState.RUNNING if starts_now else TaskState.READY,
        delay,
        failures,
    )


def _is_gone(task: Task, situation: Situation) -> bool:
    """Whether ``task`` counts as stopped, as its node is lost."""
    return is_lost(situation.node_of(task)) and situation.node_stops_at(task) <= situation.now


def _successor_delay_s(last: Task, failures: int) -> float:
    """Seconds between the end of ``last`` and the start of its successor: the user's setting, or the minimal delay."""
    wanted_s = delay_s(last)
    if _is_set(last) and wanted_s >= DAMPED_BELOW_S:
        return wanted_s
    delays_s = REJECTED_DELAYS_S if last.status.state is TaskState.REJECTED else CRASH_DELAYS_S
    return max(wanted_s, _nth(delays_s, failures - 1) if failures else 0.0)


def _is_set(task: Task) -> bool:
    return task.spec.restart_policy is not None and task.spec.restart_policy.delay is not None


def failures_in_a_row(last: Task, situation: Situation) -> int:
    """How many tasks of the slot up to ``last`` were rejected, or ended by themselves soon after they started.

    A task that was stopped, or lost its node, does not count and does not end the row.
    """
    before = last.restart.failures if last.restart is not None else 0
    if last.ended_by_itself and last.status.state is TaskState.REJECTED:
        return before + 1
    if situation.seen.was_stable(last, situation.now):
        return 0
    return before + last.ended_by_itself


def _nth(delays_s: tuple[float, ...], index: int) -> float:
    """The delay at ``index``; the last one for larger indexes."""
    return delays_s[min(max(index, 0), len(delays_s) - 1)]


def _is_delayed(predecessor: Task, situation: Situation) -> bool:
    """Whether the restart delay applies to the successor of ``predecessor``, if the spec is the same.

    Not if it was stopped on purpose or its node is drained, even if it failed there.
    """
    node = situation.node_of(predecessor)
    if node is not None and node.spec.availability is Availability.DRAIN:
        return False
    if predecessor.status.state.is_terminal:
        return predecessor.status.state is not TaskState.SHUTDOWN
    return is_lost(node) and bool(predecessor.node_id)


def is_held(task: Task, slot: Slot, situation: Situation) -> bool:
    """Whether ``start_steps`` starts the task, once its delay is over and what it replaces has stopped."""
    return task.desired_state is TaskState.READY and not _waits_for_update(task, slot, situation)


def _waits_for_update(task: Task, slot: Slot, situation: Situation) -> bool:
    """Whether ``task`` is only prepared while an older one is to run on: a stop-first update."""
    is_first = wanted(slot)[:1] in ((), (task,))
    return not is_first and situation.rollout_config.order is not UpdateOrder.START_FIRST


def _still_stopping(slot: Slot, situation: Situation) -> list[Task]:
    """Tasks of the slot that are still stopping, on nodes that will report it, or stop them by themselves."""
    return [task for task in slot if is_stopping(task) and not _is_gone(task, situation)]


def stopped_at(task: Task, situation: Situation) -> float:
    """When a task that is stopping, or is to be retired now, counts as stopped, whatever its node reports.

    A node that was down hears that the task is to stop when it is back.
    """
    node = situation.node_of(task)
    if node is None or is_lost(node):
        return situation.node_stops_at(task)
    retired_at = situation.now if task.is_wanted else situation.seen.retired(task)
    since = max(retired_at, situation.seen.back(node))
    return since + stop_seconds_max(task, situation.service.spec.labels, situation.silence_s)


def stop_seconds_max(task: Task, labels: Mapping[str, str], silence_s: float = 0.0) -> float:
    """How long a task of a service with ``labels`` may take to stop, with a margin.

    It drains twice, until no new connections arrive and until its last ones have ended; then its grace period begins.

    Args:
        silence_s: after which a node is down.
    """
    return 2 * drain_s(labels) + task.spec.stop_grace_s + max(STOP_MARGIN_S, SILENCES * silence_s)
