"""A cluster network in the flat form of ``/networks``, and its users.

Source: moby 20.10, daemon/cluster/convert/network.go (BasicNetworkFromGRPC), api/types/types.go (NetworkResource),
daemon/network.go (buildDetailedNetworkResources).
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from ipaddress import ip_interface
from typing import Any

from skep.api.formats.network_form import endpoint_id, flat_form, known_driver
from skep.api.formats.networks import PREDEFINED_LABEL, SWARM, NetworkFacts, ipam_status
from skep.manager.allocator.addresses import usage_of
from skep.manager.allocator.subnets import NetworkAllocations, NotAllocated, allocated, has_addresses
from skep.manager.control import networks as control
from skep.manager.control.tasks import damage_of
from skep.manager.scheduler.nodes.requirements import paths_of
from skep.model.door.routes import has_routes
from skep.model.door.settings import door_network
from skep.model.network import Network, is_ingress
from skep.model.networks.data_planes import is_overlay
from skep.model.networks.routes import route_overlaps
from skep.model.node import Node
from skep.model.service import PublishMode, Service
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.store.interface import View

_PIECE = 1_000
"""Number of tasks between two pauses for the event loop."""
_WARNED_OF_MAX = 10
"""Largest number of clashes with nodes' networks, and of nodes that are cut off, which the warnings name."""


def is_predefined(network: Network) -> bool:
    """Return whether the network represents a network of every node, which the nodes show themselves."""
    return network.spec.labels.get(PREDEFINED_LABEL) == "true"


def facts_of(network: Network, used: frozenset[str]) -> NetworkFacts:
    """Return the facts about a network that filters match.  ``used``: ids of the networks in use."""
    return NetworkFacts(
        id=network.id,
        name=network.spec.name,
        driver=known_driver(network).name,
        scope=SWARM,
        labels=network.spec.labels,
        is_used=network.id in used,
    )


def used_networks(view: View) -> frozenset[str]:
    """Return the ids of the networks that services name, or that their ports or routes need."""
    used: set[str] = set()
    ingress, door = control.ingress_network(view), door_network(view.find(Network))
    for service in view.find(Service):
        if service.removed_at is None:
            used.update(one.target for one in _attachments(service))
            if ingress is not None and _ports(service):
                used.add(ingress.id)
            if door is not None and has_routes(service.spec.labels):
                used.add(door.id)
    return frozenset(used)


def shown(view: View, network: Network) -> dict[str, Any]:
    """Return a cluster network as in the list of networks."""
    damage = damage_of(view, Network, network.id)
    return {**flat_form(network), **({"Damage": damage} if damage else {})}


async def describe_network(view: View, network: Network, *, verbose: bool) -> dict[str, Any]:
    """Return a cluster network as ``inspect`` shows it: with the nodes that take part, and warnings for the user.

    With ``verbose``, it also has its services and their tasks.
    """
    response = shown(view, network)
    if not is_overlay(network):
        return response
    users = _Users(view, network)
    await users.look()
    response["Status"] = ipam_status(response["IPAM"]["Config"], users.addresses)
    if users.nodes:
        response["Peers"] = [{"Name": node.shown_name, "IP": node.status.addr} for node in users.nodes]
    if verbose:
        response["Services"] = users.services
    if warnings := [
        *users.warnings(),
        *_clash_warnings(view, network),
        *_cut_off_nodes(network, users.nodes),
    ]:
        response["Warnings"] = warnings
    return response


