"""Free resources of each node, updated with each commit.

A task keeps its reservation from the moment when a node is chosen until its end is reported, because a retired task
that still runs occupies memory and ports.  So a node is never overcommitted.  Everything is derived from the store, so
a new leader computes the same figures.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import TypeVar

from msgspec.structs import replace

from skep.manager.scheduler.nodes.affinity import AffinityIndex, Domains, has_same_labels
from skep.manager.scheduler.nodes.load import MeanLoad
from skep.manager.scheduler.nodes.requirements import Requirements
from skep.manager.scheduler.nodes.volumes import VolumeUses
from skep.manager.services.resources import GenericStock
from skep.model.needs import ClusterMount, Holdings, HostPort, capacity_of, holds_of, host_ports
from skep.model.networks.data_planes import is_docker_node
from skep.model.networks.used_ports import used_ports_of
from skep.model.node import Node
from skep.model.node_reports.conditions import disk_pressure
from skep.model.permissions.rights import Right, allowed_by
from skep.model.service import TaskSpec
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId, TaskId, VolumeId
from skep.model.volume import Volume
from skep.store.interface import View
from skep.store.kinds import has_unknown_spec, spec_of

K = TypeVar("K")

_ASSIGNED, _RUNNING = TaskState.ASSIGNED.number, TaskState.RUNNING.number
_NO_COPIES: Counter[NodeId] = Counter()

USAGES_MAX = 50_000
"""Maximum entries of the cache, which is cleared when full.  An entry takes a hundred bytes."""

FAILURE_MEMORY_S = 300.0
"""Seconds for which a task's failure counts against its node (swarmkit's monitorFailures)."""


class Account:
    """A node and its free resources."""

    def __init__(self, node: Node, volumes: VolumeUses, domains: Domains) -> None:
        self.node = node
        self.domains = domains
        """The tasks of all services by domain, shared by the accounts."""
        self.volumes = volumes
        """All cluster volumes, shared by the accounts."""
        self.active = 0
        """Wanted tasks on the node, of all services."""
        self.unknown = 0
        """Tasks on the node whose usage is unknown."""
        self.load = 0.0
        """Measured load as a share of the node, or the mean of the other nodes if it does not report its load."""
        self.changes = 0
        """Incremented with each change that may affect the node's rank."""
        self.host_ports: Counter[HostPort] = Counter()
        self._set_resources(node)

    def update(self, node: Node, held: Iterable[Holdings]) -> None:
        """Recalculate the free resources of ``node`` with the reservations ``held`` by its tasks."""
        self._set_resources(node)
        for usage in held:
            self._take(usage)
        self.node = node
        self.changes += 1

    def set_load(self, load: float) -> None:
        """Set the node's load."""
        self.load = load
        self.changes += 1

    def add(self, usage: Holdings) -> None:
        """Subtract a task's reservation."""
        self._take(usage)
        if usage.host_ports:
            self.host_ports.update(usage.host_ports)
        self.active += usage.is_active
        self.unknown += usage.is_unknown
        self.changes += 1

    def add_all(self, usages: Iterable[Holdings]) -> None:
        """Do the same as ``add`` for many tasks, in a third of the time.  A new leader adds up to 200,000 tasks."""
        nano_cpus = memory_bytes = active = 0
        for usage in usages:
            nano_cpus += usage.nano_cpus
            memory_bytes += usage.memory_bytes
            active += usage.is_active
            self.unknown += usage.is_unknown
            if usage.generic:
                self.generic.take(usage.generic)
            if usage.host_ports:
                self.host_ports.update(usage.host_ports)
        self.free_nano_cpus -= nano_cpus
        self.free_memory_bytes -= memory_bytes
        self.active += active
        self.changes += 1

    def remove(self, usage: Holdings) -> None:
        """Release a task's reservation, except generic resources, which ``update`` recalculates."""
        self.free_nano_cpus += usage.nano_cpus
        self.free_memory_bytes += usage.memory_bytes
        if usage.host_ports:
            self.host_ports.subtract(usage.host_ports)
        self.active -= usage.is_active
        self.unknown -= usage.is_unknown
        self.changes += 1

    def _take(self, usage: Holdings) -> None:
        self.free_nano_cpus -= usage.nano_cpus
        self.free_memory_bytes -= usage.memory_bytes
        if usage.generic:
            self.generic.take(usage.generic)

    def _set_resources(self, node: Node) -> None:
        resources = self.capacity = capacity_of(node)
        self.free_nano_cpus = resources.nano_cpus
        self.free_memory_bytes = resources.memory_bytes
        self.generic = GenericStock(resources.generic_resources)
        self.used_ports = used_ports_of(node)
        """Ports used by plain containers and other programs of the machine, not by tasks."""

    def has_driver(self, names: Collection[str]) -> bool:
        """Return whether the node has one of these cluster volume drivers."""
        return any(one.plugin_name in names for one in self.node.description.csi_info)

    @property
    def given_rights(self) -> frozenset[Right]:
        """Rights over the machine that the node allows its tasks.

        A Docker Engine allows none, whatever its labels say, because it would run the task without them.
        """
        return frozenset() if is_docker_node(self.node) else allowed_by(self.node.description.engine.labels)

    def has_port(self, port: HostPort) -> bool:
        """Return whether a task, or anything else on the node, uses the port."""
        return bool(self.host_ports[port]) or port in self.used_ports


