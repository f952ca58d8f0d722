"""What each node has left, kept up to date commit by commit.

A task holds its reservation from the moment a node is chosen until it is seen to have ended: a retired task that
still runs still holds its memory and its ports.  So a node is never over-committed, and because everything is
derived from the store, a new leader arrives at the same figures.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import takewhile

import msgspec

from skep.manager.resources import GenericStock, reservations_of
from skep.manager.scheduler.load import MeanLoad
from skep.manager.scheduler.requirements import HostPort, Requirements, host_ports
from skep.model.ids import NodeId, ServiceId, TaskId
from skep.model.node import Node
from skep.model.service import GenericResource, TaskSpec
from skep.model.task import Task, TaskState
from skep.store.interface import View
from skep.store.kinds import spec_of

_ASSIGNED, _RUNNING = TaskState.ASSIGNED.number, TaskState.RUNNING.number
_NO_COPIES: Counter[NodeId] = Counter()

USAGES_MAX = 50_000
"""Usages remembered before all are forgotten: of a hundred bytes each."""

FAILURE_MEMORY_S = 300.0
"""How long a failure speaks against its node (swarmkit's monitorFailures)."""


class Usage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a task holds on its node: tasks of one version of a service hold the same."""

    service_id: ServiceId
    nano_cpus: int
    memory_bytes: int
    generic: tuple[GenericResource, ...]
    host_ports: tuple[HostPort, ...]
    is_active: bool
    """Whether it counts as a copy of its service here; a task that is being stopped does not."""


class Account:
    """One node and what is left of it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.active = 0
        """Tasks meant to run here, of all services."""
        self.load = 0.0
        """The share of the node in use as it measures it itself; of one that does not, the mean of all that do."""
        self.changes = 0
        """Grows with all that may move the node in an order of preference."""
        self.host_ports: Counter[HostPort] = Counter()
        self._set_resources(node)

    def update(self, node: Node, held: Iterable[Usage]) -> None:
        """Count anew what is free: of ``node`` as it describes itself now, when its tasks hold ``held``."""
        self._set_resources(node)
        for usage in held:
            self._take(usage)
        self.node = node
        self.changes += 1

    def set_load(self, load: float) -> None:
        """See ``load``."""
        self.load = load
        self.changes += 1

    def add(self, usage: Usage) -> None:
        """A task takes its part."""
        self._take(usage)
        if usage.host_ports:
            self.host_ports.update(usage.host_ports)
        self.active += usage.is_active
        self.changes += 1

    def add_all(self, usages: Iterable[Usage]) -> None:
        """Tasks take their parts.  Of a new leader's 200,000 tasks this is a third of the time that ``add`` takes."""
        nano_cpus = memory_bytes = active = 0
        for usage in usages:
            nano_cpus += usage.nano_cpus
            memory_bytes += usage.memory_bytes
            active += usage.is_active
            if usage.generic:
                self.generic.take(usage.generic)
            if usage.host_ports:
                self.host_ports.update(usage.host_ports)
        self.free_nano_cpus -= nano_cpus
        self.free_memory_bytes -= memory_bytes
        self.active += active
        self.changes += 1

    def remove(self, usage: Usage) -> None:
        """A task gives its part back; generic resources are given back by ``update``."""
        self.free_nano_cpus += usage.nano_cpus
        self.free_memory_bytes += usage.memory_bytes
        if usage.host_ports:
            self.host_ports.subtract(usage.host_ports)
        self.active -= usage.is_active
        self.changes += 1

    def _take(self, usage: Usage) -> None:
        self.free_nano_cpus -= usage.nano_cpus
        self.free_memory_bytes -= usage.memory_bytes
        if usage.generic:
            self.generic.take(usage.generic)

    def _set_resources(self, node: Node) -> None:
        resources = node.description.resources
        self.free_nano_cpus = resources.nano_cpus
        self.free_memory_bytes = resources.memory_bytes
        self.generic = GenericStock(resources.generic_resources)


class Accounting:
    """All nodes, and which services they serve."""

    def __init__(self) -> None:
        self.accounts: dict[NodeId, Account] = {}
        self._usages: dict[NodeId, dict[TaskId, Usage]] = {}
        self._node_of: dict[TaskId, NodeId] = {}
        self._copies: dict[ServiceId, Counter[NodeId]] = {}
        self._changed: dict[NodeId, int] = {}
        """Node -> number of its latest event, in order of these numbers."""
        self._changes = 0
        self._failures: dict[tuple[ServiceId, int], dict[NodeId, list[float]]] = {}
        self._loads = MeanLoad()

    # -- what is there -----------------------------------------------------------------------------------------

    @property
    def changes(self) -> int:
        """Grows with each event that may make a node a better choice: it changed, or a task gave something back."""
        return self._changes

    def changed_since(self, changes: int) -> list[NodeId]:
        """The nodes of the events after ``changes``, each once, the latest first."""
        return [
            id for id, number in takewhile(lambda item: item[1] > changes, reversed(self._changed.items()))
        ]

    def copies(self, service_id: ServiceId) -> Counter[NodeId]:
        """How many tasks of the service are meant to run on each node.  Not to be changed.

        Tasks without a service are copies of nothing.
        """
        return self._copies.get(service_id, _NO_COPIES)

    def failures(self, wish: Requirements, now: float) -> dict[NodeId, int]:
        """How often tasks like these failed lately, by node (``now``: the clock of ``note_failure``)."""
        stamps = self._failures.get((wish.service_id, wish.version))
        if stamps is None:
            return {}
        counts = {
            node_id: sum(1 for at in times if now - at <= FAILURE_MEMORY_S)
            for node_id, times in stamps.items()
        }
        return {node_id: count for node_id, count in counts.items() if count}

    def node_of(self, task_id: TaskId) -> NodeId | None:
        """The node of which the task takes part, if it does."""
        return self._node_of.get(task_id)

    # -- what happened -------------------------------------------------------------------------------------------

    def set_node(self, node: Node) -> None:
        """A node appeared or changed."""
        account = self.accounts.get(node.id)
        held = self._usages.setdefault(node.id, {})
        if account is None:
            account = self.accounts[node.id] = Account(node)
            account.add_all(held.values())
        else:
            account.update(node, held.values())
        self._set_load(node.id, node.load)
        self._note_change(node.id)

    def remove_node(self, node_id: NodeId) -> None:
        """A node left the cluster.  What its tasks hold is remembered in case it comes back before they end."""
        if self.accounts.pop(node_id, None) is not None:
            self._set_load(node_id, None)
            self._note_change(node_id)

    def add(self, task: Task, host_ports: tuple[HostPort, ...]) -> None:
        """``task`` takes its part of its node (again, if it changed)."""
        self.book(task.id, task.node_id, usage_of(task, host_ports))

    def book(self, task_id: TaskId, node_id: NodeId, usage: Usage) -> None:
        """A task takes ``usage`` of a node, in place of what it had."""
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
            copies[node_id] = copies.get(node_id, 0) + 1  # what it lacks, a Counter finds slowly
        account = self.accounts.get(node_id)
        if account is not None:
            account.add(usage)

    def remove(self, task_id: TaskId) -> bool:
        """The task has ended or is gone; whether it had held anything."""
        node_id = self._node_of.pop(task_id, None)
        if node_id is None:
            return False
        usage = self._usages[node_id].pop(task_id)
        if usage.is_active and usage.service_id:
            copies = self._copies[usage.service_id]
            copies[node_id] -= 1
            if not copies[node_id]:
                del copies[node_id]
            if not copies:
                del self._copies[usage.service_id]
        account = self.accounts.get(node_id)
        if account is not None:
            account.remove(usage)
            if usage.generic:
                # The node may no longer have what is given back: what is free is counted anew.
                account.update(account.node, self._usages[node_id].values())
            self._note_change(node_id)
        elif not self._usages[node_id]:
            del self._usages[node_id]
        return True

    def note_failure(self, task: Task, now: float) -> None:
        """``task`` failed or was rejected on its node."""
        key = (task.service_id, task.spec_version.index if task.spec_version else 0)
        times = self._failures.setdefault(key, {}).setdefault(task.node_id, [])
        times.append(now)
        while now - times[0] > FAILURE_MEMORY_S:
            times.pop(0)

    def forget_service(self, service_id: ServiceId) -> None:
        """The service is gone: its failures no longer matter."""
        for key in [key for key in self._failures if key[0] == service_id]:
            del self._failures[key]

    # -- inside ----------------------------------------------------------------------------------------------------

    def _set_load(self, node_id: NodeId, load: float | None) -> None:
        """A node says how busy it is; that moves the mean, which stands for all that say nothing."""
        neutral = self._loads.mean
        self._loads.set(node_id, load)
        if self._loads.mean != neutral:
            for id, account in self.accounts.items():
                if account.node.load is None:
                    account.set_load(self._loads.mean)
                    self._note_change(id)
        if (own := self.accounts.get(node_id)) is not None:
            own.set_load(load if load is not None else self._loads.mean)

    def _note_change(self, node_id: NodeId) -> None:
        self._changes += 1
        self._changed.pop(node_id, None)
        self._changed[node_id] = self._changes


def holds_resources(task: Task) -> bool:
    """Whether a task occupies its node: from its assignment until it is seen to have ended."""
    return bool(task.node_id) and _ASSIGNED <= task.status.state.number <= _RUNNING


class Usages:
    """``usage_of``, remembered: tasks of one version share it, and a new leader asks for those of all tasks."""

    def __init__(self) -> None:
        self._known: dict[tuple[ServiceId, int, int], tuple[TaskSpec, Usage]] = {}

    def of(self, task: Task, view: View) -> Usage:
        """What ``task`` holds."""
        version = task.spec_version
        if version is None or task.generic_resources:
            return usage_of(task, host_ports(spec_of(view, task)))
        key = task.service_id, version.index, task.desired_state.number
        known = self._known.get(key)
        if known is None or known[0] is not task.spec:
            if len(self._known) >= USAGES_MAX:
                self._known.clear()
            known = self._known[key] = task.spec, usage_of(task, host_ports(spec_of(view, task)))
        return known[1]


def usage_of(task: Task, host_ports: tuple[HostPort, ...]) -> Usage:
    """What a task holds that opens ``host_ports`` on its node."""
    reservations = reservations_of(task.spec)
    return Usage(
        service_id=task.service_id,
        nano_cpus=reservations.nano_cpus,
        memory_bytes=reservations.memory_bytes,
        generic=task.generic_resources,
        host_ports=host_ports,
        is_active=task.is_wanted,
    )