class _Users:
    """Finds the services and tasks that use addresses on the network.  Reads the tasks in slices, so that the event
    loop stays responsive.
    """

    def __init__(self, view: View, network: Network) -> None:
        self._view = view
        self._network = network
        self._addresses: list[str] = []
        self.nodes: list[Node] = []
        self.services: dict[str, Any] = {}

    async def look(self) -> None:
        node_ids: set[NodeId] = set()
        async for service, tasks in self._by_service():
            virtual = [
                one.addr for one in (service.endpoint.virtual_ips if service else ()) if self._is_here(one)
            ]
            self._addresses += virtual
            lines = []
            for task in tasks:
                addresses = _addresses_on(task, self._network)
                self._addresses += addresses
                if addresses and task.node_id:
                    node_ids.add(task.node_id)
                    lines.append(self._task_line(task, service, addresses[0]))
            if service is not None and (lines or virtual):
                self.services[service.spec.name] = _service_entry(service, virtual, lines, self._network)
            elif service is None and lines:
                self.services.setdefault("", {"VIP": "<nil>", "Ports": [], "LocalLBIndex": 0, "Tasks": []})
                self.services[""]["Tasks"] += lines
        for node in self._view.find(Node):
            own = [
                address
                for one in node.attachments
                if one.network is not None and one.network.id == self._network.id
                for address in one.addresses
            ]
            self._addresses += own
            if own or node.id in node_ids:
                self.nodes.append(node)

    @property
    def addresses(self) -> Sequence[str]:
        """Addresses of tasks and nodes on the network, and virtual addresses."""
        return self._addresses

    def warnings(self) -> Iterable[str]:
        """Yield a warning if the network is full, nearly full, or not allocated."""
        if not has_addresses(self._network):
            yield from _why_without_addresses(self._view, self._network)
            return
        usage = usage_of(self._network, len({text for text in self._addresses if ":" not in text}))
        if usage.is_nearly_full:
            name = self._network.spec.name
            yield f"{usage}: give the network another subnet (skep network update --subnet-add SUBNET {name})"

    async def _by_service(self) -> AsyncIterator[tuple[Service | None, list[Task]]]:
        """Yield the services on the network with their tasks that use addresses, and None for plain containers."""
        looked_at = 0
        for service in self._view.find(Service):
            if not self._concerns(service):
                continue
            tasks = [task for task in self._view.find(Task, service_id=service.id) if _occupies(task)]
            yield service, tasks
            looked_at += len(tasks)
            if looked_at > _PIECE:
                looked_at = 0
                await asyncio.sleep(0)
        for node in self._view.find(Node) if self._network.spec.attachable else ():
            here = self._view.find(Task, node_id=node.id)
            yield None, [task for task in here if not task.service_id and _occupies(task)]
            await asyncio.sleep(0)

    def _concerns(self, service: Service) -> bool:
        if is_ingress(self._network):
            return bool(_ports(service))
        return any(one.target == self._network.id for one in _attachments(service))

    def _is_here(self, virtual_ip: Any) -> bool:
        return bool(virtual_ip.network_id == self._network.id and virtual_ip.addr)

    def _task_line(self, task: Task, service: Service | None, address: str) -> dict[str, Any]:
        node = self._view.lookup(Node, task.node_id)
        attachment = task.spec.network_attachment_spec
        if service is not None:
            name = task.container_name(service.spec.name)
        else:
            name = attachment.container_id if attachment is not None else task.id
        return {
            "Name": name,
            "EndpointID": endpoint_id(task.id, self._network.id),
            "EndpointIP": str(ip_interface(address).ip),
            "Info": {"Host IP": node.status.addr if node is not None else ""},
        }


def _service_entry(
    service: Service, virtual: list[str], lines: list[dict[str, Any]], network: Network
) -> dict[str, Any]:
    ports = _ports(service) if is_ingress(network) else []
    return {
        "VIP": str(ip_interface(virtual[0]).ip) if virtual else "<nil>",
        "Ports": [f"Target: {target}, Publish: {published}" for target, published in ports],
        "LocalLBIndex": 0,
        "Tasks": lines,
    }


def _why_without_addresses(view: View, network: Network) -> list[str]:
    """Return the allocator's error for a network without addresses, or nothing if the allocator has not run yet."""
    allocations = NetworkAllocations()
    for other in view.find(Network):
        allocations.enter(other)
    swarms = view.find(Swarm)
    pools = swarms[0].default_addr_pool if swarms else ()
    try:
        allocated(network, allocations, pools, swarms[0].subnet_size if swarms else 24)
    except NotAllocated as error:
        return [f"not allocated: {error}"]
    return []


def _clash_warnings(view: View, network: Network) -> list[str]:
    subnets = control.subnets_of(network)
    found = route_overlaps(subnets, view.find(Node))
    lines = [f"{clash}: containers there cannot reach that network" for clash in found[:_WARNED_OF_MAX]]
    rest = len(found) - len(lines)
    return [*lines, f"{rest} more clashes with networks of nodes"] if rest else lines


def _cut_off_nodes(network: Network, nodes: Iterable[Node]) -> list[str]:
    paths = paths_of([network])
    found = [
        f"{node.shown_name} is cut off on {one.networks}: {one.summary}"
        for node in nodes
        for one in node.cut_off
        if one.check in paths
    ]
    return found[:_WARNED_OF_MAX]


def _addresses_on(task: Task, network: Network) -> list[str]:
    return [
        address
        for one in task.networks_attachments
        if one.network is not None and one.network.id == network.id
        for address in one.addresses
        if "/" in address
    ]


def _occupies(task: Task) -> bool:
    return task.status.state <= TaskState.RUNNING


def _attachments(service: Service) -> Iterable[Any]:
    return service.spec.task_template.networks or service.spec.networks


def _ports(service: Service) -> list[tuple[int, int]]:
    """Return target and published ports that the service publishes on every node."""
    return [
        (port.target_port, port.published_port)
        for port in service.endpoint.ports
        or (service.spec.endpoint_spec.ports if service.spec.endpoint_spec else ())
        if port.publish_mode is PublishMode.INGRESS
    ]
