"""Rules on tasks: their slots, their nodes, their volumes, and the order of their states."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import TypeAlias

from skep.manager.verify.rules import InvariantViolation
from skep.model.needs import HostPort, host_ports, reservations_of
from skep.model.node import Availability, Node, NodeState
from skep.model.options.constraints import is_satisfied
from skep.model.options.labels import min_available
from skep.model.options.overlap import written_data
from skep.model.service import Service, ServiceSpec, UpdateConfig, UpdateOrder
from skep.model.staging.updates import stages_of
from skep.model.task import Task, TaskState
from skep.model.values.counts import counted
from skep.model.values.ids import NodeId, ServiceId
from skep.model.volume import Volume, VolumeScope, VolumeSharing
from skep.store.interface import View
from skep.store.kinds import spec_of

STARTED_MAX, WANTED_MAX = 2, 2
"""Tasks of a slot with desired state running, and in addition prepared ones, while one replaces another."""


def went_back(old: Task, new: Task) -> Iterator[InvariantViolation]:
    """Yield the steps back from ``old`` to ``new``, states of one task.  A task is assigned once and keeps its slot."""
    if new.status.state < old.status.state:
        text = f"task {new.id} went back from {old.status.state.value} to {new.status.state.value}"
        yield InvariantViolation("backwards", text, (new,))
    if new.desired_state < old.desired_state:
        text = f"task {new.id}: desired state went back to {new.desired_state.value}"
        yield InvariantViolation("backwards", text, (new,))
    if old.node_id and new.node_id != old.node_id:
        text = f"task {new.id} moved from {old.node_id} to {new.node_id}"
        yield InvariantViolation("backwards", text, (new,))
    if new.slot != old.slot or new.service_id != old.service_id:
        yield InvariantViolation("backwards", f"task {new.id} changed its slot", (new,))


# -- slots -------------------------------------------------------------------------------------------------------------


def crowded_slot(wanted: Sequence[Task], service: Service | None, view: View) -> Iterator[InvariantViolation]:
    """Yield a slot with too many tasks.

    During a staged update, or one with start-first, two may have desired state running.  So may the task of a drained
    node and its replacement.  If the drain is undone, both may run until one of them is retired.  A replacement of
    another version that has not started yet then waits for its image or volume, and the old task serves.

    Args:
        wanted: The wanted tasks of one slot, for jobs of one iteration.
    """
    started = sum(one.desired_state is not TaskState.READY for one in wanted)
    if started < STARTED_MAX and len(wanted) <= WANTED_MAX:
        return
    both = service is not None and (
        may_start_first(service)
        or any(one.relocation is not None or is_on_drained_node(one, view) for one in wanted)
        or _has_unstarted_successor(wanted)
    )
    if len(wanted) > WANTED_MAX or started > (STARTED_MAX if both else 1):
        task = wanted[0]
        ids = [one.id for one in wanted]
        text = f"slot {task.slot or task.node_id} of {task.service_id} is filled by {ids}"
        yield InvariantViolation("slot", text, tuple(wanted))


def _has_unstarted_successor(wanted: Sequence[Task]) -> bool:
    """Return whether the tasks have different versions, and one of them has not been started."""
    versions = {one.spec_version for one in wanted}
    return len(versions) > 1 and any(one.status.state < TaskState.STARTING for one in wanted)


def is_on_drained_node(task: Task, view: View) -> bool:
    """Return whether the task's node is drained."""
    node = view.lookup(Node, task.node_id) if task.node_id else None
    return node is not None and node.spec.availability is Availability.DRAIN


def may_start_first(service: Service) -> bool:
    """Return whether an update or rollback to or from the current spec may start the new task first."""
    return (
        _has_minimum(service)
        or any(config.order is UpdateOrder.START_FIRST for config in rollout_configs(service))
        or any(stages_of(spec.labels) for spec in (service.spec, service.previous_spec or service.spec))
    )


