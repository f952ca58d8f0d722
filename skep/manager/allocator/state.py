"""State of the allocator: what is allocated, who waits for what, and the changes of a network, service or node."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from random import Random
from typing import TypeVar

import structlog
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.manager.allocator.addresses import AddressAllocations, NoAddress
from skep.manager.allocator.allocations import Allocations, node_owner, service_owner
from skep.manager.allocator.attachments import (
    AttachableNetworks,
    AttachedTask,
    NotAttached,
    attachments_for,
    is_new,
    overlays_of,
    spec_or_template,
    virtual_ips_for,
)
from skep.manager.allocator.changes import (
    NETWORK,
    NODE,
    AllocateEndpoint,
    AllocateSubnets,
    AttachNode,
    Change,
    Explain,
    ReleaseTask,
    WriteClaims,
    network_key,
    node_key,
)
from skep.manager.allocator.nodes import is_ready, networks_of_node, node_attachments, occupies_networks
from skep.manager.allocator.ports import endpoint_for
from skep.manager.allocator.subnets import NotAllocated, allocated, is_allocated
from skep.manager.allocator.unreadable_addresses import Unread, check_known
from skep.manager.allocator.waiting import WaitingTasks
from skep.manager.cluster import reserved_ports_of
from skep.manager.control_loops.failures import Failures, for_each_isolated
from skep.manager.control_loops.informer import batches_of
from skep.manager.control_loops.loop_driver import Decision
from skep.manager.control_loops.work_queue import WorkQueue
from skep.model.door.routes import has_routes
from skep.model.door.settings import door_network, is_door
from skep.model.network import Network
from skep.model.networks.data_planes import is_docker_node, is_overlay
from skep.model.networks.routes import differ_in_routes, routes_of, routes_of_all
from skep.model.node import Node
from skep.model.options.labels import priority_of
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.values.ids import NetworkId, ServiceId, TaskId
from skep.store.interface import (
    Commit,
    Created,
    Deleted,
    Event,
    Object,
    Updated,
    View,
)
from skep.store.kinds import UNKNOWN_SPEC, has_unknown_spec

log = structlog.get_logger()

T = TypeVar("T")

ENDPOINTS, TASKS = "endpoints", "tasks"
CLAIMS = "claims of networks"
"""Names of steps, under which a key fails on its own."""


class FullnessWarnings:
    """Logs a warning when a network is nearly full: once, and again if it had free addresses meanwhile."""

    def __init__(self) -> None:
        self._warned: set[NetworkId] = set()

    def check(self, networks: Iterable[Network | None], addresses: AddressAllocations) -> None:
        """Check ``networks`` after addresses in them were allocated."""
        for network in networks:
            if network is None or not is_overlay(network):
                continue
            usage = addresses.usage(network)
            if not usage.is_nearly_full:
                self._warned.discard(network.id)
            elif network.id not in self._warned:
                self._warned.add(network.id)
                log.warning("network nearly full", network=network.spec.name, usage=str(usage))

    def forget(self, id: NetworkId) -> None:
        """Forget a deleted network."""
        self._warned.discard(id)


class AllocatorState:
    """Subnets, addresses and ports in use, and the keys that are due or wait for some.

    The keys of services are their ids.  Networks and nodes have ``network_key`` and ``node_key``.
    """

    def __init__(self, view: Callable[[], View], clock: Clock, random: Random) -> None:
        self._view = view
        self.queue: WorkQueue[str] = WorkQueue(clock, self._priority_of)
        self.failures = Failures(clock, random)
        self.allocations = Allocations()
        self._waiting = WaitingTasks()
        self._unclaimed: set[NetworkId] = set()
        """Networks that were allocated before this term, and are not claimed in it yet."""
        self._unallocated: dict[NetworkId, str] = {}
        """Networks that cannot be allocated, with the reason."""
        self._fullness = FullnessWarnings()
        self._unread: dict[str, set[str]] = {}
        """Owner with unreadable addresses -> keys that wait for one of its networks until it changes."""

    def start(self, snapshot: View) -> Iterator[None]:
        """Load all objects, with pauses.  Commits in between are loaded with their newest state too."""
        self.allocations = Allocations()
        self._waiting = WaitingTasks()
        self._unallocated.clear()
        self._unread.clear()
        self._unclaimed = {one.id for one in snapshot.find(Network) if is_allocated(one)}
        self.queue.add(map(network_key, sorted(self._unclaimed)))
        for kind in (Network, Service, Task, Node):
            for batch in batches_of(self._view, kind):
                for_each_isolated("allocator", batch, self._enter)
                yield
        self._queue_nodes()

    # -- what a commit concerns --------------------------------------------------------------------------------

    def _enter(self, one: Object) -> None:
        """Load an object of the snapshot."""
        if not isinstance(one, Task):
            self._on_event(Created(one))
            return
        if one.networks_attachments:
            self.allocations.enter_task(one)
        self._queue_new_task(one)

    def _priority_of(self, key: str) -> int:
        service = self._view().lookup(Service, ServiceId(key)) if "/" not in key else None
        return priority_of(service.spec.labels) if service is not None else 0

    def on_commit(self, commit: Commit) -> None:
        """Apply the *current* state of each object: an older state would release later allocations."""
        for event in commit.events:
            self._on_event(event)
            if self._unread:
                self.queue.add(sorted(self._unread.pop(_owner_of(event), ())))

    def _on_event(self, event: Event) -> None:
        match event:
            case Created(Service() as service) | Updated(_, Service() as service):
                self._update_service(service.id)
                self.queue.add((service.id,))
            case Deleted(Service() as service):
                self._update_service(service.id)
                self._waiting.forget_service(service.id)
                for what in (ENDPOINTS, TASKS):
                    self.failures.clear(f"{what} of {service.id}")
                self.failures.clear_write_failure(ENDPOINTS, service.id)
            case Created(Task() as task):
                self._update_task(task)
                self._queue_new_task(task)
            case Updated(Task() as old, Task() as task) if _may_hold_addresses(task):
                self._update_task(task)
                if old.node_id != task.node_id:
                    self._queue_node_of(task)
            case Deleted(Task() as task):
                self._update_task(task)
                self._waiting.remove(task.service_id, task.id)
            case Created(Network() as network) | Updated(_, Network() as network):
                self._update_network(network)
            case Deleted(Network() as network):
                self.allocations.leave_network(network)
                self._unallocated.pop(network.id, None)
                self._fullness.forget(network.id)
                self.failures.clear_write_failure(CLAIMS, network_key(network.id))
                self.queue.add(self._waiting.woken(network.id))
                self._queue_unallocated()
                self._queue_nodes()
            case Created(Node() as node):  # more routes leave less space for networks
                self._update_node(node)
                routes_of(node)  # parsed here one by one, instead of all together for the first network
            case Updated(Node() as before, Node() as node):
                self._update_node(node)
                if differ_in_routes(before, node):
                    self._queue_unallocated()
            case Deleted(Node() as node):
                self._update_node(node)
                if routes_of(node):
                    self._queue_unallocated()
            case Updated(Swarm() as old, Swarm() as swarm) if _pools(old) != _pools(swarm):
                self._queue_unallocated()

    def _update_service(self, id: ServiceId) -> None:
        service = self._view().lookup(Service, id)
        was_published = bool(self.allocations.publishing)
        self._on_released(
            self.allocations.leave_service(id) if service is None else self.allocations.enter_service(service)
        )
        if self.allocations.publishing and not was_published:
            self._queue_nodes()

    def _update_task(self, task: Task) -> None:
        current = self._view().lookup(Task, task.id)
        released = (
            self.allocations.leave_task(task.id) if current is None else self.allocations.enter_task(current)
        )
        if released:
            self._queue_node_of(task)
            self._on_released(released)

    def _update_node(self, node: Node) -> None:
        current = self._view().lookup(Node, node.id)
        is_known = node.id in self.allocations.docker_nodes
        self._on_released(
            self.allocations.leave_node(node) if current is None else self.allocations.enter_node(current)
        )
        if current is None:
            return
        is_new_engine = is_docker_node(current) and not is_known
        if is_new_engine or self._needs_ingress_address(current) or self._is_on_removed_network(current):
            self.queue.add((node_key(node.id),))

    def _needs_ingress_address(self, node: Node) -> bool:
        """Return whether a skep node should serve published ports and has no ingress address yet."""
        return bool(self.allocations.publishing) and not node.attachments and is_ready(node)

    def _is_on_removed_network(self, node: Node) -> bool:
        """Return whether a skep node got an address of the ingress network after that was removed."""
        networks, view = (one.network for one in node.attachments if one.network is not None), self._view()
        unreadable = view.unreadable(Network)
        is_gone = any(view.lookup(Network, one.id) is None and one.id not in unreadable for one in networks)
        return is_gone and not is_docker_node(node)

    def _queue_nodes(self) -> None:
        """Queue every node whose attachments may have to change."""
        known = self.allocations.docker_nodes
        nodes = self._view().find(Node)
        self.queue.add(
            node_key(node.id)
            for node in nodes
            if node.id in known or node.attachments or self._needs_ingress_address(node)
        )

    def _queue_new_task(self, task: Task) -> None:
        if is_new(task):
            self._waiting.add(task.service_id, task.id)
            self.queue.add((task.service_id,))
            self._queue_node_of(task)

    def _queue_node_of(self, task: Task) -> None:
        if task.node_id in self.allocations.docker_nodes:
            self.queue.add((node_key(task.node_id),))

    def _update_network(self, network: Network) -> None:
        self.allocations.enter_network(network)
        if not is_allocated(network):
            self.queue.add((network_key(network.id),))
            return
        self._unallocated.pop(network.id, None)
        self.queue.add(self._waiting.woken(network.id))
        if network.spec.ingress:
            self._queue_for_ingress()
        elif is_door(network.spec.labels):
            services = self._view().find(Service)
            self.queue.add(service.id for service in services if has_routes(service.spec.labels))

    def _on_released(self, networks: Iterable[NetworkId]) -> None:
        """Queue the keys that wait for addresses of ``networks``, which were released."""
        for id in sorted(networks):
            self.queue.add(self._waiting.woken(id))
            if not self.allocations.networks.has(id):  # it was removed before, and this was its last address
                self._queue_unallocated()

    def _queue_unallocated(self) -> None:
        """Queue all unallocated networks, because subnets may be free."""
        self.queue.add([network_key(id) for id in self._unallocated])

    def _queue_for_ingress(self) -> None:
        """Queue services that publish ports, and the nodes, because the ingress network was allocated."""
        services = self._view().find(Service)
        self.queue.add(service.id for service in services if service.spec.publishes_in_ingress)
        self._queue_nodes()

    # -- decisions -----------------------------------------------------------------------------------------------

    def claims(self, key: str) -> Decision[Change]:
        """Yield the claim of a network that was allocated before this term, until the store has accepted it."""
        id = NetworkId(key.removeprefix(NETWORK))
        network = self._view().lookup(Network, id)
        if network is not None and (id in self._unclaimed or self.failures.write_failure(CLAIMS, key)):
            self._unclaimed.discard(id)
            yield WriteClaims(network)

    def subnets(self, key: str) -> Decision[Change]:
        """Yield the allocation of a network that has none yet."""
        id, view = NetworkId(key.removeprefix(NETWORK)), self._view()
        network, swarms = view.lookup(Network, id), view.find(Swarm)
        if network is None or not swarms or is_allocated(network):
            return
        if "allocation" in view.damaged(Network).get(id, ()):
            return  # its allocation is unreadable: with another one its tasks would be on two networks
        pools, length = swarms[0].default_addr_pool, swarms[0].subnet_size
        routes, known = routes_of_all(view.find(Node)), self.allocations.networks
        try:
            given = allocated(network, known, pools, length, routes=routes, cluster=swarms[0].id)
        except NotAllocated as error:
            if id not in self._unallocated:
                log.warning("network not allocated", network=network.spec.name, reason=str(error))
            if self._unallocated.get(id) != str(error):
                self._unallocated[id] = str(error)
                self.queue.add(self._waiting.woken(id))  # they show the reason
        else:
            # At once: the next network of this batch must get another subnet.
            self.allocations.enter_network(given)
            yield AllocateSubnets(given, pools)

    def endpoint(self, key: str, networks: AttachableNetworks) -> Decision[Change]:
        """Yield the endpoint of a service, if it has to change."""
        view, service_id = self._view(), ServiceId(key)
        service = view.lookup(Service, service_id)
        if service is None or service.removed_at is not None:
            return
        owner = service_owner(service_id)

        def allocate(network: Network, version: int) -> str:
            allocate_one = partial(self.allocations.allocate_virtual, owner, network, version)
            return self._allocate_for(owner, service_id, network, allocate_one)

        try:
            virtual_ips = virtual_ips_for(service, networks, allocate)
            is_free = self.allocations.ports.is_free_for(service_id, partial(reserved_ports_of, view))
            endpoint = endpoint_for(service, is_free, virtual_ips)
        except Unread:
            self.allocations.enter_service(service)
            return  # its tasks, which need an address of the same network, show the reason
        except Exception:
            # Otherwise each attempt would keep addresses of other networks.
            self.allocations.enter_service(service)
            raise
        if endpoint != service.endpoint:
            # Applied at once, so that the next service of this batch gets another port.
            self._on_released(self.allocations.enter_service(replace(service, endpoint=endpoint)))
            yield AllocateEndpoint(service, endpoint)

    def attachments(self, key: str, networks: AttachableNetworks) -> Decision[Change]:
        """Yield a node's own attachments, if they have to change."""
        view, node_id = self._view(), key.removeprefix(NODE)
        node = view.lookup(Node, node_id)
        if node is None:
            return
        tasks = view.find(Task, node_id=node_id) if is_docker_node(node) else ()
        upcoming = [one for task in tasks if is_new(task) for one in overlays_of(view, task, networks)]
        ingress = networks.ingress if networks.ingress and is_allocated(networks.ingress) else None
        is_published = bool(self.allocations.publishing)
        wanted = networks_of_node(node, tasks, ingress, upcoming, is_published=is_published)
        owner, is_docker = node_owner(node_id), is_docker_node(node)

        def allocate(network: Network) -> tuple[str, ...]:
            allocate_one = partial(self._node_addresses, owner, network, is_docker=is_docker)
            return self._allocate_for(owner, key, network, allocate_one)

        try:
            attachments = node_attachments(node, wanted, allocate, networks.unreadable)
        except Unread:
            self.allocations.enter_node(node)
            return
        except Exception:
            self.allocations.enter_node(node)
            raise
        if attachments != node.attachments:
            self._on_released(self.allocations.enter_node(replace(node, attachments=attachments)))
            yield AttachNode(node.id, attachments)

    def _allocate_for(self, owner: str, key: str, network: Network, allocate_one: Callable[[], T]) -> T:
        """Allocate for ``owner`` with ``allocate_one``, if no unreadable addresses prevent that.

        Raises:
            NoAddress: No address is free.  ``key`` is queued again when one is released, or when the owner of
                unreadable addresses changes.
        """
        try:
            if check_known(self._view(), owner, network):
                self.allocations.addresses.skip_to_last_quarter(network)
            return allocate_one()
        except Unread as error:
            self._unread.setdefault(error.owner, set()).add(key)
            raise
        except NoAddress:
            self._waiting.wait(network.id, key)
            raise

    def _node_addresses(self, owner: str, network: Network, *, is_docker: bool) -> tuple[str, ...]:
        """Allocate a node's own addresses.  Raises NoAddress.

        A skep node gets one of each IP version.  Engines choose IPv6 addresses for themselves.
        """
        if is_docker:
            return (self.allocations.allocate(owner, network),)
        return self.allocations.allocate_all(owner, network)

    def is_checking(self) -> bool:
        """Return whether new tasks are left to check."""
        return self._waiting.is_checking

    def begin_checking(self, due: Iterable[str]) -> None:
        """Check all new tasks of the ``due`` services, in turns with services that have many of them."""
        for key in due:
            self._waiting.begin(ServiceId(key))

    def turns(self, limit: int) -> Sequence[str]:
        """Return the services whose new tasks are checked next, at most ``limit``."""
        return self._waiting.turns(limit)

    def releases(self, key: str, networks: AttachableNetworks, limit: int) -> Decision[Change]:
        """Yield a change for each of the service's next new tasks: its release to the scheduler, or its reason to wait.

        At most ``limit`` tasks are checked.
        """
        service_id = ServiceId(key)
        try:
            for id in self._waiting.due(service_id, self._is_full, limit):
                yield self._checked(service_id, id, networks)
        except Exception:
            self._waiting.end(service_id)  # it begins again when the failure is retried
            raise

    def _checked(self, service_id: ServiceId, id: TaskId, networks: AttachableNetworks) -> Change | None:
        view = self._view()
        task = view.lookup(Task, id)
        if task is None or not is_new(task):
            self._waiting.remove(service_id, id)
            return None
        failure = self.failures.of(f"{ENDPOINTS} of {service_id}") or self.failures.refusal(
            ENDPOINTS, service_id
        )
        if failure:
            return Explain(task, f"allocation failed: {failure.error}")
        return self.release(view, task, networks)

    def _is_full(self, id: NetworkId) -> bool:
        network = self._view().lookup(Network, id)
        return network is not None and self.allocations.addresses.is_full(network)

    def release(self, view: View, task: Task, networks: AttachableNetworks) -> Change:
        """Return the release of a new task, or its reason to wait."""
        if has_unknown_spec(view, task):
            return Explain(task, UNKNOWN_SPEC)
        spec = spec_or_template(view, task)
        released = self.allocations.leave_task(task.id)  # addresses of an earlier attempt

        def allocate(network: Network, requested: Sequence[str]) -> tuple[str, ...]:
            allocate_one = partial(self.allocations.allocate_all, task.id, network, requested)
            return self._allocate_for(task.id, task.service_id, network, allocate_one)

        match attachments_for(spec, networks, allocate, task.networks_attachments):
            case AttachedTask(attachments):
                self._fullness.check((one.network for one in attachments), self.allocations.addresses)
                return ReleaseTask(task, attachments)
            case NotAttached(reason, network_id):
                self.allocations.leave_task(task.id)
                self.allocations.enter_task(task)  # it has addresses if only its status is unreadable
                self._waiting.wait(network_id, task.service_id)
                if not task.networks_attachments:
                    self._on_released(released)
                    if self._is_full(network_id):
                        self._waiting.park(task.service_id, task.id, network_id)
                return Explain(task, reason)

    def networks(self) -> AttachableNetworks:
        """Return the networks, with an ingress network that is not allocated yet: tasks have to wait for it."""
        known = self._view().find(Network)
        ingress = next((one for one in known if one.spec.ingress), None)
        return AttachableNetworks(
            find=lambda network_id: self._view().lookup(Network, network_id),
            ingress=ingress,
            door=door_network(known),
            unreadable=frozenset(map(NetworkId, self._view().unreadable(Network)))
            - {one.id for one in known},
            failure=lambda network_id: self._unallocated.get(network_id, "not yet"),
        )

    # -- writes ------------------------------------------------------------------------------------------------

    def resync(self, changes: Iterable[Change]) -> Iterator[None]:
        """Resync with the store, whatever the results of the changes. An unwritten change is not allocated."""
        for change in changes:
            self._resync(change)
            yield

    def _resync(self, change: Change) -> None:
        match change:
            case AllocateSubnets(network, _):
                current = self._view().lookup(Network, network.id)
                if current is not None:
                    self.allocations.enter_network(current)
            case AllocateEndpoint(service):
                self._update_service(service.id)
            case ReleaseTask(task):
                self._update_task(task)
                written = self._view().lookup(Task, task.id)
                if written is None or not is_new(written):
                    self._waiting.remove(task.service_id, task.id)
            case AttachNode(node_id):
                node = self._view().lookup(Node, node_id)
                if node is not None:
                    self._on_released(self.allocations.enter_node(node))
            case Explain() | WriteClaims():
                pass


def _may_hold_addresses(task: Task) -> bool:
    """Return whether the task may hold addresses.

    A task that ended before its addresses were written has some here only, and they must be released.
    """
    return bool(task.networks_attachments) or not occupies_networks(task)


def _owner_of(event: Event) -> str:
    """Return the name under which a service, node or task has addresses."""
    object = event.new if isinstance(event, Updated) else event.object
    match object:
        case Service():
            return service_owner(object.id)
        case Node():
            return node_owner(object.id)
        case Task():
            return object.id
    return ""


def _pools(swarm: Swarm) -> tuple[tuple[str, ...], int]:
    return swarm.default_addr_pool, swarm.subnet_size
