"""Rules on tasks and services that a single commit can violate."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from math import inf

from sim.invariants.nodes.affinity import forbidden
from sim.invariants.nodes.disks import has_full_disk
from sim.invariants.nodes.placement import constraints_of, host_ports, meets, reservations
from sim.world.committed import Change
from skep.manager.orchestrator.slots import age
from skep.manager.verify.rules import InvariantViolation
from skep.manager.verify.tasks import (
    crowded_job,
    crowded_slot,
    holds,
    overcommitted,
    rollout_configs,
    shared_name,
    too_many_copies,
    went_back,
)
from skep.model.node import Availability, Node, NodeState
from skep.model.options.affinity import has_affinities
from skep.model.options.labels import VolumeAffinity, volume_affinity
from skep.model.service import Resources, Service, UpdateOrder
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId, TaskId, VolumeId
from skep.model.volume import Volume, VolumeScope
from skep.store.interface import Created, Updated, View
from skep.store.transactions.updates import DEADLINE_S


def tasks_move_forward(change: Change, view: View) -> Iterable[str]:
    """Check that states only move forward, and that a task is assigned once and keeps its slot."""
    for event in change.events:
        match event:
            case Updated(Task() as old, Task() as new):
                yield from _texts(went_back(old, new))


def slots_are_filled_once(change: Change, view: View) -> Iterable[str]:
    """Check that a slot has one task with desired state running, and at most one in reserve.  For jobs, in each
    iteration.
    """
    for event in change.events:
        match event:
            case Updated(Task() as before, Task() as task) if before.desired_state is task.desired_state:
                continue
            case Created(Task() as task) | Updated(_, Task() as task) if task.is_wanted:
                slot = view.find(Task, slot=f"{task.service_id}/{task.slot or task.node_id}")
                slot = [one for one in slot if one.is_wanted and one.job_iteration == task.job_iteration]
                service = view.lookup(Service, task.service_id)
                yield from _texts(crowded_slot(slot, service, view))


def jobs_keep_within_bounds(change: Change, view: View) -> Iterable[str]:
    """Check that at most ``MaxConcurrent`` tasks of a job are active."""
    for event in change.events:
        match event:
            case Created(Task() as task) if task.job_iteration is not None:
                service = view.lookup(Service, task.service_id)
                if service is None or service.spec_version != task.spec_version:
                    continue
                tasks = view.find(Task, service_id=service.id)
                run = [one for one in tasks if one.job_iteration == task.job_iteration]
                yield from _texts(crowded_job(service, run))


def names_are_unique(change: Change, view: View) -> Iterable[str]:
    """Check that no two services that are not removed have the same name."""
    for event in change.events:
        match event:
            case Created(Service() as service) | Updated(_, Service() as service):
                yield from _texts(shared_name(service, view))


def nodes_are_not_overcommitted(change: Change, view: View) -> Iterable[str]:
    """Check that no node has more resources reserved than it has, or more replicas of a service than allowed."""
    for event in change.events:
        match event:
            case Updated(Task() as old, Task() as new) if new.node_id != old.node_id:
                node = view.lookup(Node, new.node_id)
                if node is None:
                    continue
                here = [one for one in view.find(Task, node_id=node.id) if holds(one)]
                copies = [one for one in here if one.service_id == new.service_id and one.is_wanted]
                placement = new.spec.placement
                yield from _texts(overcommitted(node, here))
                if placement is not None:
                    yield from _texts(too_many_copies(node, copies, placement.max_replicas))


def _texts(violations: Iterable[InvariantViolation]) -> Iterable[str]:
    return (one.text for one in violations)


class TasksAreSpread:
    """A task is assigned to a node with the fewest tasks of its service, while no node changes.

    A node may have one more task than the minimum.  On other nodes, tasks that have ended within ``KNOWN_S`` count,
    because the leader's replica may still show them as running.  On the task's own node, old tasks of slots with a
    newer task do not count, because they are retired when the newer tasks run.  The scheduler ignores old tasks of
    slots that it fills at the same time.  Nodes that a manager cannot read (``unreadable``) are not compared.

    For a task with cluster volumes, only nodes that could have had the same volumes are compared.  A node that was
    releasing a volume within ``KNOWN_S`` cannot have it.  A release may take minutes and cannot be cancelled, so the
    scheduler does not wait for it.
    """

    KNOWN_S = DEADLINE_S
    QUIET_S = 5.0
    SLACK = 1

    def __init__(self, unreadable: Callable[[], Collection[NodeId]]) -> None:
        self._unreadable = unreadable
        self._changed_at = 0.0
        self._ended_at: dict[TaskId, float] = {}
        self._failed: set[ServiceId] = set()
        """Services with a failed task.  The scheduler avoids its node even after the task's record is deleted."""
        self._released_at: dict[tuple[str, NodeId], float] = {}
        """Last time at which a node was releasing a volume."""

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Updated(_, Task() as ended) if ended.status.state.is_terminal:
                    self._ended_at.setdefault(ended.id, change.time_s)
                    if ended.status.state in (TaskState.FAILED, TaskState.REJECTED):
                        self._failed.add(ended.service_id)
                case Updated(Volume() as earlier, Volume() as later):
                    for status in (*earlier.publish_status, *later.publish_status):
                        if not status.takes_tasks:
                            self._released_at[later.id, status.node_id] = change.time_s
                case Created(Node()):
                    self._changed_at = change.time_s
                case Updated(Node() as before, Node() as after) if (
                    before.spec != after.spec
                    or before.status.state != after.status.state
                    or has_full_disk(before) != has_full_disk(after)
                ):
                    self._changed_at = change.time_s
                case Updated(Task() as old, Task() as new) if not old.node_id and new.node_id:
                    if change.time_s - self._changed_at > self.QUIET_S:
                        yield from self._violations(view, new, change.time_s)

    def _violations(self, view: View, task: Task, now: float) -> Iterable[str]:
        service = view.lookup(Service, task.service_id)
        if (
            reservations(task) != Resources()
            or has_placement(task)
            or service is None
            or has_affinities(service.spec.labels)
            or host_ports(service.spec)
            or _may_return_to_data(task, service)
        ):
            return  # the scheduler considers more than the spread
        others = [one for one in view.find(Task, service_id=task.service_id) if one.id != task.id]
        if task.service_id in self._failed:
            return  # nodes where tasks failed are avoided
        staying = [one for one in others if one.is_active and one.slot != task.slot]
        newest = {one.slot: one.id for one in sorted(staying, key=age)}
        known_until = now - self.KNOWN_S
        unseen = [one for one in others if one.is_wanted and self._ended_at.get(one.id, -inf) > known_until]
        copies = Counter(one.node_id for one in (*staying, *unseen) if one.node_id)
        lasting = Counter(one.node_id for one in staying if newest[one.slot] == one.id)
        unreadable = self._unreadable()
        nodes = [
            node.id
            for node in view.find(Node)
            if _takes_tasks(node)
            and not has_full_disk(node)
            and node.id not in unreadable
            and not any(forbidden(task, node, service, view))
            and all(self._can_have(view, VolumeId(one.id), node, now) for one in task.volumes)
        ]
        if not nodes:
            return
        least = min(copies[id] for id in nodes)
        if lasting[task.node_id] > least + self.SLACK:
            yield (
                f"task {task.id} went to {task.node_id} with {lasting[task.node_id]} others of {task.service_id}, "
                f"while a node has {least}"
            )

    def _can_have(self, view: View, id: VolumeId, node: Node, now: float) -> bool:
        """Return whether the node could have had the volume.  Drivers and volumes with a limit count as full."""
        volume = view.lookup(Volume, id)
        if volume is None or volume.spec.group or volume.spec.access_mode.scope is VolumeScope.SINGLE:
            return False
        driver = volume.spec.driver.name
        if not any(
            one.plugin_name == driver and not one.max_volumes_per_node for one in node.description.csi_info
        ):
            return False
        is_released = all(one.takes_tasks for one in volume.publish_status if one.node_id == node.id)
        return is_released and now - self._released_at.get((id, node.id), -inf) > self.KNOWN_S


