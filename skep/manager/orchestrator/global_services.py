"""Global services: one task on every eligible node."""

from collections.abc import Iterable

from skep.manager.orchestrator.changes import Change, FillSlot, RetireTask, cause_to_leave
from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.manager.orchestrator.replacement.restart import should_restart
from skep.manager.orchestrator.replicated import is_filled
from skep.manager.orchestrator.slots import (
    Slot,
    first_state,
    group_by_node,
    is_unknown,
    is_unusable,
    wanted,
)
from skep.model.node import Availability, Node
from skep.model.options.constraints import is_satisfied
from skep.model.options.labels import is_stopped
from skep.model.service import Placement, Service
from skep.model.task import Task, TaskState


def reconcile(
    service: Service,
    tasks: Iterable[Task],
    nodes: Iterable[Node],
    seen: ObservedTimes | None = None,
    *,
    keeps_unfit: bool = False,
) -> list[Change]:
    """Return the changes that create one task of ``service`` on each eligible node and remove the tasks on other nodes.

    A node that is paused, or about which nothing is known, keeps its task but receives no new one.  With
    ``keeps_unfit``, so does a node whose labels no longer fit.

    Idempotent: after the changes are applied, the next call returns ``[]``.

    Source: swarmkit, manager/orchestrator/global/global.go (reconcileServices).
    """
    if is_stopped(service.spec.labels):
        return [RetireTask(task, TaskState.REMOVE) for task in tasks if task.desired_state < TaskState.REMOVE]
    seen = seen or ObservedTimes(0.0)
    slots = group_by_node(tasks)
    every = {node.id: node for node in nodes}
    eligible = {id: node for id, node in every.items() if is_eligible(node, service)}
    changes: list[Change] = []
    for node_id, slot in slots.items():
        node = eligible.get(node_id)
        if node is None:
            present = every.get(node_id)
            kept = [
                task
                for task in wanted(slot)
                if keeps_unfit and present is not None and _is_kept(task, present, service)
            ]
            changes += [_retired(task, slot, seen, present) for task in wanted(slot) if task not in kept]
        elif not takes_new_tasks(node):
            ended = (task for task in wanted(slot) if task.status.state.is_terminal)
            changes += [_retired(task, slot, seen, node) for task in ended]
    for node_id, node in eligible.items():
        slot = slots.get(node_id, ())
        if takes_new_tasks(node) and not is_filled(slot, service, seen):
            changes.append(FillSlot(service, 0, node_id, first_state(slot)))
    return changes


def is_eligible(node: Node, service: Service) -> bool:
    """Return whether ``node`` is up, not drained, and meets the service's constraints (if its labels are known).

    A stopped service has no eligible node.
    """
    if is_stopped(service.spec.labels):
        return False
    constraints = (service.spec.task_template.placement or Placement()).constraints
    return not is_unusable(node) and (is_unknown(node) or is_satisfied(constraints, node))


def _is_kept(task: Task, node: Node, service: Service) -> bool:
    """Return whether only the node's labels have changed, and not the service's constraints or the task's state."""
    is_placed_alike = task.spec.placement == service.spec.task_template.placement
    return is_placed_alike and not task.status.state.is_terminal and not is_unusable(node)


def takes_new_tasks(node: Node) -> bool:
    """Return whether an eligible node receives a task, and a new one after that has ended."""
    return node.spec.availability is Availability.ACTIVE and not is_unknown(node)


def _retired(task: Task, slot: Slot, seen: ObservedTimes, node: Node | None) -> RetireTask:
    """Retire a task because of its node, with ``is_due`` set if a later leader may fill the slot again."""
    is_due = not task.status.state.is_terminal or should_restart(task, slot, seen)
    return RetireTask(task, is_due=is_due, cause=cause_to_leave(task, node))
