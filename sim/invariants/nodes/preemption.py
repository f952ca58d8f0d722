"""Rules on priorities: which tasks may be preempted, and which tasks get the resources."""

from collections import Counter
from collections.abc import Iterable

from sim.invariants.nodes.affinity import exceeds_skew, forbidden
from sim.invariants.nodes.placement import has_room, homes_of, host_ports, is_local, may_have_tasks
from sim.invariants.services.dependencies import missing_dependencies
from sim.world.committed import Change
from skep.manager.scheduler.preemption.preemption import AT_ONCE
from skep.model.node import Node, NodeState
from skep.model.options.dependencies import WAITS_FOR
from skep.model.options.labels import (
    VolumeAffinity,
    allows_preemption,
    min_available,
    priority_of,
    volume_affinity,
)
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.volume import Volume
from skep.store.interface import Created, Updated, View

KNOWN_S = 5.0
"""Time for which the leader's replica may not show a change."""
AT_ONCE_S = 1.0
"""A task that is preempted this soon after its assignment should not have been assigned."""


class PreemptionsAreJust:
    """Tasks are preempted only for tasks of a higher priority, only if the cluster allows it, and few at a time.

    A task is not placed and preempted at once for a task that was already waiting.
    """

    def __init__(self) -> None:
        self._changed_at: dict[ServiceId | None, float] = {}
        """Time of the last change of priorities, or of the cluster's setting (key None)."""
        self._placed_at: dict[TaskId, float] = {}
        self._refused_at: dict[TaskId, float] = {}
        self._disturbed_at = 0.0
        """Time of the last change of a node or of a volume's nodes, or creation of a task."""
        self.count = 0
        """Number of preempted tasks."""

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        now = change.time_s
        for event in change.events:
            match event:
                case Updated(Task() as old, Task() as task):
                    if old.preemption is None and task.preemption is not None:
                        self.count += 1
                        yield from self._violations(task, view, now)
                    if task.node_id and old.status.state < TaskState.ASSIGNED <= task.status.state:
                        self._placed_at[task.id] = now
                    if task.status.err and task.status.state is TaskState.PENDING:
                        self._refused_at.setdefault(task.id, now)
                case Updated(Service() as before, Service() as service):
                    if priority_of(before.spec.labels) != priority_of(service.spec.labels):
                        self._changed_at[service.id] = now
                case Updated(Swarm() as was, Swarm() as swarm) if was.spec.labels != swarm.spec.labels:
                    self._changed_at[None] = now
                case Created(Task()) | Created(Node()):
                    self._disturbed_at = now
                case Updated(Volume() as had, Volume() as has) if had.publish_status != has.publish_status:
                    self._disturbed_at = now
                case Updated(Node() as was_node, Node() as node) if _is_usable(was_node) != _is_usable(node):
                    self._disturbed_at = now

    def _violations(self, task: Task, view: View, now: float) -> Iterable[str]:
        assert task.preemption is not None
        other = view.lookup(Task, task.preemption.task_id)
        priority, gain = _priority(task, view), task.preemption.priority
        known = self._changed_at.get(task.service_id, -KNOWN_S), self._changed_at.get(None, -KNOWN_S)
        if priority >= gain and now - known[0] >= KNOWN_S:
            yield f"task {task.id} of priority {priority} is preempted for {task.preemption.task_id} of {gain}"
        if now - known[1] >= KNOWN_S and not any(
            allows_preemption(one.spec.labels) for one in view.find(Swarm)
        ):
            yield f"task {task.id} is preempted though the cluster does not allow it"
        if other is None or not other.is_wanted or other.status.state is not TaskState.PENDING:
            yield f"task {task.id} is preempted for {task.preemption.task_id}, which does not wait"
        leaving = [
            one
            for one in view.find(Task)
            if one.preemption is not None and not one.status.state.is_terminal and _is_reachable(one, view)
        ]
        by_task = Counter(one.preemption.task_id for one in leaving if one.preemption is not None)
        if len(leaving) > AT_ONCE and len(by_task) > 1:
            yield f"{len(leaving)} tasks are preempted at the same time"
        placed, refused = (
            self._placed_at.get(task.id, 0.0),
            self._refused_at.get(task.preemption.task_id, now),
        )
        is_quiet = now - max(self._disturbed_at, *self._changed_at.values(), 0.0) > KNOWN_S
        if is_quiet and refused < placed - AT_ONCE_S and now - placed < AT_ONCE_S:
            yield f"task {task.id} was placed, and preempted at once for {task.preemption.task_id}, which waited"