class UpdatesKeepServing:
    """With start-first, the only running task of a slot is not retired before its replacement runs.

    Tasks are exempt that have run for less than ``KNOWN_S``, or whose node has returned within that time, because the
    leader's replica may not show them yet.
    """

    KNOWN_S = DEADLINE_S

    def __init__(self) -> None:
        self._running_at: dict[TaskId, float] = {}
        self._back_at: dict[NodeId, float] = {}

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        # Before the next loop, because a commit with both has its tasks before its nodes.
        for event in change.events:
            match event:
                case Updated(Node() as before, Node() as after) if not _takes_tasks(before):
                    self._back_at[after.id] = change.time_s
        for event in change.events:
            match event:
                case Updated(Task() as old, Task() as new) if old.is_wanted and not new.is_wanted:
                    known_at = max(self._running_at.get(new.id, -inf), self._back_at.get(new.node_id, -inf))
                    if change.time_s - known_at > self.KNOWN_S:
                        yield from self._violations(view, new)
                case Updated(Task() as old, Task() as new) if new.status.state is TaskState.RUNNING:
                    self._running_at.setdefault(new.id, change.time_s)

    def _violations(self, view: View, new: Task) -> Iterable[str]:
        service = view.lookup(Service, new.service_id)
        node = view.lookup(Node, new.node_id)
        if service is None or service.removed_at is not None or not always_starts_first(service):
            return
        if new.desired_state is TaskState.REMOVE:
            return  # the whole slot is removed, one task after the other
        if new.preemption is not None:
            return  # a task of a higher priority needs its resources
        if new.status.state is not TaskState.RUNNING or node is None or not _takes_tasks(node):
            return
        slot = view.find(Task, slot=f"{new.service_id}/{new.slot or new.node_id}")
        successors = [one for one in slot if one.is_wanted]
        differs = any(successor.spec != new.spec for successor in successors)
        refused = any(
            successor.status.state is TaskState.PENDING and successor.status.err for successor in successors
        )
        if refused or not meets(constraints_of(service.spec), node):
            return  # its replacement needs its resources, or its node no longer meets the constraints
        if (
            successors
            and differs
            and not any(successor.status.state is TaskState.RUNNING for successor in successors)
        ):
            yield f"task {new.id} was stopped before {[successor.id for successor in successors]} ran"


def always_starts_first(service: Service) -> bool:
    """Return whether every update and rollback to or from the current spec starts the new task first."""
    return all(config.order is UpdateOrder.START_FIRST for config in rollout_configs(service))


def _takes_tasks(node: Node) -> bool:
    return node.status.state is NodeState.READY and node.spec.availability is Availability.ACTIVE


def _may_return_to_data(task: Task, service: Service) -> bool:
    """Return whether the task's slot may have data on a node, because its tasks then ignore the spread."""
    container = task.spec.container_spec
    has_local = container is not None and any(one.type == "volume" for one in container.mounts)
    return has_local and volume_affinity(service.spec.labels) is not VolumeAffinity.NONE


def has_placement(task: Task) -> bool:
    placement = task.spec.placement
    return placement is not None and bool(
        placement.constraints or placement.preferences or placement.max_replicas
    )