class Accounting:
    """All nodes, and how many tasks of each service they have."""

    def __init__(self) -> None:
        self.accounts: dict[NodeId, Account] = {}
        self.full_disks: set[NodeId] = set()
        """Nodes that get no new tasks because their disk is full."""
        self.volumes = VolumeUses()
        self._usages: dict[NodeId, dict[TaskId, Holdings]] = {}
        self._node_of: dict[TaskId, NodeId] = {}
        self._copies: dict[ServiceId, Counter[NodeId]] = {}
        self._changed: dict[NodeId, int] = {}
        """Number of the last event by node, in order of these numbers."""
        self._freed: dict[VolumeId, int] = {}
        """Number of the last event that may have made a volume available to any node, by volume, in order of these
        numbers.
        """
        self._changes = 0
        self._failures: dict[tuple[ServiceId, int], dict[NodeId, list[float]]] = {}
        self._loads = MeanLoad()
        self.affinities = AffinityIndex()
        self.domains = Domains(self.accounts, self._copies, lambda: self._changes)

    # -- queries ------------------------------------------------------------------------------------------------

    @property
    def changes(self) -> int:
        """Number of events that may have improved a node, because it changed or a task released something."""
        return self._changes

    def changed_since(self, changes: int, mounts: Sequence[ClusterMount] = ()) -> Collection[NodeId]:
        """Return the nodes that events after ``changes`` concern, each once, the latest first.

        Args:
            changes: An earlier value of the property ``changes``.
            mounts: Nodes on which one of these volumes may have become available since then are added.
        """
        nodes = _since(changes, self._changed)
        if not mounts or not (drivers := self.volumes.drivers_of(_since(changes, self._freed), mounts)):
            return nodes
        return dict.fromkeys((*nodes, *(id for id, one in self.accounts.items() if one.has_driver(drivers))))

    def copies(self, service_id: ServiceId) -> Counter[NodeId]:
        """Return the number of the service's wanted tasks per node.  Do not modify it.

        Tasks without a service do not count.
        """
        return self._copies.get(service_id, _NO_COPIES)

    def failures(self, requirements: Requirements, now: float) -> dict[NodeId, int]:
        """Return the recent failures of tasks with these requirements, by node.

        ``now`` is on the clock of ``record_failure``.
        """
        stamps = self._failures.get((requirements.service_id, requirements.version))
        if stamps is None:
            return {}
        counts = {
            node_id: sum(1 for at in times if now - at <= FAILURE_MEMORY_S)
            for node_id, times in stamps.items()
        }
        return {node_id: count for node_id, count in counts.items() if count}

    def held(self, node_id: NodeId) -> Mapping[TaskId, Holdings]:
        """Return the reservations of a node's tasks.  Do not modify them."""
        return self._usages.get(node_id, {})

    def node_of(self, task_id: TaskId) -> NodeId | None:
        """Return the node on which the task has a reservation, or None."""
        return self._node_of.get(task_id)

    # -- events -------------------------------------------------------------------------------------------------

    def set_node(self, node: Node) -> None:
        """Update the account of a node that was created or changed."""
        account = self.accounts.get(node.id)
        held = self._usages.setdefault(node.id, {})
        if account is None:
            account = self.accounts[node.id] = Account(node, self.volumes, self.domains)
            account.add_all(held.values())
            self.domains.forget()
        else:
            if self.domains.watched and not has_same_labels(account.node, node):
                self.domains.forget()
            account.update(node, held.values())
        if disk_pressure(node.description):
            self.full_disks.add(node.id)
        else:
            self.full_disks.discard(node.id)
        self._set_load(node.id, node.load)
        self._record_change(node.id)

    def remove_node(self, node_id: NodeId) -> None:
        """Remove a node.  Its tasks' reservations are kept, in case it returns before they end."""
        if self.accounts.pop(node_id, None) is not None:
            self.full_disks.discard(node_id)
            self.domains.forget()
            self._set_load(node_id, None)
            self._record_change(node_id)

    def update_volume(self, id: VolumeId, volume: Volume | None) -> bool:
        """Update a cluster volume, or remove it if ``volume`` is None.  Returns whether its nodes changed."""
        is_freed = False
        if volume is None:
            nodes = self.volumes.remove_volume(id)
            self._freed.pop(id, None)
        else:
            nodes, is_freed = self.volumes.set_volume(volume)
        self._record_volume(nodes, (id,) if is_freed else ())
        return bool(nodes)

    def add(self, task: Task, host_ports: tuple[HostPort, ...]) -> None:
        """Reserve the resources of ``task`` on its node, in place of its earlier reservation."""
        self.reserve(task.id, task.node_id, holds_of(task, host_ports))

    def reserve(self, task_id: TaskId, node_id: NodeId, usage: Holdings) -> None:
        """Reserve ``usage`` on a node for a task, in place of its earlier reservation."""
        if task_id in self._node_of:
            if self._node_of[task_id] == node_id and self._usages[node_id][task_id] == usage:
                return
            self.remove(task_id)
        held = self._usages.get(node_id)
        if held is None:
            held = self._usages[node_id] = {}
        held[task_id] = usage
        self._node_of[task_id] = node_id
        if usage.is_active and usage.service_id:
            copies = self._copies.get(usage.service_id)
            if copies is None:
                copies = self._copies[usage.service_id] = Counter()
            copies[node_id] = (
                copies.get(node_id, 0) + 1
            )  # ``get`` is faster than a Counter's default for missing keys
            if usage.service_id in self.domains.watched:
                self.domains.move(usage.service_id, node_id, 1)
        if usage.volumes:
            self.volumes.hold(task_id, node_id, usage.volumes)
        account = self.accounts.get(node_id)
        if account is not None:
            account.add(usage)

    def remove(self, task_id: TaskId) -> bool:
        """Release the reservation of a task that has ended or was deleted.  Returns whether it had one."""
        node_id = self._node_of.pop(task_id, None)
        if node_id is None:
            return False
        usage = self._usages[node_id].pop(task_id)
        if usage.volumes:
            self._record_volume((), self.volumes.release(task_id, usage.volumes))
        if usage.is_active and usage.service_id:
            copies = self._copies[usage.service_id]
            copies[node_id] -= 1
            if not copies[node_id]:
                del copies[node_id]
            if not copies:
                del self._copies[usage.service_id]
            if usage.service_id in self.domains.watched:
                self.domains.move(usage.service_id, node_id, -1)
        account = self.accounts.get(node_id)
        if account is not None:
            account.remove(usage)
            if usage.generic:
                # The node may no longer have the released resource, so the free resources are recalculated.
                account.update(account.node, self._usages[node_id].values())
            self._record_change(node_id)
        elif not self._usages[node_id]:
            del self._usages[node_id]
        return True

    def record_failure(self, task: Task, now: float) -> None:
        """Record that ``task`` failed or was rejected on its node."""
        key = (task.service_id, task.spec_version.index if task.spec_version else 0)
        times = self._failures.setdefault(key, {}).setdefault(task.node_id, [])
        times.append(now)
        while now - times[0] > FAILURE_MEMORY_S:
            times.pop(0)

    def forget_service(self, service_id: ServiceId) -> None:
        """Drop the failures of a deleted service."""
        for key in [key for key in self._failures if key[0] == service_id]:
            del self._failures[key]

    # -- inside ----------------------------------------------------------------------------------------------------

    def _set_load(self, node_id: NodeId, load: float | None) -> None:
        """Set a node's load, and update the mean, which counts for all nodes that report none."""
        neutral = self._loads.mean
        self._loads.set(node_id, load)
        if self._loads.mean != neutral:
            for id, account in self.accounts.items():
                if account.node.load is None:
                    account.set_load(self._loads.mean)
                    self._record_change(id)
        if (own := self.accounts.get(node_id)) is not None:
            own.set_load(load if load is not None else self._loads.mean)

    def _record_volume(self, nodes: Iterable[NodeId], freed: Iterable[VolumeId]) -> None:
        """Record changed ``nodes``, and ``freed`` volumes that may have become available to any node."""
        for node_id in nodes:
            if node_id in self.accounts:
                self._record_change(node_id)
        for id in freed:
            self._changes += 1
            self._freed.pop(id, None)
            self._freed[id] = self._changes

    def _record_change(self, node_id: NodeId) -> None:
        self._changes += 1
        self._changed.pop(node_id, None)
        self._changed[node_id] = self._changes