def rollout_configs(service: Service) -> list[UpdateConfig]:
    """Return the settings of updates and rollbacks to and from the current spec."""
    specs = (service.spec, service.previous_spec or service.spec)
    return [
        config or UpdateConfig() for spec in specs for config in (spec.update_config, spec.rollback_config)
    ]


def _has_minimum(service: Service) -> bool:
    """Return whether the disruption budget may let no running task stop first.

    Tasks that write data overlap only if all tasks have to stay available.
    """
    specs = (service.spec, service.previous_spec or service.spec)
    for spec in specs:
        minimum = min_available(spec.labels, spec.replicas) if spec.mode.replicated is not None else 0
        if minimum and (minimum >= spec.replicas or not any(map(_writes_data, specs))):
            return True
    return False


def _writes_data(spec: ServiceSpec) -> bool:
    return bool(written_data(spec.task_template))


def crowded_job(service: Service, tasks: Iterable[Task]) -> Iterator[InvariantViolation]:
    """Yield a job with more tasks of its current spec at a time than ``MaxConcurrent``.

    Args:
        tasks: Tasks of one iteration.
    """
    job = service.spec.mode.replicated_job
    if job is None:
        return
    active = [one for one in tasks if one.is_active and one.spec_version == service.spec_version]
    if len(active) > (job.max_concurrent or 0):
        text = f"job {service.id} has {counted(len(active), 'task')} under way, {job.max_concurrent} may be"
        yield InvariantViolation("job", text, (service, *active))


def shared_name(service: Service, view: View) -> Iterator[InvariantViolation]:
    """Yield that another service has the name of ``service``.  Removed services have no names."""
    found = view.find(Service, name=service.spec.name)
    if len(found) > 1:
        text = f"name {service.spec.name} belongs to {[one.id for one in found]}"
        yield InvariantViolation("name", text, tuple(found))


# -- nodes -------------------------------------------------------------------------------------------------------------


def holds(task: Task) -> bool:
    """Return whether the task holds resources of its node."""
    return TaskState.ASSIGNED <= task.status.state <= TaskState.RUNNING


def overcommitted(node: Node, here: Sequence[Task]) -> Iterator[InvariantViolation]:
    """Yield the resources of which the tasks ``here`` have reserved more than the node has."""
    has = node.description.resources
    held = [reservations_of(one.spec) for one in here]
    if sum(one.memory_bytes for one in held) > has.memory_bytes > 0:
        yield InvariantViolation(
            "overcommitted", f"memory of {node.id} is over-committed", tuple(here), (node.id,)
        )
    if sum(one.nano_cpus for one in held) > has.nano_cpus > 0:
        text = f"processors of {node.id} are over-committed"
        yield InvariantViolation("overcommitted", text, tuple(here), (node.id,))


def too_many_copies(node: Node, copies: Sequence[Task], allowed: int) -> Iterator[InvariantViolation]:
    """Yield that the node has more than ``allowed`` wanted tasks of a service.  0 allows any number."""
    if allowed and len(copies) > allowed:
        text = f"{node.id} has {len(copies)} copies of {copies[0].service_id}"
        yield InvariantViolation("copies", text, tuple(copies), (node.id,))


def shared_ports(node: Node, here: Iterable[Task], view: View) -> Iterator[InvariantViolation]:
    """Yield the ports of the machine that two wanted and running tasks hold."""
    holders: dict[HostPort, Task] = {}
    for task in here:
        if task.status.state is not TaskState.RUNNING or not task.is_wanted:
            continue
        for port in host_ports(spec_of(view, task)):
            if (other := holders.setdefault(port, task)) is not task:
                text = f"tasks {other.id} and {task.id} both hold {[port]} on {node.id}"
                yield InvariantViolation("host-port", text, (other, task), (node.id,))


