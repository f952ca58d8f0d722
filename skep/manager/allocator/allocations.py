"""All allocations of the cluster, derived from the store and updated with each commit."""

from collections.abc import Iterable, Sequence

from skep.manager.allocator.addresses import AddressAllocations
from skep.manager.allocator.nodes import occupies_networks
from skep.manager.allocator.ports import PortAllocations
from skep.manager.allocator.subnets import NetworkAllocations
from skep.model.network import Network
from skep.model.networks.data_planes import is_docker_node
from skep.model.node import Node
from skep.model.service import Service
from skep.model.task import NetworkAttachment, Task
from skep.model.values.ids import NetworkId, ServiceId, TaskId
from skep.store.interface import View


class Allocations:
    """Allocated ports, addresses, subnets and VXLAN ids with their owners, docker nodes, and publishing services."""

    def __init__(self) -> None:
        self.ports = PortAllocations()
        self.addresses = AddressAllocations()
        self.networks = NetworkAllocations()
        self.docker_nodes: set[str] = set()
        self.publishing: set[ServiceId] = set()
        """Services with ports published on every node."""
        self._gone: set[NetworkId] = set()
        """Networks that were removed while tasks still had addresses on them.  Their subnets stay allocated."""

    @classmethod
    def of(cls, view: View) -> "Allocations":
        """Return the allocations in the store."""
        allocations = cls()
        for network in view.find(Network):
            allocations.enter_network(network)
        for service in view.find(Service):
            allocations.enter_service(service)
        for task in view.find(Task):
            allocations.enter_task(task)
        for node in view.find(Node):
            allocations.enter_node(node)
        return allocations

    def enter_network(self, network: Network) -> None:
        """Add or update a network."""
        self._gone.discard(network.id)
        self.networks.enter(network)

    def leave_network(self, network: Network) -> None:
        """Remove a network.  Its subnet is free once its last task has ended."""
        self._gone.add(network.id)
        self._forget_gone((network.id,))

    def enter_service(self, service: Service) -> frozenset[NetworkId]:
        """Update a service's ports and virtual addresses.  Returns the networks of released addresses."""
        self.ports.enter(service)
        if service.removed_at is None and service.spec.publishes_in_ingress:
            self.publishing.add(service.id)
        else:
            self.publishing.discard(service.id)
        addresses = [(one.network_id, one.addr) for one in service.endpoint.virtual_ips if one.addr]
        return self._hold(service_owner(service.id), addresses)

    def leave_service(self, id: ServiceId) -> frozenset[NetworkId]:
        """Release the ports and addresses of a service whose last task has ended.  Returns the addresses' networks."""
        self.ports.leave(id)
        self.publishing.discard(id)
        return self._release(service_owner(id))

    def enter_task(self, task: Task) -> frozenset[NetworkId]:
        """Update a task's addresses.  Returns the networks of released addresses."""
        if not occupies_networks(task):
            return self.leave_task(task.id)
        addresses = _addresses(task.networks_attachments) if task.networks_attachments else ()
        if addresses:
            for attachment in task.networks_attachments:
                network = attachment.network
                if network is not None and not self.networks.has(network.id):
                    self._gone.add(network.id)
                if network is not None and network.id in self._gone:
                    self.networks.enter_copy(network)
            return self._hold(task.id, addresses)
        return frozenset()

    def leave_task(self, id: TaskId) -> frozenset[NetworkId]:
        """Release the addresses of a task that ended or whose allocation was not written.  Returns their networks."""
        return self._release(id)

    def enter_node(self, node: Node) -> frozenset[NetworkId]:
        """Update a node's plane and its addresses.  Returns the networks of released addresses."""
        if is_docker_node(node):
            self.docker_nodes.add(node.id)
        else:
            self.docker_nodes.discard(node.id)
        return self._hold(node_owner(node.id), _addresses(node.attachments))

    def leave_node(self, node: Node) -> frozenset[NetworkId]:
        """Release the addresses of a removed node.  Returns their networks."""
        self.docker_nodes.discard(node.id)
        return self._release(node_owner(node.id))

    def allocate(self, owner: str, network: Network, requested: str = "") -> str:
        """Allocate an address for a service, task or node.  Raises NoAddress."""
        return self.addresses.allocate(owner, network, requested)

    def allocate_all(self, owner: str, network: Network, requested: Sequence[str] = ()) -> tuple[str, ...]:
        """Allocate an address of each IP version of the network, IPv4 first.  Raises NoAddress."""
        return self.addresses.allocate_all(owner, network, requested)

    def allocate_virtual(self, owner: str, network: Network, version: int) -> str:
        """Allocate a service's virtual address of one IP version.  Raises NoAddress."""
        return (self.addresses.allocate_6 if version == 6 else self.addresses.allocate)(owner, network)

    def _hold(self, owner: str, addresses: Iterable[tuple[NetworkId, str]]) -> frozenset[NetworkId]:
        released = self.addresses.hold(owner, addresses)
        self._forget_gone(released)
        return released

    def _release(self, owner: str) -> frozenset[NetworkId]:
        released = self.addresses.release(owner)
        self._forget_gone(released)
        return released

    def _forget_gone(self, ids: Iterable[NetworkId]) -> None:
        for id in ids:
            if id in self._gone and not self.addresses.is_used(id):
                self._gone.discard(id)
                self.networks.leave(id)


def service_owner(id: str) -> str:
    """Return the owner name for a service's virtual addresses.  The owner name of a task is its bare id."""
    return f"service/{id}"


def node_owner(id: str) -> str:
    """Return the owner name for a node's own addresses."""
    return f"node/{id}"


def _addresses(attachments: Iterable[NetworkAttachment]) -> list[tuple[NetworkId, str]]:
    return [
        (attachment.network.id, address)
        for attachment in attachments
        if attachment.network is not None
        for address in attachment.addresses
        if "/" in address
    ]
