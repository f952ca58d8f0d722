"""Rules on placement: nodes are suitable, one container holds a host port, and a global job runs once per node."""

from collections import Counter
from collections.abc import Iterable

from sim.invariants.nodes.affinity import exceeds_skew, forbidden
from sim.world.committed import Change
from skep.model.container import Mount
from skep.model.node import Availability, Node, NodeState
from skep.model.options.labels import RESERVE_MEMORY, VolumeAffinity, is_stopped, volume_affinity
from skep.model.options.slot_volumes import SLOT_VOLUMES_LABEL
from skep.model.service import GenericResource, PublishMode, Resources, Service, ServiceSpec, UpdateOrder
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.model.values.meta import Version
from skep.model.volume import PublishState, Volume, VolumeScope, VolumeSharing
from skep.store.interface import Updated, View

RESERVE_KNOWN_S = 10.0
"""Seconds after which every leader knows a node's label.  Replicas lag by 4 s at most."""

Port = tuple[str, int]
"""Protocol and number, on a node."""


def constraints_of(spec: ServiceSpec) -> tuple[str, ...]:
    placement = spec.task_template.placement
    return placement.constraints if placement is not None else ()


def meets(constraints: Iterable[str], node: Node) -> bool:
    """Return whether ``node`` meets all ``constraints`` of the kinds that simulated users write."""
    return all(_is_met(constraint, node) for constraint in constraints)


def _is_met(constraint: str, node: Node) -> bool:
    words = constraint.replace("!=", " not equals ").replace("==", " equals ").split(maxsplit=1)
    key, rest = words[0], words[1].strip()
    match key.split(".", 2):
        case ["node", "labels", label]:
            actual = node.spec.labels.get(label)
        case ["node", "hostname"]:
            actual = node.description.hostname
        case ["node", "role"]:
            actual = node.spec.role.value
        case ["node", "facts", fact]:
            actual = node.description.engine.labels.get(f"skep.fact.{fact}")
        case _:
            return False
    is_negated, text = rest.startswith("not "), (actual or "").lower()
    operator, _, value = rest.removeprefix("not ").strip().partition(" ")
    value = value.strip().lower()
    match operator:
        case "exists":
            is_met = actual is not None
        case "in":
            is_met = text in value.strip("()").split(", ")
        case "like":
            is_met = text.startswith(value.rstrip("*"))
        case ">=" | ">" | "<=" | "<":
            is_met = actual is not None and _compares(_numbers(text), operator, _numbers(value))
        case _:
            is_met = text == value
    return is_met is not is_negated


