"""Rules on allocations: no two objects hold the same address, port or subnet, and unused ones are released."""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from ipaddress import IPv4Network, IPv6Network, ip_interface, ip_network
from itertools import combinations

from sim.invariants.committed import Change
from skep.model.network import Network
from skep.model.node import Node
from skep.model.service import PublishMode, Service
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.store.interface import Created, Deleted, Updated, View

VXLAN = "com.docker.network.driver.overlay.vxlanid_list"
PORT = "port"
Holding = tuple[Hashable, ...]
"""A unique resource: an address of a network, or a published port."""


class UniqueAllocations:
    """Addresses of networks and published ports have at most one holder.

    A task holds its addresses until its status is terminal, a service until it is deleted.
    """

    def __init__(self) -> None:
        self._held: dict[str, frozenset[Holding]] = {}
        self._holders: dict[Holding, set[str]] = defaultdict(set)

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        taken: set[Holding] = set()
        for event in change.events:
            match event:
                case Created(object) | Updated(_, object):
                    taken |= self._hold(object, holdings(object))
                case Deleted(object):
                    self._hold(object, frozenset())
        for holding in sorted(taken, key=str):
            if len(holders := self._holders[holding]) > 1:
                yield f"{' '.join(map(str, holding))} is held by {sorted(holders)}"

    def _hold(self, object: object, holdings: frozenset[Holding]) -> frozenset[Holding]:
        """Return the holdings that the object did not have before."""
        owner = f"{type(object).__name__} {getattr(object, 'id', '')}"
        before = self._held.get(owner, frozenset())
        if holdings == before:
            return frozenset()
        for holding in before - holdings:
            self._holders[holding].discard(owner)
        for holding in holdings - before:
            self._holders[holding].add(owner)
        self._held[owner] = holdings
        return holdings - before


def networks_are_apart(change: Change, view: View) -> Iterable[str]:
    """Check that no two networks share a VXLAN id or overlap.  Removed networks count while tasks are attached to
    them.
    """
    if not any(isinstance(_present(event), Network) for event in change.events):
        return
    networks = {network.id: network for network in view.find(Network)}
    for task in view.find(Task):
        if task.status.state <= TaskState.RUNNING:
            for attachment in task.networks_attachments:
                if attachment.network is not None and attachment.addresses:
                    networks.setdefault(attachment.network.id, attachment.network)
    for one, other in combinations(sorted(networks.values(), key=lambda network: network.id), 2):
        if shared := _vxlan_ids(one) & _vxlan_ids(other):
            yield f"networks {one.id} and {other.id} both have the VXLAN id {sorted(shared)}"
        for mine in _subnets(one):
            for theirs in _subnets(other):
                if mine.overlaps(theirs):
                    yield f"networks {one.id} and {other.id} overlap: {mine} and {theirs}"


def allocation_violations(view: View) -> Iterable[str]:
    """Yield the missing allocations in a cluster at rest."""
    for network in view.find(Network):
        if not network.driver_state.name:
            yield f"network {network.id} has not been allocated"
    for service in view.find(Service):
        if service.removed_at is not None or service.spec.endpoint_spec is None:
            continue
        asked = [
            port for port in service.spec.endpoint_spec.ports if port.publish_mode is PublishMode.INGRESS
        ]
        given = {(port.protocol, port.target_port): port.published_port for port in service.endpoint.ports}
        for port in asked:
            number = given.get((port.protocol, port.target_port), 0)
            if not number or port.published_port not in (0, number):
                yield f"{service.id} asked for port {port.published_port} and has {number}"
    for task in view.find(Task):
        if TaskState.PENDING <= task.status.state <= TaskState.RUNNING and task.is_wanted:
            wanted = {one.target for one in task.spec.networks}
            has = {
                one.network.id
                for one in task.networks_attachments
                if one.network is not None and one.addresses
            }
            if not wanted <= has:
                yield f"task {task.id} has no address on {sorted(wanted - has)}"


def _present(event: object) -> object:
    match event:
        case Created(object) | Updated(_, object) | Deleted(object):
            return object
    return None


def holdings(object: object) -> frozenset[Holding]:
    """Return the holdings of a task, service or node: ``(network, address)`` and ``(PORT, protocol, number)``."""
    match object:
        case Task() if object.status.state <= TaskState.RUNNING:
            return frozenset(_addresses(object.networks_attachments))
        case Node():
            return frozenset(_addresses(object.attachments))
        case Service():
            addresses = [
                (one.network_id, ip_interface(one.addr).ip) for one in object.endpoint.virtual_ips if one.addr
            ]
            ports = [
                (PORT, port.protocol, port.published_port)
                for port in object.endpoint.ports
                if port.publish_mode is PublishMode.INGRESS
                and port.published_port
                and object.removed_at is None
            ]
            return frozenset([*addresses, *ports])
    return frozenset()


def _addresses(attachments: Iterable[NetworkAttachment]) -> Iterable[Holding]:
    for attachment in attachments:
        if attachment.network is not None:
            for address in attachment.addresses:
                yield attachment.network.id, ip_interface(address).ip


def _vxlan_ids(network: Network) -> set[str]:
    return set(filter(None, network.driver_state.options.get(VXLAN, "").split(",")))


def _subnets(network: Network) -> list[IPv4Network | IPv6Network]:
    configs = network.ipam_options.configs if network.ipam_options is not None else ()
    return [ip_network(config.subnet) for config in configs if config.subnet]
