"""Rule on change freezes and maintenance windows: nothing happens by itself while they hold."""

from collections.abc import Iterable

from sim.invariants.nodes.placement import meets
from sim.world.committed import Change
from skep.model.node import Availability, Node, NodeState
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState
from skep.model.values.stacks import STACK_LABEL
from skep.store.interface import Updated, View


class FreezesHold:
    """Nothing is preempted, scaled down, or moved because of labels, while a freeze is in force.

    A change counts if the freeze was in force before it, because decisions compare the freeze when they are written.
    """

    def __init__(self) -> None:
        self._before: Swarm | None = None

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        """Check one change."""
        before, self._before = self._before, next(iter(view.find(Swarm)), None)
        if before is None or not (before.change_freezes or before.window or before.stack_windows):
            return
        for event in change.events:
            match event:
                case Updated(Task() as old, Task() as task) if _is_held(before, view, task):
                    if task.preemption is not None and old.preemption is None:
                        yield f"task {task.id} is preempted during a freeze"
                    if _is_moved(old, task, view):
                        yield f"task {task.id} is moved from {task.node_id} during a freeze"
                case Updated(Service() as old, Service() as new) if old.autoscaled != new.autoscaled:
                    if new.spec.replicas < old.spec.replicas and _covers(before, new):
                        yield f"service {new.id} is scaled down during a freeze"


def _is_held(swarm: Swarm, view: View, task: Task) -> bool:
    service = view.lookup(Service, task.service_id)
    return service is not None and _covers(swarm, service)


def _covers(swarm: Swarm, service: Service) -> bool:
    scopes = {"", service.spec.labels.get(STACK_LABEL, "")}
    windows = (swarm.window, swarm.stack_windows.get(service.spec.labels.get(STACK_LABEL, "")))
    is_closed = any(one is not None and one.closed_until for one in windows)
    return is_closed or bool(scopes & swarm.change_freezes.keys())


def _is_moved(old: Task, task: Task, view: View) -> bool:
    """Return whether a running task is stopped although only its node's labels have changed."""
    is_stopped = task.desired_state is TaskState.SHUTDOWN and old.desired_state is TaskState.RUNNING
    if (
        not is_stopped
        or task.status.state is not TaskState.RUNNING
        or task.preemption is not None
        or task.volumes
    ):
        return False
    node, service = view.lookup(Node, task.node_id), view.lookup(Service, task.service_id)
    if node is None or service is None or service.removed_at is not None:
        return False
    if node.status.state is not NodeState.READY or node.spec.availability is not Availability.ACTIVE:
        return False
    if service.spec_version != task.spec_version or service.spec.task_template != task.spec:
        return False
    slot = view.find(Task, slot=f"{service.id}/{task.slot or task.node_id}")
    has_older = any(one.is_wanted and one.created_at < task.created_at for one in slot)
    constraints = task.spec.placement.constraints if task.spec.placement is not None else ()
    return not has_older and not meets(constraints, node)
