"""Validates the tables that a manager sends.  Pure.

Rules, neighbors and routes of all networks of a node are written in common transactions, so a single malformed address
would make the whole transaction fail.  The addresses of each node, container, service and subnet are therefore parsed
and normalized here.  Only the entry with an invalid address is left out.
"""

from collections.abc import Callable, Iterable
from ipaddress import ip_network
from socket import AF_INET, inet_ntop, inet_pton
from typing import TypeVar

from msgspec.structs import replace

from skep.model.network import MTUS
from skep.model.networks.addresses import is_of_a_machine, parsed
from skep.model.networks.overlays import VXLAN_ID_MAX
from skep.model.networks.publishing import PublishOptions
from skep.model.networks.tables import (
    NetworkHead,
    NetworkTable,
    Segment,
    TableChange,
    TableEndpoint,
    TableNode,
    TablePort,
    TableService,
    TableSet,
)
from skep.model.networks.wireguard import KEYS_MAX
from skep.model.swarm import DEFAULT_DATA_PATH_PORT

T = TypeVar("T")

_PORT_MAX = (1 << 16) - 1 - 16
"""Highest allowed data path port.

Earlier versions also used the port ten above it, and WireGuard's ports follow that.
"""

_NO_CONTAINERS = frozenset({0, 127, *range(224, 256)})
"""First bytes of IPv4 addresses that no container can have: this network, loopback, multicast and reserved
addresses.
"""

OnInvalid = Callable[[str], object]
"""Called with the reason for each entry that is left out."""


def valid_set(tables: TableSet, on_invalid: OnInvalid) -> TableSet:
    """Return ``tables`` without invalid entries."""
    return replace(tables, changes=tuple(_valid_change(one, on_invalid) for one in tables.changes))


def valid_table(table: NetworkTable, on_invalid: OnInvalid) -> NetworkTable:
    """Return ``table``, which an earlier process has saved, without invalid entries."""
    return replace(
        table,
        head=_head(table.head, on_invalid),
        nodes={one.id: one for one in _valid(table.nodes.values(), _node, on_invalid)},
        endpoints={one.task_id: one for one in _valid(table.endpoints.values(), _endpoint, on_invalid)},
        services={one.id: one for one in _valid(table.services.values(), _service, on_invalid)},
    )


def _valid_change(change: TableChange, on_invalid: OnInvalid) -> TableChange:
    """Return ``change`` without invalid entries.

    An invalid entry becomes a removal, because it replaces an earlier entry that must no longer be used.
    """
    nodes = tuple(_valid(change.nodes, _node, on_invalid))
    endpoints = tuple(_valid(change.endpoints, _endpoint, on_invalid))
    services = tuple(_valid(change.services, _service, on_invalid))
    return replace(
        change,
        head=_head(change.head, on_invalid),
        nodes=nodes,
        endpoints=endpoints,
        services=services,
        removed_nodes=(*change.removed_nodes, *_missing((n.id for n in change.nodes), {n.id for n in nodes})),
        removed_endpoints=(
            *change.removed_endpoints,
            *_missing((e.task_id for e in change.endpoints), {e.task_id for e in endpoints}),
        ),
        removed_services=(
            *change.removed_services,
            *_missing((s.id for s in change.services), {s.id for s in services}),
        ),
    )


def _missing(ids: Iterable[T], kept: set[T]) -> list[T]:
    return [id for id in ids if id not in kept]


def _valid(entries: Iterable[T], check: Callable[[T], T], on_invalid: OnInvalid) -> Iterable[T]:
    for entry in entries:
        try:
            yield check(entry)
        except ValueError as error:
            on_invalid(f"{type(entry).__name__}: {error}")


def _head(head: NetworkHead, on_invalid: OnInvalid) -> NetworkHead:
    port = head.port if 0 < head.port <= _PORT_MAX else DEFAULT_DATA_PATH_PORT
    mtu = head.mtu if head.mtu == 0 or head.mtu in MTUS else 0
    return replace(head, segments=tuple(_valid(head.segments, _segment, on_invalid)), port=port, mtu=mtu)


def _segment(segment: Segment) -> Segment:
    if "%" in segment.subnet:
        raise ValueError(f"subnet {segment.subnet!r} has a scope")
    subnet = ip_network(segment.subnet)
    gateway = str(parsed(segment.gateway)) if segment.gateway else ""
    if not 0 < segment.vni <= VXLAN_ID_MAX:
        raise ValueError(f"invalid vxlan id {segment.vni}")
    return Segment(subnet=str(subnet), gateway=gateway, vni=segment.vni)


def _node(node: TableNode) -> TableNode:
    underlay = parsed(node.underlay)
    # A manager sees a node on its own machine at a loopback address.
    if not (is_of_a_machine(underlay) or underlay.is_loopback):
        raise ValueError(f"node {node.id} has the underlay address {node.underlay!r}")
    keys = tuple(one for one in node.wireguard_keys[:KEYS_MAX] if one.is_valid)
    return replace(node, underlay=str(underlay), addresses=_addresses(node.addresses), wireguard_keys=keys)


def _endpoint(endpoint: TableEndpoint) -> TableEndpoint:
    addresses = _addresses(endpoint.addresses)
    # There are many addresses, and nearly all are already normalized.
    return endpoint if addresses == endpoint.addresses else replace(endpoint, addresses=addresses)


def _service(service: TableService) -> TableService:
    return replace(
        service, virtual_ips=_addresses(service.virtual_ips), ports=tuple(map(_port, service.ports))
    )


def _port(port: TablePort) -> TablePort:
    if not port.options.host_ip:
        return port
    host_ip = parsed(port.options.host_ip)
    if host_ip.is_multicast:
        raise ValueError(f"port {port.published} is published on the multicast address {host_ip}")
    options: PublishOptions = replace(port.options, host_ip=str(host_ip))
    return replace(port, options=options)


def _addresses(addresses: Iterable[str]) -> tuple[str, ...]:
    return tuple(map(_container_address, addresses))


def _container_address(text: str) -> str:
    """Return the normalized address.  IPv4 avoids ``ipaddress``, because a large table has tens of thousands.

    Raises: ValueError."""
    if ":" in text:
        address = parsed(text)
        if address.is_multicast or address.is_unspecified or address.is_loopback:
            raise ValueError(f"{text} is not an address of a container")
        return str(address)
    try:
        packed = inet_pton(AF_INET, text)
    except OSError:
        raise ValueError(f"{text!r} is not an address") from None
    if packed[0] in _NO_CONTAINERS:
        raise ValueError(f"{text} is not an address of a container")
    return inet_ntop(AF_INET, packed)