def _since(changes: int, numbers: dict[K, int]) -> list[K]:
    """Return the keys with a number larger than ``changes``, the latest first."""
    return [id for id, number in takewhile(lambda item: item[1] > changes, reversed(numbers.items()))]


def holds_resources(task: Task) -> bool:
    """Return whether a task occupies its node: from its assignment until its end is reported."""
    return bool(task.node_id) and _ASSIGNED <= task.status.state.number <= _RUNNING


class HoldingsCache:
    """Cache of ``holds_of``, because tasks of one version share a result, and a new leader needs the usage of every
    task.
    """

    def __init__(self) -> None:
        self._cached: dict[tuple[ServiceId, int, int], tuple[TaskSpec, Holdings]] = {}

    def of(self, task: Task, view: View) -> Holdings:
        """Return the usage of ``task``."""
        version = task.spec_version
        if version is None or task.generic_resources or task.volumes:
            return usage_in(view, task)
        key = task.service_id, version.index, task.desired_state.number
        known = self._cached.get(key)
        if known is None or known[0] is not task.spec:
            if len(self._cached) >= USAGES_MAX:
                self._cached.clear()
            known = self._cached[key] = task.spec, usage_in(view, task)
        return known[1]


def usage_in(view: View, task: Task) -> Holdings:
    """Return the usage of a task as of ``view``."""
    usage = holds_of(task, host_ports(spec_of(view, task)))
    return replace(usage, is_unknown=True) if has_unknown_spec(view, task) else usage