def misplaced(
    node: Node, here: Iterable[Task], is_kept: Mapping[ServiceId, bool]
) -> Iterator[InvariantViolation]:
    """Yield running tasks of services whose constraints the node does not meet.

    Args:
        is_kept: Whether something keeps a service's tasks on nodes that do not fit, such as a freeze or a budget.
    """
    for task in here:
        placement = task.spec.placement
        if placement is None or not placement.constraints or is_kept.get(task.service_id, True):
            continue
        is_served = task.status.state is TaskState.RUNNING and task.desired_state is TaskState.RUNNING
        if is_served and not is_satisfied(placement.constraints, node):
            text = f"task {task.id} of {task.service_id} is on {node.id}, which does not meet its constraints"
            yield InvariantViolation("constraints", text, (task,), (node.id,))


def node_violations(
    node: Node, tasks: Iterable[Task], is_kept: Mapping[ServiceId, bool], view: View
) -> Iterator[InvariantViolation]:
    """Yield the violations on a live node.  A node that is down, paused or unknown keeps its tasks as they are."""
    here = [one for one in tasks if holds(one)]
    if node.status.state is not NodeState.READY or node.spec.availability is not Availability.ACTIVE:
        return
    if not any(is_kept.get(one.service_id, True) for one in here):
        yield from overcommitted(node, here)
    copies: dict[ServiceId, list[Task]] = {}
    for one in here:
        if one.is_wanted and one.spec.placement is not None and one.spec.placement.max_replicas:
            copies.setdefault(one.service_id, []).append(one)
    for group in copies.values():
        # Tasks of an earlier spec were placed by its limit.
        yield from too_many_copies(node, group, max(_max_replicas(one) for one in group))
    yield from shared_ports(node, here, view)
    yield from misplaced(node, here, is_kept)


def _max_replicas(task: Task) -> int:
    return task.spec.placement.max_replicas if task.spec.placement is not None else 0


def grouped_by_slot(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """Yield the wanted tasks of each slot and iteration with more than one of them."""
    wanted = [one for one in tasks if one.is_wanted]
    sizes = Counter(map(_slot, wanted))
    crowded: dict[object, list[Task]] = {key: [] for key, size in sizes.items() if size > 1}
    for one in wanted if crowded else ():
        if (key := _slot(one)) in crowded:
            crowded[key].append(one)
    yield from crowded.values()


def _slot(task: Task) -> tuple[int | NodeId, object]:
    iteration = task.job_iteration.index if task.job_iteration is not None else None
    return task.slot or task.node_id, iteration


# -- cluster volumes ---------------------------------------------------------------------------------------------------

Use: TypeAlias = tuple[NodeId, Task]
"""A running task, and its node."""


def shared_volume(volume: Volume, one: Use, other: Use) -> Iterator[InvariantViolation]:
    """Yield that two running tasks cannot share the volume."""
    (node_id, task), (other_id, second) = one, other
    mode, id = volume.spec.access_mode, volume.id
    if other_id != node_id and mode.scope is not VolumeScope.MULTI:
        text = f"{node_id} writes to volume {id} with task {task.id}, and {other_id} does with {second.id}"
    elif mode.sharing is VolumeSharing.NONE:
        text = f"tasks {task.id} and {second.id} have volume {id}, which no two tasks may share"
    elif mode.sharing is VolumeSharing.ONE_WRITER and _writes(task, id) and _writes(second, id):
        text = f"tasks {task.id} and {second.id} write to volume {id}, which has one writer"
    else:
        return
    yield InvariantViolation("volume", text, (volume, task, second))


def shared_volumes(volume: Volume, users: Iterable[Task]) -> Iterator[InvariantViolation]:
    """Yield the pairs of running tasks that cannot share the volume."""
    for one, other in combinations(users, 2):
        yield from shared_volume(volume, (one.node_id, one), (other.node_id, other))


def volumes_of(task: Task) -> set[str]:
    """Return the ids of the cluster volumes that the task has."""
    return {one.id for one in task.volumes}


def _writes(task: Task, id: str) -> bool:
    """Return whether the task mounts the volume at a place where it may write."""
    container = task.spec.container_spec
    targets = {one.target for one in task.volumes if one.id == id}
    mounts = container.mounts if container is not None else ()
    return any(one.target in targets and not one.read_only for one in mounts)