def held_by_lower(view: View) -> Iterable[str]:
    """Yield tasks that wait for resources of tasks with lower priority, in a cluster at rest that allows
    preemption.
    """
    for task in view.find(Task):
        service = view.lookup(Service, task.service_id)
        if service is None or not task.is_wanted or task.status.state is not TaskState.PENDING:
            continue
        if any(missing_dependencies(service, view)) or homes_of(task, service, view) or _shares(task):
            continue  # it may wait for something else
        if task.status.err.startswith(WAITS_FOR):
            continue  # a node confirms the tasks that its managers know of only some seconds after its registration
        if _returns_to_own_slot(task, service, view):
            continue
        for node in view.find(Node):
            if task.node_id in ("", node.id) and _would_fit(task, service, node, view):
                yield f"{task.id} of {service.spec.name} waits for what tasks of lower priority have on {node.id}"


def _shares(task: Task) -> bool:
    container = task.spec.container_spec
    return any(mount.type == "cluster" for mount in (container.mounts if container is not None else ()))


def _returns_to_own_slot(task: Task, service: Service, view: View) -> bool:
    """Return whether the task may wait for the place of an earlier task of its slot, whose data it uses."""
    container = task.spec.container_spec
    has_data = any(is_local(mount) for mount in (container.mounts if container is not None else ()))
    if not has_data or volume_affinity(service.spec.labels) is VolumeAffinity.NONE:
        return False
    slot = view.find(Task, slot=f"{task.service_id}/{task.slot}")
    return any(
        one.id != task.id and TaskState.ASSIGNED <= one.status.state <= TaskState.RUNNING for one in slot
    )


def _would_fit(task: Task, service: Service, node: Node, view: View) -> bool:
    if not may_have_tasks(node, service.spec) or any(forbidden(task, node, service, view)):
        return False
    open_nodes = [one for one in view.find(Node) if may_have_tasks(one, service.spec)]
    if exceeds_skew(task, node, service, open_nodes, view):
        return False
    own = _priority(task, view)
    staying = [
        one
        for one in view.find(Task, node_id=node.id)
        if TaskState.ASSIGNED <= one.status.state <= TaskState.RUNNING
        and (_priority(one, view) >= own or _is_spared(one, view))
    ]
    placement = task.spec.placement
    copies = sum(one.service_id == service.id for one in staying)
    if placement is not None and placement.max_replicas and copies >= placement.max_replicas:
        return False
    owners = [view.lookup(Service, one.service_id) for one in staying]
    if any(owner is not None and host_ports(owner.spec) & host_ports(service.spec) for owner in owners):
        return False
    return has_room(node, task, staying)


def _is_spared(task: Task, view: View) -> bool:
    """Return whether the disruption budget of the task's service allows no task to be preempted."""
    service = view.lookup(Service, task.service_id)
    if service is None or service.spec.mode.replicated is None:
        return False
    tasks = view.find(Task, service_id=service.id)
    running = sum(one.is_wanted and one.status.state is TaskState.RUNNING for one in tasks)
    minimum = min_available(service.spec.labels, service.spec.replicas)
    return minimum is not None and 0 < running <= minimum


def _priority(task: Task, view: View) -> int:
    service = view.lookup(Service, task.service_id)
    return priority_of(service.spec.labels) if service is not None else 0


def _is_usable(node: Node) -> tuple[NodeState, object]:
    return node.status.state, node.spec


def _is_reachable(task: Task, view: View) -> bool:
    node = view.lookup(Node, NodeId(task.node_id))
    return node is not None and node.status.state is NodeState.READY
