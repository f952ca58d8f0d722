"""What each node has left, kept up to date commit by commit.

A task holds its reservation from the moment a node is chosen until it is seen to have ended: a retired task that
still runs still holds its memory and its ports.  So a node is never over-committed, and because everything is
derived from the store, a new leader arrives at the same figures.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import msgspec

from skep.manager.resources import GenericStock, reservations_of
from skep.manager.scheduler.requirements import HostPort, Requirements
from skep.model.ids import NodeId, ServiceId, TaskId
from skep.model.node import Node
from skep.model.service import GenericResource
from skep.model.task import Task, TaskState

FAILURE_MEMORY_S = 300.0
"""How long a failure speaks against its node (swarmkit's monitorFailures)."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What one task holds on its node."""

    node_id: NodeId
    service_id: ServiceId
    nano_cpus: int
    memory_bytes: int
    generic: tuple[GenericResource, ...]
    host_ports: tuple[HostPort, ...]
    is_active: bool
    """Whether it counts as a copy of its service here; a task that is being stopped does not."""


class Account:
    """One node and what is left of it."""

    def __init__(self, node: Node, order: int) -> None:
        self.node = node
        self.order = order
        """Breaks ties: nodes that joined earlier come first."""
        self.active = 0
        """Tasks meant to run here, of all services."""
        self.host_ports: Counter[HostPort] = Counter()
        self._set_resources(node)

    def update(self, node: Node, held: Iterable[Usage]) -> None:
        """The node described itself anew; ``held``: what its tasks hold."""
        self._set_resources(node)
        for usage in held:
            self._take(usage)
        self.node = node

    def add(self, usage: Usage) -> None:
        """A task takes its part."""
        self._take(usage)
        self.host_ports.update(usage.host_ports)
        self.active += usage.is_active

    def remove(self, usage: Usage) -> None:
        """A task gives its part back."""
        self.free_nano_cpus += usage.nano_cpus
        self.free_memory_bytes += usage.memory_bytes
        self.generic.give_back(usage.generic)
        self.host_ports.subtract(usage.host_ports)
        self.active -= usage.is_active

    def _take(self, usage: Usage) -> None:
        self.free_nano_cpus -= usage.nano_cpus
        self.free_memory_bytes -= usage.memory_bytes
        self.generic.take(usage.generic)

    def _set_resources(self, node: Node) -> None:
        resources = node.description.resources
        self.free_nano_cpus = resources.nano_cpus
        self.free_memory_bytes = resources.memory_bytes
        self.generic = GenericStock(resources.generic_resources)


class Accounting:
    """All nodes, found by how many tasks they have and by which services they serve."""

    def __init__(self) -> None:
        self.accounts: dict[NodeId, Account] = {}
        self._usages: dict[NodeId, dict[TaskId, Usage]] = {}
        self._node_of: dict[TaskId, NodeId] = {}
        self._copies: dict[ServiceId, Counter[NodeId]] = {}
        self._by_load: dict[int, dict[NodeId, None]] = {}
        self._failures: dict[tuple[ServiceId, int], dict[NodeId, list[float]]] = {}
        self._joined = 0

    # -- what is there -----------------------------------------------------------------------------------------

    def in_order_of_load(self) -> Iterator[Account]:
        """Accounts by number of tasks, fewest first.  A node that gets tasks meanwhile comes again, later."""
        load = -1
        while later := [bucket for bucket in self._by_load if bucket > load]:
            load = min(later)
            for node_id in list(self._by_load[load]):
                account = self.accounts.get(node_id)
                if account is not None and account.active == load:
                    yield account

    def copies(self, service_id: ServiceId) -> Counter[NodeId]:
        """How many tasks of the service are meant to run on each node.  Not to be changed."""
        return self._copies.get(service_id, Counter())

    def failures(self, wish: Requirements, now: float) -> dict[NodeId, int]:
        """How often tasks like these failed lately, by node (``now``: the clock of ``note_failure``)."""
        stamps = self._failures.get((wish.service_id, wish.version), {})
        counts = {
            node_id: sum(1 for at in times if now - at <= FAILURE_MEMORY_S)
            for node_id, times in stamps.items()
        }
        return {node_id: count for node_id, count in counts.items() if count}

    def holds(self, task_id: TaskId) -> bool:
        """Whether the task takes part of a node."""
        return task_id in self._node_of

    # -- what happened -------------------------------------------------------------------------------------------

    def set_node(self, node: Node) -> None:
        """A node appeared or changed."""
        account = self.accounts.get(node.id)
        held = self._usages.setdefault(node.id, {})
        if account is None:
            self._joined += 1
            account = self.accounts[node.id] = Account(node, self._joined)
            for usage in held.values():
                account.add(usage)
            self._by_load.setdefault(account.active, {})[node.id] = None
        else:
            account.update(node, held.values())

    def remove_node(self, node_id: NodeId) -> None:
        """A node left the cluster.  What its tasks hold is remembered in case it comes back before they end."""
        account = self.accounts.pop(node_id, None)
        if account is not None:
            self._leave_load(node_id, account.active)

    def add(self, task: Task, host_ports: tuple[HostPort, ...]) -> None:
        """``task`` takes its part of its node (again, if it changed)."""
        usage = _usage(task, host_ports)
        if self._usages.get(task.node_id, {}).get(task.id) == usage:
            return
        self.remove(task.id)
        self._usages.setdefault(task.node_id, {})[task.id] = usage
        self._node_of[task.id] = task.node_id
        if usage.is_active:
            self._copies.setdefault(task.service_id, Counter())[task.node_id] += 1
        account = self.accounts.get(task.node_id)
        if account is not None:
            load = account.active
            account.add(usage)
            self._move_load(task.node_id, load, account.active)

    def remove(self, task_id: TaskId) -> bool:
        """The task has ended or is gone; whether it had held anything."""
        node_id = self._node_of.pop(task_id, None)
        if node_id is None:
            return False
        usage = self._usages[node_id].pop(task_id)
        if usage.is_active:
            copies = self._copies[usage.service_id]
            copies[node_id] -= 1
            if not copies[node_id]:
                del copies[node_id]
            if not copies:
                del self._copies[usage.service_id]
        account = self.accounts.get(node_id)
        if account is not None:
            load = account.active
            account.remove(usage)
            self._move_load(node_id, load, account.active)
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

    def _move_load(self, node_id: NodeId, before: int, after: int) -> None:
        if before != after:
            self._leave_load(node_id, before)
            self._by_load.setdefault(after, {})[node_id] = None

    def _leave_load(self, node_id: NodeId, load: int) -> None:
        bucket = self._by_load[load]
        del bucket[node_id]
        if not bucket:
            del self._by_load[load]


def holds_resources(task: Task) -> bool:
    """Whether a task occupies its node: from its assignment until it is seen to have ended."""
    return bool(task.node_id) and TaskState.ASSIGNED <= task.status.state <= TaskState.RUNNING


def _usage(task: Task, host_ports: tuple[HostPort, ...]) -> Usage:
    reservations = reservations_of(task.spec)
    return Usage(
        node_id=task.node_id,
        service_id=task.service_id,
        nano_cpus=reservations.nano_cpus,
        memory_bytes=reservations.memory_bytes,
        generic=task.generic_resources,
        host_ports=host_ports,
        is_active=task.is_wanted,
    )
