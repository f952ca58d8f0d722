"""Rule on the disruption budget of services."""

from collections.abc import Iterable

from sim.invariants.nodes.placement import host_ports
from sim.world.committed import Change
from skep.model.node import Availability, Node, NodeState
from skep.model.options.labels import drains_now, min_available
from skep.model.options.overlap import why_stop_first, written_data
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.store.interface import Updated, View


def minimum_stays_available(change: Change, view: View) -> Iterable[str]:
    """Check that nothing but users and failures leaves fewer tasks available than ``skep.min-available`` says.

    Drains, updates, preemption and changes of nodes may not.  Lost nodes, users who scale down, and drains with
    ``--now`` may.  An update of all tasks stops one at a time where a new task cannot start before an old one stops.
    """
    for event in change.events:
        match event:
            case Updated(Task() as old, Task() as task) if _serves(old) and (
                task.desired_state is TaskState.SHUTDOWN
            ):
                service, node = view.lookup(Service, task.service_id), view.lookup(Node, task.node_id)
                if service is None or service.spec.mode.replicated is None:
                    continue
                if node is None or node.status.state is NodeState.DOWN:
                    continue
                minimum = min_available(service.spec.labels, service.spec.replicas)
                is_now = node.spec.availability is Availability.DRAIN and drains_now(node.spec.labels)
                if minimum is None or is_now:
                    continue
                left = {one.slot for one in view.find(Task, service_id=service.id) if _serves(one)}
                if minimum == service.spec.replicas and task.spec != service.spec.task_template:
                    writes = why_stop_first(service.spec) or written_data(task.spec)
                    minimum -= bool(writes or _is_awaited(task, service, view))
                if len(left) < minimum and task.slot not in left:
                    yield f"{task.id} is stopped, and {len(left)} of {minimum} tasks of {service.id} are left"


def _serves(task: Task) -> bool:
    return task.desired_state is TaskState.RUNNING and task.status.state is TaskState.RUNNING


def _is_awaited(task: Task, service: Service, view: View) -> bool:
    """Return whether every node refused the successor of ``task``, and may refuse it until ``task`` stops."""
    placement = task.spec.placement
    if not host_ports(service.spec) and (placement is None or not placement.max_replicas):
        return False
    return any(
        one.slot == task.slot and one.is_wanted and one.status.state is TaskState.PENDING and one.status.err
        for one in view.find(Task, service_id=task.service_id)
    )
