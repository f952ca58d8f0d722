"""Holds back steps that would take more tasks of a service away than its disruption budget allows.

A stop-first update can block itself: the new task of one slot waits for the place of another slot's old task, which the
budget keeps.  So if no other task of the service is about to serve, the prepared task of such a slot starts before the
old one stops, unless both would write to the same data.

A service that must keep all tasks can block itself as well: its tasks write data, or hold a host port on every node.
Its updates stop one task at a time.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import inf
from typing import TypeGuard

import msgspec
from msgspec.structs import replace

from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.orchestrator.changes import ReplaceTask, RetireTask, StartTask, Step
from skep.manager.orchestrator.decision_inputs import Situation
from skep.manager.orchestrator.replacement.held_places import excludes
from skep.manager.orchestrator.replacement.outdated_tasks import is_dirty
from skep.manager.orchestrator.replacement.restart import start_time
from skep.manager.orchestrator.slots import group_by_slot
from skep.manager.services.disruption_budget import budget_of, is_available, required
from skep.model.node import Availability, NodeState
from skep.model.options.labels import drains_now
from skep.model.task import Task, TaskState
from skep.model.values.ids import TaskId

WITNESSES_MAX = 40
"""Tasks whose availability a write checks again.  A transaction of etcd has at most 128 comparisons."""


class Allowed(msgspec.Struct, frozen=True):
    """The steps that may be taken now."""

    steps: list[Step]
    is_limited: bool = False
    """Whether a step depended on the budget, so that the decision depends on all tasks of the service."""
    is_held: bool = False
    """Whether a step has to wait."""


def within_budget(decided: Sequence[Step], situation: Situation) -> Allowed:
    """Return the ``decided`` steps, without steps that exceed the budget of the service.

    ``situation`` has all tasks of the service.
    """
    steps = list(decided)
    limited = [number for number, step in enumerate(steps) if _takes_away(step, situation)]
    if not limited:
        return Allowed(steps)
    minimum = budget_of(situation.service, situation.tasks, situation.node).minimum
    serving: dict[int, set[TaskId]] = {}
    for task in situation.tasks:
        if is_available(task, situation.node_of(task)):
            serving.setdefault(task.slot, set()).add(task.id)
    for number, step in enumerate(steps):
        if isinstance(step, ReplaceTask | RetireTask) and number not in limited:
            _take(step.task, serving)  # it does not wait for the budget, but counts
    held: set[int] = set()
    tasks = {task.id: task for task in situation.tasks}
    minimums: dict[int, int] = {}
    for number in limited:
        step = steps[number]
        assert isinstance(step, ReplaceTask | RetireTask)
        slot = step.task.slot
        minimums[number] = _minimum_for(step, minimum, tasks, situation)
        rest = serving.get(slot, set()) - {step.task.id}
        if not rest and len(serving) - (slot in serving) < minimums[number]:
            held.add(number)
        else:
            _take(step.task, serving)
    witnesses = {one: _witnesses(serving, one) for one in set(minimums.values())}
    for number in limited:
        step = steps[number]
        assert isinstance(step, ReplaceTask | RetireTask)
        steps[number] = replace(step, keeps=witnesses[minimums[number]])
    allowed = [step for number, step in enumerate(steps) if number not in held]
    if held and not any(_may_serve_soon(task, serving, situation) for task in situation.tasks):
        allowed += _started_first([steps[number] for number in sorted(held)], tasks, situation)
    return Allowed(allowed, is_limited=True, is_held=bool(held))


def _minimum_for(
    step: ReplaceTask | RetireTask, minimum: int, tasks: Mapping[TaskId, Task], situation: Situation
) -> int:
    """Return how many tasks must stay available if the step's task stops.

    If the service must keep all tasks, its updates still stop one task at a time where the successor cannot start
    first.  Otherwise such an update would never end.
    """
    replicas = situation.service.spec.replicas
    if minimum < replicas or not is_dirty(step.task, situation):
        return minimum
    return minimum if _may_start_first(step, tasks, situation) else replicas - 1


def _may_start_first(
    step: ReplaceTask | RetireTask, tasks: Mapping[TaskId, Task], situation: Situation
) -> bool:
    """Return whether the successor of the step's task may start before it stops.

    That requires that they write no data, and that at least one node does not refuse the successor.  A task that is
    never restarted may have none.
    """
    if not situation.may_overlap(step.task):
        return False
    if not isinstance(step, RetireTask):
        return True
    successor = tasks.get(step.successor) if step.successor else None
    return successor is not None and not excludes(step.task, successor, situation)


def _take(task: Task, serving: dict[int, set[TaskId]]) -> None:
    """Count ``task`` as taken away."""
    rest = serving.pop(task.slot, set()) - {task.id}
    if rest:
        serving[task.slot] = rest


def _may_serve_soon(task: Task, serving: Collection[int], situation: Situation) -> bool:
    """Return whether the task will raise the number of available tasks, as far as its states tell."""
    if task.slot in serving or not task.is_wanted or not task.is_active:
        return False
    is_refused = task.status.state <= TaskState.PENDING and bool(task.status.err)
    node = situation.node_of(task)
    return not is_refused and (node is None or node.status.state is not NodeState.DOWN)


def _started_first(
    held: Sequence[Step], tasks: Mapping[TaskId, Task], situation: Situation
) -> Iterator[Step]:
    """Start the prepared successors of tasks that may not be stopped."""
    slots = group_by_slot(situation.tasks)
    for step in held:
        successor = tasks.get(step.successor) if isinstance(step, RetireTask) and step.successor else None
        if successor is None or successor.desired_state is not TaskState.READY:
            continue
        assert isinstance(step, RetireTask)
        if successor.status.state is not TaskState.READY or not situation.may_overlap(step.task):
            continue
        starts_at = start_time(successor, slots[successor.slot], situation)
        if starts_at <= situation.now:
            yield StartTask(successor)
        elif starts_at < inf:
            yield Recheck(starts_at)


def _witnesses(serving: dict[int, set[TaskId]], minimum: int) -> tuple[TaskId, ...]:
    """Return tasks that have to be available still when the steps are written."""
    slots: Sequence[int] = sorted(serving)[: min(minimum, WITNESSES_MAX)]
    return tuple(min(serving[slot]) for slot in slots)


def _takes_away(step: Step, situation: Situation) -> bool:
    """Return whether the step stops a running task and draws on the budget."""
    return _is_limited(step, situation) and step.task.status.state is TaskState.RUNNING


def _is_limited(step: Step, situation: Situation) -> TypeGuard[ReplaceTask | RetireTask]:
    """Return whether the step draws on the budget if its task runs.

    A service without a minimum of its own has one for the tasks that a drain replaces.  Otherwise the parallelism
    limits its updates, and nothing limits preemption and changes of nodes.
    """
    if situation.service.spec.mode.name != "replicated" or not isinstance(step, ReplaceTask | RetireTask):
        return False
    task = step.task
    node = situation.node_of(task)
    if node is None or node.status.state is NodeState.DOWN or task.status.state.is_terminal:
        return False
    if task.desired_state is not TaskState.RUNNING or getattr(step, "desired", None) is TaskState.REMOVE:
        return False
    has_minimum = required(situation.service) is not None
    if node.spec.availability is Availability.DRAIN:
        return not drains_now(node.spec.labels) and (has_minimum or isinstance(step, ReplaceTask))
    may_wait = task.preemption is not None or situation.is_unfit(task, node)
    return has_minimum and (may_wait or not situation.is_misplaced(task))
