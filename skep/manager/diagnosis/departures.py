"""Reason why a task is still on a node that it must leave.  Pure."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from skep.manager.diagnosis.reasons import (
    CauseKind,
    SlotId,
    TaskProblem,
    hostname,
    last_failure,
    name_of,
    problem_of,
    progress_of,
    slot_of,
)
from skep.manager.orchestrator.replacement.enforcement import violates_constraints
from skep.manager.services.disruption_budget import budget_of, required
from skep.model.node import Availability, Node
from skep.model.node_reports.departures import STAYS
from skep.model.options.labels import drains_now
from skep.model.service import PAUSED, UNDER_WAY, Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, TaskId


def why_it_stays(
    task: Task,
    service: Service,
    tasks: Iterable[Task],
    nodes: Mapping[NodeId, Node],
    surplus: Collection[TaskId] = (),
    held: str = "",
) -> str:
    """Return why the running ``task`` of a service is still on a node that it must leave, or nothing.

    Args:
        tasks: All tasks of the service.
        surplus: Tasks that exceed the resources of the node.
        held: Reason why Skep does not move tasks by itself now (``services.freezes``), or nothing.
    """
    node = nodes.get(task.node_id)
    if node is None or task.status.state is not TaskState.RUNNING or not task.is_wanted:
        return ""
    where, tasks = hostname(node, task), tuple(tasks)
    if node.spec.availability is not Availability.DRAIN and held:
        cause = _why_unfit(task, node, surplus)
        return f"{STAYS} {where}, {cause}: {held}" if cause else ""
    cause = _why_it_leaves(task, service, node, surplus)
    if not cause or service.spec.mode.name != "replicated" or task.is_never_restarted:
        return ""
    slot = [one for one in tasks if slot_of(one) == slot_of(task)]
    successors = [one for one in slot if one.is_active and one.id != task.id]
    if successors:
        last = max(successors, key=lambda one: (one.created_at, one.id))
        why = f"its replacement does not run yet: {_why_unreplaced(task, last, slot, nodes, service)}"
    elif _is_outdated(task, service):
        why = "the update replaces it in its turn"
    else:
        why = budget_of(service, tasks, nodes.get).reason or "its replacement starts first"
    return f"{STAYS} {where}, {cause}: {why}"


def _why_unreplaced(
    task: Task, replacement: Task, slot: Collection[Task], nodes: Mapping[NodeId, Node], service: Service
) -> str:
    """Return why ``replacement`` does not run.  Failures before ``task``, which runs, are not the reason."""
    newer = [one for one in slot if one.created_at > task.created_at]
    if last_failure(replacement, newer) is None:
        return progress_of(replacement, slot, nodes, service.spec)
    return problem_of(replacement, slot, nodes, spec=service.spec).reason


def split_off_replacements(
    problems: Sequence[TaskProblem], service: Service, tasks: Iterable[Task], nodes: Mapping[NodeId, Node]
) -> tuple[list[TaskProblem], str]:
    """Return ``problems`` without the problems of waiting replacements, and a hint about them.

    The service lacks nothing while the tasks before them run.  A replacement that fails remains a problem.
    """
    slots: dict[SlotId, list[Task]] = defaultdict(list)
    if any(map(_is_waiting, problems)):
        for task in tasks:
            if task.is_active:
                slots[slot_of(task)].append(task)
    slot_by_id = {task.id: slot for slot in slots.values() for task in slot}
    rest, hint, number = [], "", 0
    for problem in problems:
        slot = slot_by_id.get(problem.pending_task_id, []) if _is_waiting(problem) else []
        stays = ((task, why_it_stays(task, service, slot, nodes)) for task in slot)
        if (found := next(((task, why) for task, why in stays if why), None)) is None:
            rest.append(problem)
            continue
        number += 1
        hint = hint or f"{name_of(found[0], service, nodes)}: {found[1]}"
    return rest, f"{hint}; {number - 1} more" if number > 1 else hint


def _is_waiting(problem: TaskProblem) -> bool:
    return 0 < problem.weight < CauseKind.PROGRESSING.weight


def _why_it_leaves(task: Task, service: Service, node: Node, surplus: Collection[TaskId]) -> str:
    """Return why ``task`` must leave its node when its replacement runs, or nothing."""
    if node.spec.availability is Availability.DRAIN:
        return "" if drains_now(node.spec.labels) else "which is drained"
    return _why_unfit(task, node, surplus) if required(service) else ""


def _why_unfit(task: Task, node: Node, surplus: Collection[TaskId]) -> str:
    if violates_constraints(task, node):
        return "which no longer meets its constraints"
    return "which has too few resources for it" if task.id in surplus else ""


def _is_outdated(task: Task, service: Service) -> bool:
    """Return whether an update of the service, which may be paused, will replace the task."""
    status = service.update_status
    is_updated = status is not None and (status.state in UNDER_WAY or status.state in PAUSED)
    return is_updated and task.spec != service.spec.task_template


def count_text(tasks: Iterable[Task], running: int, wanted: int, left_out: int = 0) -> str:
    """Return how many tasks run.  There may be more than ``wanted``: during an update, two in one slot.

    Args:
        running: Number of running tasks, also if they are being stopped.
        left_out: Number of slots with one running task that ``tasks`` lacks.
    """
    if running <= wanted:
        return f"{running} of {wanted} tasks run"
    slots = left_out + len({slot_of(task) for task in tasks if is_serving(task)})
    slots = min(slots, wanted)
    return f"{slots} of {wanted} tasks run, {running - slots} more will stop"


def is_serving(task: Task) -> bool:
    """Return whether the task runs and should run."""
    return task.is_active and task.status.state is TaskState.RUNNING
