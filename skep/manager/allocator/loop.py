"""The allocator's loop: allocates subnets of networks and endpoints of services, then sets tasks to PENDING."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from random import Random
from typing import TypeVar

import structlog
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.aio.time_slices import TimeSlices, run_in_slices
from skep.manager.allocator.addresses import AddressAllocations, NoAddress
from skep.manager.allocator.allocations import Allocations, node_owner, service_owner
from skep.manager.allocator.attachments import (
    Attached,
    Networks,
    NotAttached,
    attachments_for,
    is_new,
    overlays_of,
    spec_or_template,
)
from skep.manager.allocator.changes import (
    NETWORK,
    NODE,
    AllocateEndpoint,
    AllocateSubnets,
    AttachNode,
    Change,
    Claim,
    Explain,
    Release,
    apply,
    key_of,
    network_key,
    node_key,
)
from skep.manager.allocator.nodes import is_ready, networks_of_node, node_attachments, occupies_networks
from skep.manager.allocator.ports import endpoint_for
from skep.manager.allocator.subnets import NotAllocated, allocated, is_allocated
from skep.manager.allocator.unreadable_addresses import Unread, check_known
from skep.manager.allocator.virtual_ips import virtual_ips_for
from skep.manager.allocator.waiting import Waiting
from skep.manager.cluster import reserved_ports_of
from skep.manager.failures import Failures, for_each_isolated, write_each
from skep.manager.informer import batches_of, run_informer
from skep.manager.work_queue import WorkQueue
from skep.model.data_planes import is_docker_node, is_overlay
from skep.model.ids import IdSource, NetworkId, ServiceId
from skep.model.labels import priority_of
from skep.model.network import Network
from skep.model.node import Node
from skep.model.routes import differ_in_routes, routes_of, routes_of_all
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.times import timestamp
from skep.store.interface import (
    Commit,
    Created,
    Deleted,
    Event,
    LoopStore,
    Object,
    Transaction,
    Updated,
    View,
)
from skep.store.kinds import UNKNOWN_SPEC, has_unknown_spec

log = structlog.get_logger()

T = TypeVar("T")

ENDPOINTS = "endpoints"
CLAIMS = "claims of networks"
BATCH = 500
"""Objects and new tasks decided before their changes are committed together."""


class Allocator:
    """Allocates what networks, services, nodes and tasks need before tasks can be assigned."""

    def __init__(self, term: LoopStore, clock: Clock, new_id: IdSource, random: Random) -> None:
        self._term = term
        self._clock = clock
        self._random = random
        self._queue: WorkQueue[str] = WorkQueue(clock, self._priority_of)
        """Services by their ids, networks and nodes by ``network_key`` and ``node_key``."""
        self._failures = Failures(clock, random)
        self._allocations = Allocations()
        self._loading: Iterator[None] = iter(())
        self._waiting = Waiting()
        self._unallocated: dict[NetworkId, str] = {}
        """Networks that cannot be allocated, with the reason."""
        self._fullness = FullnessWarnings()
        self._unread: dict[str, set[str]] = {}
        """Owner with unreadable addresses -> keys that wait for one of its networks until it changes."""

    async def run(self) -> None:
        """Allocate until cancelled.  Runs on the leader only."""
        kinds = (Service, Task, Network, Node, Swarm)
        await run_informer(
            self._term, kinds, on_snapshot=self._on_snapshot, on_commit=self._on_commit, work=self._work
        )

    # -- keeping up with the store -----------------------------------------------------------------------------

    def _on_snapshot(self, _snapshot: View) -> None:
        self._allocations = Allocations()
        self._waiting = Waiting()
        self._unallocated.clear()
        self._unread.clear()
        self._loading = self._load()

    def _load(self) -> Iterator[None]:
        """Load all objects, with pauses.  Commits in between are loaded with their newest state too."""
        for kind in (Network, Service, Task, Node):
            for batch in batches_of(self._term.view, kind):
                for_each_isolated("allocator", batch, self._enter)
                yield
        self._queue_nodes()

    def _enter(self, one: Object) -> None:
        """Load an object of the snapshot."""
        if not isinstance(one, Task):
            self._on_event(Created(one))
            return
        if one.networks_attachments:
            self._allocations.enter_task(one)
        self._queue_new_task(one)

    def _priority_of(self, key: str) -> int:
        service = self._term.view().lookup(Service, ServiceId(key)) if "/" not in key else None
        return priority_of(service.spec.labels) if service is not None else 0

    def _on_commit(self, commit: Commit) -> None:
        """Apply the *current* state of each object: an older state would release later allocations."""
        for event in commit.events:
            self._on_event(event)
            if self._unread:
                self._queue.add(sorted(self._unread.pop(_owner_of(event), ())))

    def _on_event(self, event: Event) -> None:
        match event:
            case Created(Service() as service) | Updated(_, Service() as service):
                self._update_service(service.id)
                self._queue.add((service.id,))
            case Deleted(Service() as service):
                self._update_service(service.id)
                self._waiting.forget_service(service.id)
                self._failures.clear(service.id)
                self._failures.clear_write_failure(ENDPOINTS, service.id)
                self._failures.clear(f"tasks of {service.id}")
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
                self._allocations.leave_network(network)
                self._unallocated.pop(network.id, None)
                self._fullness.forget(network.id)
                self._failures.clear_write_failure(CLAIMS, network_key(network.id))
                self._queue.add(self._waiting.woken(network.id))
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
        service = self._term.view().lookup(Service, id)
        was_published = bool(self._allocations.publishing)
        self._on_released(
            self._allocations.leave_service(id)
            if service is None
            else self._allocations.enter_service(service)
        )
        if self._allocations.publishing and not was_published:
            self._queue_nodes()

    def _update_task(self, task: Task) -> None:
        current = self._term.view().lookup(Task, task.id)
        released = (
            self._allocations.leave_task(task.id)
            if current is None
            else self._allocations.enter_task(current)
        )
        if released:
            self._queue_node_of(task)
            self._on_released(released)

    def _update_node(self, node: Node) -> None:
        current = self._term.view().lookup(Node, node.id)
        is_known = node.id in self._allocations.docker_nodes
        self._on_released(
            self._allocations.leave_node(node) if current is None else self._allocations.enter_node(current)
        )
        if current is None:
            return
        if (is_docker_node(current) and not is_known) or self._needs_ingress_address(current):
            self._queue.add((node_key(node.id),))

    def _needs_ingress_address(self, node: Node) -> bool:
        """Whether a skep node should serve published ports and has no ingress address yet."""
        return bool(self._allocations.publishing) and not node.attachments and is_ready(node)

    def _queue_nodes(self) -> None:
        """Queue every node whose attachments may have to change."""
        known = self._allocations.docker_nodes
        nodes = self._term.view().find(Node)
        self._queue.add(
            node_key(node.id)
            for node in nodes
            if node.id in known or node.attachments or self._needs_ingress_address(node)
        )

    def _queue_new_task(self, task: Task) -> None:
        if is_new(task):
            self._waiting.add(task.service_id, task.id)
            self._queue.add((task.service_id,))
            self._queue_node_of(task)

    def _queue_node_of(self, task: Task) -> None:
        if task.node_id in self._allocations.docker_nodes:
            self._queue.add((node_key(task.node_id),))

    def _update_network(self, network: Network) -> None:
        self._allocations.enter_network(network)
        if not is_allocated(network):
            self._queue.add((network_key(network.id),))
            return
        self._unallocated.pop(network.id, None)
        self._queue.add(self._waiting.woken(network.id))
        if network.spec.ingress:
            self._queue_for_ingress()

    def _on_released(self, networks: Iterable[NetworkId]) -> None:
        """Queue the keys that wait for addresses of ``networks``, which were released."""
        for id in sorted(networks):
            self._queue.add(self._waiting.woken(id))
            if not self._allocations.networks.has(id):  # it was removed before, and this was its last address
                self._queue_unallocated()

    def _queue_unallocated(self) -> None:
        """Queue all unallocated networks, because subnets may be free."""
        self._queue.add([network_key(id) for id in self._unallocated])

    def _queue_for_ingress(self) -> None:
        """Queue services that publish ports, and the nodes, because the ingress network was allocated."""
        services = self._term.view().find(Service)
        self._queue.add(service.id for service in services if service.spec.publishes_in_ingress)
        self._queue_nodes()

    # -- deciding ----------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        await run_in_slices(self._loading, self._clock)
        allocated_before = [one for one in self._term.view().find(Network) if is_allocated(one)]
        await self._commit(CLAIMS, ([Claim(network)] for network in allocated_before))
        while True:
            is_checking = self._waiting.is_checking
            keys = self._queue.take_due(BATCH) if is_checking else await self._queue.take(BATCH)
            networks = [NetworkId(key.removeprefix(NETWORK)) for key in keys if key.startswith(NETWORK)]
            nodes = [key.removeprefix(NODE) for key in keys if key.startswith(NODE)]
            services = [ServiceId(key) for key in keys if "/" not in key]
            # In this order, since each step reads the results of the one before from the store.
            await self._commit("subnets", (self._subnets(id) for id in networks))
            await self._commit(CLAIMS, (self._claims(id) for id in networks))
            known = self._networks()
            await self._commit(ENDPOINTS, (self._endpoint(id, known) for id in services))
            await self._commit("node attachments", (self._attached_node(id, known) for id in nodes))
            await self._commit("releases", self._next_releases(services, known))

    def _claims(self, id: NetworkId) -> list[Change]:
        """Return the claims of a network that the store has not accepted yet."""
        network = self._term.view().lookup(Network, id)
        if network is None or self._failures.write_failure(CLAIMS, network_key(id)) is None:
            return []
        return [Claim(network)]

    def _subnets(self, id: NetworkId) -> list[Change]:
        """Return the allocation of a network that has none yet."""
        view = self._term.view()
        network, swarms = view.lookup(Network, id), view.find(Swarm)
        if network is None or not swarms or is_allocated(network):
            return []
        if "allocation" in view.damaged(Network).get(id, ()):
            return []  # its allocation is unreadable: with another one its tasks would be on two networks
        pools, length = swarms[0].default_addr_pool, swarms[0].subnet_size
        changes: list[Change] = []
        with self._failures.caught(network_key(id)):
            try:
                given = allocated(
                    network,
                    self._allocations.networks,
                    pools,
                    length,
                    routes=routes_of_all(view.find(Node)),
                    cluster=swarms[0].id,
                )
            except NotAllocated as error:
                if id not in self._unallocated:
                    log.warning("network not allocated", network=network.spec.name, reason=str(error))
                if self._unallocated.get(id) != str(error):
                    self._unallocated[id] = str(error)
                    self._queue.add(self._waiting.woken(id))  # they show the reason
            else:
                self._allocations.enter_network(
                    given
                )  # at once: the next network of this batch must get another subnet
                changes = [AllocateSubnets(given)]
        return changes

    def _endpoint(self, service_id: ServiceId, networks: Networks) -> list[Change]:
        """Return the endpoint of a service, if it has to change."""
        view = self._term.view()
        service = view.lookup(Service, service_id)
        if service is None or service.removed_at is not None:
            return []
        with self._failures.caught(service_id):
            owner = service_owner(service_id)

            def allocate(network: Network, version: int) -> str:
                allocate_one = partial(self._allocations.allocate_virtual, owner, network, version)
                return self._allocate_for(owner, service_id, network, allocate_one)

            try:
                virtual_ips = virtual_ips_for(service, networks, allocate)
                reserved = cache(partial(reserved_ports_of, view))
                is_free = self._allocations.ports.is_free_for(service_id, reserved)
                endpoint = endpoint_for(service, is_free, virtual_ips)
            except Unread:
                self._allocations.enter_service(service)
                return []  # its tasks, which need an address of the same network, show the reason
            except Exception:
                # Otherwise each attempt would keep addresses of other networks.
                self._allocations.enter_service(service)
                raise
            if endpoint != service.endpoint:
                # Applied at once, so that the next service of this batch gets another port.
                self._on_released(self._allocations.enter_service(replace(service, endpoint=endpoint)))
                return [AllocateEndpoint(service, endpoint)]
        return []

    def _attached_node(self, node_id: str, networks: Networks) -> list[Change]:
        """Return a node's own attachments, if they have to change."""
        view = self._term.view()
        node = view.lookup(Node, node_id)
        if node is None:
            return []
        with self._failures.caught(node_key(node_id)):
            tasks = view.find(Task, node_id=node_id) if is_docker_node(node) else ()
            upcoming = [one for task in tasks if is_new(task) for one in overlays_of(view, task, networks)]
            ingress = networks.ingress if networks.ingress and is_allocated(networks.ingress) else None
            is_published = bool(self._allocations.publishing)
            wanted = networks_of_node(node, tasks, ingress, upcoming, is_published=is_published)
            owner, is_docker = node_owner(node_id), is_docker_node(node)

            def allocate(network: Network) -> tuple[str, ...]:
                allocate_one = partial(self._node_addresses, owner, network, is_docker=is_docker)
                return self._allocate_for(owner, node_key(node_id), network, allocate_one)

            try:
                attachments = node_attachments(node, wanted, allocate)
            except Unread:
                self._allocations.enter_node(node)
                return []
            except Exception:
                self._allocations.enter_node(node)
                raise
            if attachments != node.attachments:
                self._on_released(self._allocations.enter_node(replace(node, attachments=attachments)))
                return [AttachNode(node.id, attachments)]
        if (failure := self._failures.of(node_key(node_id))) is not None:
            self._queue.add_at(node_key(node_id), failure.retry_at)
        return []

    def _allocate_for(self, owner: str, key: str, network: Network, allocate_one: Callable[[], T]) -> T:
        """Allocate for ``owner`` with ``allocate_one``, if no unreadable addresses prevent that.

        Raises:
            NoAddress: No address is free.  ``key`` is queued again when one is released, or when the owner of
                unreadable addresses changes.
        """
        try:
            if check_known(self._term.view(), owner, network):
                self._allocations.addresses.skip_to_last_quarter(network)
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
            return (self._allocations.allocate(owner, network),)
        return self._allocations.allocate_all(owner, network)

    def _next_releases(self, due: Iterable[ServiceId], networks: Networks) -> Iterator[list[Change]]:
        """Yield changes for the next new tasks of the ``due`` services, and of services with many of them."""
        for id in due:
            self._waiting.begin(id)
        services = self._waiting.turns(BATCH)
        share = max(1, BATCH // max(1, len(services)))
        for id in services:
            yield from self._releases(id, networks, share)

    def _releases(self, service_id: ServiceId, networks: Networks, limit: int) -> Iterator[list[Change]]:
        """Yield a change for each of the service's next new tasks: its release to the scheduler, or its reason to
        wait.
        """
        key = f"tasks of {service_id}"
        with self._failures.caught(key):
            for id in self._waiting.due(service_id, self._is_full, limit):
                view = self._term.view()
                task = view.lookup(Task, id)
                if task is None or not is_new(task):
                    self._waiting.remove(service_id, id)
                    yield []
                elif failure := (
                    self._failures.of(service_id) or self._failures.refusal(ENDPOINTS, service_id)
                ):
                    yield [Explain(task, f"allocation failed: {failure.error}")]
                else:
                    yield [self._release(view, task, networks)]
        if self._failures.of(key) is not None:
            self._waiting.end(service_id)
        for failure in (self._failures.of(service_id), self._failures.of(key)):
            if failure is not None:
                self._queue.add_at(service_id, failure.retry_at)

    def _is_full(self, id: NetworkId) -> bool:
        network = self._term.view().lookup(Network, id)
        return network is not None and self._allocations.addresses.is_full(network)

    def _release(self, view: View, task: Task, networks: Networks) -> Change:
        if has_unknown_spec(view, task):
            return Explain(task, UNKNOWN_SPEC)
        spec = spec_or_template(view, task)
        released = self._allocations.leave_task(task.id)  # addresses of an earlier attempt

        def allocate(network: Network, requested: Sequence[str]) -> tuple[str, ...]:
            allocate_one = partial(self._allocations.allocate_all, task.id, network, requested)
            return self._allocate_for(task.id, task.service_id, network, allocate_one)

        match attachments_for(spec, networks, allocate, task.networks_attachments):
            case Attached(attachments):
                self._fullness.check((one.network for one in attachments), self._allocations.addresses)
                return Release(task, attachments)
            case NotAttached(reason, network_id):
                self._allocations.leave_task(task.id)
                self._allocations.enter_task(task)  # it has addresses if only its status is unreadable
                self._waiting.wait(network_id, task.service_id)
                if not task.networks_attachments:
                    self._on_released(released)
                    if self._is_full(network_id):
                        self._waiting.park(task.service_id, task.id, network_id)
                return Explain(task, reason)

    def _networks(self) -> Networks:
        """Return the networks, with an ingress network that is not allocated yet: tasks have to wait for it."""
        known = self._term.view().find(Network)
        ingress = next((one for one in known if one.spec.ingress), None)
        return Networks(
            find=lambda network_id: self._term.view().lookup(Network, network_id),
            ingress=ingress,
            failure=lambda network_id: self._unallocated.get(network_id, "not yet"),
        )

    # -- writing -----------------------------------------------------------------------------------------------

    async def _commit(self, what: str, decided: Iterable[list[Change]]) -> None:
        """Write each change in its own transaction, in as few raft entries as possible."""
        changes: list[Change] = []
        slices = TimeSlices(self._clock)
        for some in decided:
            changes += some
            await slices.yield_if_due()
        if not changes:
            return
        now = timestamp(self._clock.now_ns())

        def write(tx: Transaction, change: Change) -> None:
            apply(tx, change, now)

        results = await write_each(self._term, write, changes)
        for change in changes:
            await slices.yield_if_due()
            # Whatever the result, resync with the store: a change that was not written is not allocated.
            self._resync(change)
        self._failures.requeue_failed(self._queue, what, zip(map(key_of, changes), results, strict=True))

    def _resync(self, change: Change) -> None:
        match change:
            case AllocateSubnets(network):
                current = self._term.view().lookup(Network, network.id)
                if current is not None:
                    self._allocations.enter_network(current)
            case AllocateEndpoint(service):
                self._update_service(service.id)
            case Release(task):
                self._update_task(task)
                written = self._term.view().lookup(Task, task.id)
                if written is None or not is_new(written):
                    self._waiting.remove(task.service_id, task.id)
            case AttachNode(node_id):
                node = self._term.view().lookup(Node, node_id)
                if node is not None:
                    self._on_released(self._allocations.enter_node(node))
            case Explain() | Claim():
                pass


def _may_hold_addresses(task: Task) -> bool:
    """Whether the task may hold addresses.

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
