"""Rules on allocations: no two objects hold one address, port or subnet, and tasks have their addresses."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_interface, ip_network
from itertools import pairwise
from typing import TypeAlias

from skep.manager.verify.rules import InvariantViolation
from skep.model.network import Network, most_complete
from skep.model.networks.data_planes import is_overlay
from skep.model.node import Node
from skep.model.service import PublishMode, Service
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.store.interface import View

VXLAN = "com.docker.network.driver.overlay.vxlanid_list"
PORT = "port"
Holding: TypeAlias = tuple[Hashable, ...]
"""A unique resource: an address of a network, or a published port."""
Holder: TypeAlias = Task | Service | Node


def holdings(object: object) -> frozenset[Holding]:
    """Return the holdings of a task, service or node: ``(network, address)`` and ``(PORT, protocol, number)``.

    A task holds its addresses until its status is terminal, a service until it is deleted.
    """
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


class Holders:
    """Collects the holdings of all objects, and finds those with several holders."""

    def __init__(self) -> None:
        self._first: dict[Holding, Holder] = {}
        self._shared: dict[Holding, list[Holder]] = {}

    def add(self, object: Holder) -> None:
        """Add the holdings of an object."""
        for holding in holdings(object):
            first = self._first.setdefault(holding, object)
            if first is not object:
                self._shared.setdefault(holding, [first]).append(object)

    def violations(self) -> Iterator[InvariantViolation]:
        """Yield the holdings with several holders."""
        for holding, holders in sorted(self._shared.items(), key=str):
            yield shared_holding(holding, [owner_name(one) for one in holders], holders)


def owner_name(object: Holder) -> str:
    """Return kind and id of a holder."""
    return f"{type(object).__name__} {object.id}"


def shared_holding(
    holding: Holding, owners: Iterable[str], objects: Iterable[Holder] = ()
) -> InvariantViolation:
    """Return the violation that ``owners`` hold one address or port."""
    text = f"{' '.join(map(str, holding))} is held by {sorted(owners)}"
    lasting = tuple(
        one for one in objects if not isinstance(one, Node)
    )  # a node's record changes with its load
    return InvariantViolation(
        "address", text, lasting, tuple(one.id for one in objects if isinstance(one, Node))
    )


def networks_in_use(view: View) -> Mapping[str, Network]:
    """Return all networks, with removed ones to which tasks are attached."""
    networks: dict[str, Network] = {network.id: network for network in view.find(Network)}
    for task in view.find(Task):
        add_attached(task, networks)
    return networks


def add_attached(task: Task, networks: dict[str, Network]) -> None:
    """Add the networks to which ``task`` is attached, as they were then, unless a more complete copy is known."""
    if task.status.state <= TaskState.RUNNING:
        for attachment in task.networks_attachments:
            if attachment.network is not None and attachment.addresses:
                id, copy = attachment.network.id, attachment.network
                networks[id] = most_complete((networks[id], copy)) if id in networks else copy


def mixed_networks(networks: Mapping[str, Network]) -> Iterator[InvariantViolation]:
    """Yield pairs of overlay networks that share a VXLAN id or overlap."""
    by_vxlan: dict[str, list[Network]] = defaultdict(list)
    subnets: list[tuple[int, int, int, IPv4Network | IPv6Network, Network]] = []
    for id in sorted(networks):
        network = networks[id]
        if not is_overlay(network):
            continue
        for vxlan in sorted(_vxlan_ids(network)):
            by_vxlan[vxlan].append(network)
        for subnet in _subnets(network):
            ends = int(subnet.network_address), int(subnet.broadcast_address)
            subnets.append((subnet.version, *ends, subnet, network))
    for vxlan, sharing in sorted(by_vxlan.items()):
        for first, second in pairwise(sharing):
            text = f"networks {first.id} and {second.id} both have the VXLAN id {[vxlan]}"
            yield InvariantViolation("network", text, (first, second))
    subnets.sort(key=lambda one: (one[0], one[1], -one[2], one[-1].id))
    around: list[tuple[int, int, int, IPv4Network | IPv6Network, Network]] = []
    for present in subnets:
        # Subnets are nested or apart, so only the subnets around this one overlap it.
        while around and (around[-1][0] != present[0] or around[-1][2] < present[1]):
            around.pop()
        for other in around:
            if other[-1].id != present[-1].id:
                one, two = sorted((other, present), key=lambda each: each[-1].id)
                text = f"networks {one[-1].id} and {two[-1].id} overlap: {one[-2]} and {two[-2]}"
                yield InvariantViolation("network", text, (one[-1], two[-1]))
        around.append(present)


def unreachable(task: Task, view: View) -> Iterator[InvariantViolation]:
    """Yield the networks of a task with a node on which it has no address."""
    if not (TaskState.PENDING <= task.status.state <= TaskState.RUNNING and task.is_wanted):
        return
    networks = {one.target: view.lookup(Network, one.target) for one in task.spec.networks}
    wanted = {id for id, network in networks.items() if network is None or is_overlay(network)}
    has = {one.network.id for one in task.networks_attachments if one.network is not None and one.addresses}
    if not wanted <= has:
        yield InvariantViolation(
            "unreachable", f"task {task.id} has no address on {sorted(wanted - has)}", (task,)
        )


def _vxlan_ids(network: Network) -> set[str]:
    return set(filter(None, network.driver_state.options.get(VXLAN, "").split(",")))


def _subnets(network: Network) -> list[IPv4Network | IPv6Network]:
    configs = network.ipam_options.configs if network.ipam_options is not None else ()
    return [ip_network(config.subnet, strict=False) for config in configs if config.subnet]
