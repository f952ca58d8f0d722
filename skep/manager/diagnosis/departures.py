"""Reason why a task is still on its drained node.  Pure."""

from collections.abc import Iterable, Mapping

from skep.manager.diagnosis.reasons import hostname, problem_of, slot_of
from skep.manager.services.disruption_budget import budget_of
from skep.model.needs import host_ports
from skep.model.node import Availability, Node
from skep.model.node_reports.departures import STAYS, UNREPLACED
from skep.model.options.labels import drains_now
from skep.model.service import PAUSED, UNDER_WAY, Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId


def why_it_stays(task: Task, service: Service, tasks: Iterable[Task], nodes: Mapping[NodeId, Node]) -> str:
    """Return why the running ``task`` of a replicated service is still on its drained node, or nothing.

    Args:
        tasks: All tasks of the service.
    """
    node = nodes.get(task.node_id)
    if node is None or node.spec.availability is not Availability.DRAIN or drains_now(node.spec.labels):
        return ""
    if (
        task.status.state is not TaskState.RUNNING
        or not task.is_wanted
        or service.spec.mode.name != "replicated"
    ):
        return ""
    tasks = tuple(tasks)
    where = hostname(node, task)
    slot = [one for one in tasks if slot_of(one) == slot_of(task)]
    successors = [one for one in slot if one.is_active and one.id != task.id]
    if successors:
        last = max(successors, key=lambda one: (one.created_at, one.id))
        problem = problem_of(last, slot, nodes, ports=host_ports(service.spec))
        why = f"{UNREPLACED}{problem.reason}"
    elif _is_outdated(task, service):
        why = "the update replaces it in its turn"
    else:
        why = budget_of(service, tasks, nodes.get).reason or "its replacement starts first"
    return f"{STAYS} {where}, which is drained: {why}"


def _is_outdated(task: Task, service: Service) -> bool:
    """Return whether an update of the service, which may be paused, will replace the task."""
    status = service.update_status
    is_updated = status is not None and (status.state in UNDER_WAY or status.state in PAUSED)
    return is_updated and task.spec != service.spec.task_template
