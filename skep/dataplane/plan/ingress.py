"""What one node does for the routing mesh, derived from the ingress network's table.  Pure."""

from collections.abc import Iterable
from functools import lru_cache
from hashlib import shake_128
from ipaddress import ip_address, ip_network

import msgspec

from skep.model.ids import NodeId, TaskId
from skep.model.publishing import PublishOptions
from skep.model.tables import Table, TableEndpoint, TablePort, TableService

PROTOCOLS = frozenset({"tcp", "udp", "sctp"})
STICKY_SLOTS = 256
"""Clients are dealt to this many slots by their address, and slots to tasks."""


class Backend(msgspec.Struct, frozen=True, order=True):
    """A serving task, by its address on the ingress network."""

    task_id: TaskId
    address: str
    port: int


class MeshPort(msgspec.Struct, frozen=True, kw_only=True):
    """A published port and who serves it, by address family, in the order of task ids."""

    protocol: str
    published: int
    options: PublishOptions = PublishOptions()
    ipv4: tuple[Backend, ...] = ()
    ipv6: tuple[Backend, ...] = ()

    @property
    def answers_ipv4(self) -> bool:
        return self.options.host_ip == "" or ip_address(self.options.host_ip).version == 4

    @property
    def answers_ipv6(self) -> bool:
        return self.options.host_ip == "" or ip_address(self.options.host_ip).version == 6

    @property
    def only_address(self) -> str:
        """The only address it answers on; empty: every one of its family."""
        host_ip = self.options.host_ip
        return "" if not host_ip or ip_address(host_ip).is_unspecified else host_ip


class Gate(msgspec.Struct, frozen=True, order=True):
    """A node that connections come through: its own addresses on the ingress network; empty: it has none."""

    ipv4: str
    ipv6: str = ""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All that one node does.  The empty plan: it takes no part."""

    ports: tuple[MeshPort, ...] = ()
    subnets: tuple[str, ...] = ()
    gates: tuple[Gate, ...] = ()
    own: Gate = Gate("")

    @property
    def has_ipv6(self) -> bool:
        """Whether tasks have IPv6 addresses on the ingress network."""
        return any(ip_network(subnet).version == 6 for subnet in self.subnets)


def plan(table: Table, node_id: NodeId) -> Plan:
    """The plan of the node ``node_id``.

    Of two services with the same port, which the managers do not let happen, the one with the lower id has it.
    """
    serving: dict[str, list[TableEndpoint]] = {}
    for _, endpoint in sorted(table.endpoints.items()):
        if endpoint.is_serving:
            serving.setdefault(endpoint.service_id, []).append(endpoint)
    ports: dict[tuple[str, int], MeshPort] = {}
    for _, service in sorted(table.services.items()):
        for port in service.ports:
            key = (port.protocol, port.published)
            if key not in ports and _is_possible(port):
                ports[key] = _mesh_port(service, port, serving.get(service.id, ()), node_id)
    own = table.nodes.get(node_id)
    return Plan(
        ports=tuple(port for _, port in sorted(ports.items())),
        subnets=tuple(segment.subnet for segment in table.head.segments),
        gates=tuple(
            sorted(
                gate for node in table.nodes.values() if (gate := gate_of(node.addresses)).ipv4 or gate.ipv6
            )
        ),
        own=gate_of(own.addresses) if own else Gate(""),
    )


def gate_of(addresses: Iterable[str]) -> Gate:
    """The first address of each family."""
    by_version = {ip_address(address).version: address for address in reversed(tuple(addresses))}
    return Gate(by_version.get(4, ""), by_version.get(6, ""))


def sticky_slots(backends: tuple[Backend, ...]) -> tuple[Backend, ...]:
    """For each of the slots the backend that has it; empty without backends.

    Each slot goes to the backend that values it most (rendezvous hashing), so that a backend which goes or comes
    moves its own slots only, and all nodes agree.
    """
    if not backends:
        return ()
    values = [_values(backend.task_id) for backend in backends]
    order = range(len(backends))
    return tuple(
        backends[max(order, key=lambda number: values[number][slot])] for slot in range(STICKY_SLOTS)
    )


@lru_cache(maxsize=4096)
def _values(task_id: TaskId) -> memoryview:
    """How much a task values each slot."""
    return memoryview(shake_128(task_id.encode()).digest(4 * STICKY_SLOTS)).cast("I")


def _is_possible(port: TablePort) -> bool:
    """One that is not would keep all others from being published."""
    numbers = range(1, 65536)
    return port.protocol in PROTOCOLS and port.published in numbers and port.target in numbers


def _mesh_port(
    service: TableService, port: TablePort, serving: Iterable[TableEndpoint], node_id: NodeId
) -> MeshPort:
    chosen = tuple(serving)
    if port.options.prefers_local:
        chosen = tuple(endpoint for endpoint in chosen if endpoint.node_id == node_id) or chosen
    backends: dict[int, list[Backend]] = {4: [], 6: []}
    for endpoint in chosen:
        gate = gate_of(endpoint.addresses)
        if gate.ipv4:
            backends[4].append(Backend(endpoint.task_id, gate.ipv4, port.target))
        if gate.ipv6:
            backends[6].append(Backend(endpoint.task_id, gate.ipv6, port.target))
    return MeshPort(
        protocol=port.protocol,
        published=port.published,
        options=port.options,
        ipv4=tuple(backends[4]),
        ipv6=tuple(backends[6]),
    )
