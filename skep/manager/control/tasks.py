"""Tasks as the API shows them.  Only the leader's loops and the nodes write tasks.

Source: swarmkit, manager/controlapi/task.go, manager/orchestrator/task.go (IsTaskDirty).
"""

from msgspec import Struct
from msgspec.structs import replace

from skep.manager.cluster import known_cluster
from skep.manager.diagnosis.volume_reasons import unpublished
from skep.model.node import Node, NodeState
from skep.model.options.constraints import is_satisfied
from skep.model.service import EndpointSpec, Placement, Service, TaskSpec
from skep.model.swarm import FROZEN
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.task_end import EndCause, TaskEnd
from skep.store.interface import View
from skep.store.kinds import spec_of


def known_status(view: View, task: Task) -> TaskStatus:
    """Return the last reported status, or UNKNOWN for a task that was assigned to a node which is down.

    A task that has ended, or was not yet on a node, keeps its state.  The second one shows that its node is down as its
    error.  A task that waits for a cluster volume shows the driver's message as its error.
    """
    status = task.status
    if task.volumes and not status.err and TaskState.ASSIGNED <= status.state < TaskState.STARTING:
        status = replace(status, err=unpublished(view, task))
    if not TaskState.ASSIGNED <= status.state <= TaskState.RUNNING:
        return status
    node = view.lookup(Node, task.node_id)
    if node is None or node.status.state is not NodeState.DOWN:
        return status
    name = node.spec.name or node.shown_name
    swarm = known_cluster(view)
    freeze = swarm.freeze if swarm is not None else None
    lost = f"node {name} is down"
    if freeze is not None and freeze.includes(node.id, node.silent_since):
        lost = f"{lost}; {FROZEN}: {freeze.cause} (skep cluster resume)"
    if status.state is TaskState.ASSIGNED:
        return replace(status, err=lost)
    return replace(
        status,
        state=TaskState.UNKNOWN,
        timestamp=node.silent_since or status.timestamp,
        message=f"node {name} is down; the task was last known to be {status.state.value}",
        err=status.err or lost,
        end=TaskEnd(cause=EndCause.NODE_LOST.value),
    )


def damage_of(view: View, kind: type[Struct], id: str) -> str:
    """Return the unreadable parts of an object as a sentence, or an empty text."""
    parts = {f"its {part}": why for part, why in view.damaged(kind).get(id, {}).items()}
    if (why := view.unreadable(kind).get(id)) is not None:
        parts["it"] = why
    return "; ".join(f"{part} cannot be read: {why}" for part, why in sorted(parts.items()))


def with_damage(view: View, task: Task) -> Task:
    """Return ``task`` with an error that names its unreadable parts."""
    damage = damage_of(view, Task, task.id)
    if not damage:
        return task
    return replace(task, status=replace(task.status, err="; ".join(filter(None, (damage, task.status.err)))))


def is_up_to_date(view: View, task: Task) -> bool:
    """Return whether ``task`` matches its service's current spec.  Clients use it to show the progress of an update."""
    service = view.lookup(Service, task.service_id)
    if service is None:
        return False
    if task.spec_version == service.spec_version:
        return True
    if _without_placement(task.spec) != _without_placement(service.spec.task_template):
        return False
    made_from, node = spec_of(view, task), view.lookup(Node, task.node_id)
    if made_from is not None and _endpoint(made_from.endpoint_spec) != _endpoint(service.spec.endpoint_spec):
        return False
    if task.spec.placement == service.spec.task_template.placement or not task.node_id:
        return True
    # A changed placement replaces only the tasks whose nodes no longer fit
    # (``orchestrator/replacement/outdated_tasks.py``).
    constraints = (service.spec.task_template.placement or Placement()).constraints
    return node is not None and is_satisfied(constraints, node)


def _without_placement(spec: TaskSpec) -> TaskSpec:
    return replace(spec, placement=None)


def _endpoint(spec: EndpointSpec | None) -> EndpointSpec:
    return spec or EndpointSpec()