def _numbers(version: str) -> list[int]:
    """Return the numbers of a version, without zeros at its end, because 6.1 is the same version as 6.1.0."""
    numbers = [int(part) for part in version.partition("-")[0].split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


def _compares(actual: list[int], operator: str, wanted: list[int]) -> bool:
    if actual == wanted:
        return operator.endswith("=")
    return (actual > wanted) is operator.startswith(">")


def may_have_tasks(node: Node, spec: ServiceSpec) -> bool:
    """Return whether a task of ``spec`` may be placed on ``node``."""
    is_active = node.status.state is NodeState.READY and node.spec.availability is Availability.ACTIVE
    return is_active and not is_stopped(spec.labels) and meets(constraints_of(spec), node)


def host_ports(spec: ServiceSpec) -> frozenset[Port]:
    """Return the ports that each task of ``spec`` holds on its node."""
    ports = spec.endpoint_spec.ports if spec.endpoint_spec is not None else ()
    return frozenset(
        (port.protocol, port.published_port)
        for port in ports
        if port.publish_mode is PublishMode.HOST and port.published_port
    )


def port_violations(node_id: NodeId, task: Task, running: Iterable[Task], view: View) -> Iterable[str]:
    """Yield the host ports of a starting container that another ``running`` container holds on its node."""
    service = view.lookup(Service, task.service_id)
    ports = host_ports(service.spec) if service is not None else frozenset[Port]()
    if not ports:
        return
    for other in running:
        owner = view.lookup(Service, other.service_id)
        if other.id != task.id and owner is not None and (shared := ports & host_ports(owner.spec)):
            yield f"tasks {other.id} and {task.id} both hold {sorted(shared)} on {node_id}"


def devices_in(resources: Iterable[GenericResource]) -> Counter[str]:
    """Return the named devices of a node, or those that a task was given."""
    named = (one.named_resource_spec for one in resources)
    return Counter(f"{one.kind} {one.value}" for one in named if one is not None)


def _number_of_devices(task: Task) -> int:
    """Return the number of devices that a task reserves."""
    wanted = (one.discrete_resource_spec for one in reservations(task).generic_resources)
    return sum(one.value for one in wanted if one is not None)


def device_violations(node_id: NodeId, task: Task, running: Iterable[Task]) -> Iterable[str]:
    """Yield the devices of a starting container that another ``running`` container uses on its node."""
    for other in running:
        if other.id != task.id and (
            shared := devices_in(task.generic_resources) & devices_in(other.generic_resources)
        ):
            yield f"tasks {other.id} and {task.id} both use {sorted(shared)} on {node_id}"


def devices_are_exclusive(change: Change, view: View) -> Iterable[str]:
    """Check that an assigned task gets as many devices as it reserves, and none that another task holds."""
    for event in change.events:
        match event:
            case Updated(Task() as old, Task() as task) if task.node_id != old.node_id:
                if (node := view.lookup(Node, task.node_id)) is None:
                    continue
                given, wanted = devices_in(task.generic_resources), _number_of_devices(task)
                if given.total() != wanted:
                    yield f"task {task.id} gets {given.total()} devices on {node.id} instead of {wanted}"
                held = Counter[str]()
                for one in view.find(Task, node_id=node.id):
                    if TaskState.ASSIGNED <= one.status.state <= TaskState.RUNNING:
                        held += devices_in(one.generic_resources)
                there = devices_in(node.description.resources.generic_resources)
                for name in sorted((held - there) & given):
                    yield f"{name} of {node.id} is given to {held[name]} tasks, among them {task.id}"


def global_jobs_run_once(change: Change, view: View) -> Iterable[str]:
    """Check that a global job has at most one completed run on each node, in each of its iterations."""
    for event in change.events:
        match event:
            case Updated(Task() as old, Task() as new) if _has_completed(old, new):
                service = view.lookup(Service, new.service_id)
                if service is None or service.spec.mode.global_job is None:
                    continue
                runs = completed_on(view, service, new.job_iteration)[new.node_id]
                if runs > 1:
                    yield f"{runs} runs of {service.id} are completed on {new.node_id}"


def completed_on(view: View, service: Service, iteration: Version | None) -> Counter[NodeId]:
    """Return the number of completed runs of a job's iteration, by node."""
    return Counter(
        task.node_id
        for task in view.find(Task, service_id=service.id)
        if task.job_iteration == iteration and task.status.state is TaskState.COMPLETE
    )


def is_unplaceable(task: Task, service: Service, view: View) -> bool:
    """Return whether no node can take ``task``.  For a global service only its own node counts."""
    homes = homes_of(task, service, view)
    return not any(
        could_take(node, task, service, view)
        for node in view.find(Node)
        if (not task.node_id or node.id == task.node_id) and (not homes or node.id in homes)
    )


def homes_of(task: Task, service: Service, view: View) -> set[NodeId]:
    """Return the nodes to which a task with ``skep.volume-affinity=required`` has to return, or nothing if all are
    allowed.
    """
    container = task.spec.container_spec
    mounts = container.mounts if container is not None and task.slot else ()
    if volume_affinity(service.spec.labels) is not VolumeAffinity.REQUIRED or not any(
        is_local(one) for one in mounts
    ):
        return set()
    mark = f"={service.spec.name}.{task.slot}@"
    reported = {
        node.id
        for node in view.find(Node)
        if mark in node.description.engine.labels.get(SLOT_VOLUMES_LABEL, "")
    }
    slot = view.find(Task, slot=f"{task.service_id}/{task.slot}")
    had = {one.node_id for one in slot if one.id != task.id and has_left_data(one)}
    return reported | {id for id in had if view.lookup(Node, id) is not None}


def has_left_data(task: Task) -> bool:
    """Return whether the task's status shows that its container was created on its node."""
    match task.status.state:
        case TaskState.READY | TaskState.STARTING | TaskState.RUNNING | TaskState.COMPLETE | TaskState.FAILED:
            return bool(task.node_id)
        case _:
            container = task.status.container_status
            return bool(task.node_id) and container is not None and bool(container.container_id)


def is_local(mount: Mount) -> bool:
    """Return whether the mount's data stays on its node."""
    return mount.type == "volume"


def has_room(node: Node, task: Task, held: Iterable[Task]) -> bool:
    present, resources = list(held), node.description.resources
    needed, used = (sum(reservations(one).memory_bytes for one in tasks) for tasks in ((task,), present))
    wanted = _number_of_devices(task)
    if not needed and not wanted:
        return True  # Docker does the same
    devices = sum(devices_in(one.generic_resources).total() for one in present) + wanted
    fits = used + needed <= resources.memory_bytes - reserve_of(node)
    return fits and devices <= len(resources.generic_resources)


def reserve_of(node: Node) -> int:
    """Return the memory that the node's labels keep for its system, as simulated users write it."""
    return int(node.spec.labels.get(RESERVE_MEMORY, "0MiB").removesuffix("MiB")) << 20


class ReservesAreKept:
    """Check that a task that reserves memory is assigned to a node that keeps enough for its system.

    A label counts some seconds after its change, because a leader may decide before it knows of it.
    """

    def __init__(self) -> None:
        self._changed_s: dict[NodeId, float] = {}

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Updated(Node() as old, Node() as new) if reserve_of(old) != reserve_of(new):
                    self._changed_s[new.id] = change.time_s
                case Updated(Task() as old, Task() as task) if task.node_id != old.node_id:
                    node = view.lookup(Node, task.node_id)
                    if node is None or not reserve_of(node):
                        continue
                    if change.time_s - self._changed_s.get(node.id, 0.0) < RESERVE_KNOWN_S:
                        continue
                    held = (
                        one
                        for one in view.find(Task, node_id=node.id)
                        if one.id != task.id and TaskState.ASSIGNED <= one.status.state <= TaskState.RUNNING
                    )
                    if not has_room(node, task, held):
                        yield f"{task.id} is assigned to {node.id}, which keeps memory for its system"


def reservations(task: Task) -> Resources:
    """Return what the task reserves on its node."""
    resources = task.spec.resources
    return (resources.reservations if resources else None) or Resources()


def _could_have_volumes(node: Node, task: Task, service: Service, view: View) -> bool:
    """Return whether the task's cluster volumes exist, and their current users let the task use them on ``node``."""
    container, update = task.spec.container_spec, service.spec.update_config
    starts_first = update is not None and update.order is UpdateOrder.START_FIRST
    own = task.service_id, task.slot or task.node_id
    for mount in container.mounts if container is not None else ():
        if mount.type != "cluster":
            continue
        found = [one for one in view.find(Volume) if one.spec.name == mount.source]
        if not found or found[0].pending_delete or found[0].info is None:
            return False
        leaving = (PublishState.PENDING_NODE_UNPUBLISH, PublishState.PENDING_UNPUBLISH)
        if any(one.node_id == node.id and one.state in leaving for one in found[0].publish_status):
            return False
        mode = found[0].spec.access_mode
        for other in view.find(Task):
            if (
                not other.is_active
                or other.id == task.id
                or found[0].id not in {one.id for one in other.volumes}
            ):
                continue
            is_of_slot = (other.service_id, other.slot or other.node_id) == own
            if is_of_slot and not starts_first:
                continue  # it may be stopped first
            if mode.scope is VolumeScope.SINGLE and other.node_id != node.id:
                return False
            if mode.sharing in (VolumeSharing.NONE, VolumeSharing.ONE_WRITER):
                return False
    return True


def could_take(node: Node, task: Task, service: Service, view: View) -> bool:
    """Return whether ``node`` has enough resources for ``task`` in addition to its present tasks."""
    if not may_have_tasks(node, service.spec) or not _could_have_volumes(node, task, service, view):
        return False
    held = [
        other
        for other in view.find(Task, node_id=node.id)
        if other.id != task.id and TaskState.ASSIGNED <= other.status.state <= TaskState.RUNNING
    ]
    if not has_room(node, task, held) or any(forbidden(task, node, service, view)):
        return False
    open_nodes = [one for one in view.find(Node) if may_have_tasks(one, service.spec)]
    if exceeds_skew(task, node, service, open_nodes, view):
        return False
    ports = host_ports(service.spec)
    owners = (view.lookup(Service, other.service_id) for other in held)
    if ports and any(owner is None or ports & host_ports(owner.spec) for owner in owners):
        return False
    placement = service.spec.task_template.placement
    copies = sum(other.service_id == service.id and other.is_wanted for other in held)
    return placement is None or not placement.max_replicas or copies < placement.max_replicas


def _has_completed(old: Task, new: Task) -> bool:
    return old.status.state is not TaskState.COMPLETE and new.status.state is TaskState.COMPLETE
