"""What of a manager's tables can be acted on.  Pure.

Rules, neighbours and routes of all networks of a node are made in common transactions, so that one address that is
none would keep all the others from being written.  Whatever is said of one node, container, service or subnet is
parsed here and spelled anew from what was parsed; what cannot be is left out alone.
"""

from collections.abc import Callable, Iterable
from ipaddress import ip_network
from socket import AF_INET, inet_ntop, inet_pton
from typing import TypeVar

from msgspec.structs import replace

from skep.model.addresses import is_of_a_machine, parsed
from skep.model.network import MTUS
from skep.model.overlays import VXLAN_ID_MAX
from skep.model.publishing import PublishOptions
from skep.model.swarm import DEFAULT_DATA_PATH_PORT
from skep.model.tables import (
    NetworkHead,
    Segment,
    Table,
    TableChange,
    TableEndpoint,
    TableNode,
    TablePort,
    TableService,
    TableSet,
)

T = TypeVar("T")

_PORT_MAX = (1 << 16) - 1 - 16
"""Of a data path: the forwarder's port is ten above, and WireGuard's next to it."""

_NO_CONTAINERS = frozenset({0, 127, *range(224, 256)})
"""First bytes of IPv4 addresses that mean this host, this network or several hosts."""

Note = Callable[[str], object]
"""Told of each thing that is left out."""


def valid_set(news: TableSet, note: Note) -> TableSet:
    """``news`` without what cannot be acted on."""
    return replace(news, changes=tuple(_sound_change(one, note) for one in news.changes))


def valid_table(table: Table, note: Note) -> Table:
    """A whole table, as an earlier process kept it."""
    return replace(
        table,
        head=_head(table.head, note),
        nodes={one.id: one for one in _sound(table.nodes.values(), _node, note)},
        endpoints={one.task_id: one for one in _sound(table.endpoints.values(), _endpoint, note)},
        services={one.id: one for one in _sound(table.services.values(), _service, note)},
    )


def _sound_change(change: TableChange, note: Note) -> TableChange:
    """An entry that was sound before and is not any more goes: it is not as it was."""
    nodes = tuple(_sound(change.nodes, _node, note))
    endpoints = tuple(_sound(change.endpoints, _endpoint, note))
    services = tuple(_sound(change.services, _service, note))
    return replace(
        change,
        head=_head(change.head, note),
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


def _sound(entries: Iterable[T], check: Callable[[T], T], note: Note) -> Iterable[T]:
    for entry in entries:
        try:
            yield check(entry)
        except ValueError as error:
            note(f"{type(entry).__name__}: {error}")


def _head(head: NetworkHead, note: Note) -> NetworkHead:
    port = head.port if 0 < head.port <= _PORT_MAX else DEFAULT_DATA_PATH_PORT
    mtu = head.mtu if head.mtu == 0 or head.mtu in MTUS else 0
    return replace(head, segments=tuple(_sound(head.segments, _segment, note)), port=port, mtu=mtu)


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
    # One that a manager sees at the loopback is on the manager's own machine, alone.
    if not (is_of_a_machine(underlay) or underlay.is_loopback):
        raise ValueError(f"node {node.id} has the underlay address {node.underlay!r}")
    keys = tuple(one for one in node.wireguard_keys if one.is_valid)
    return replace(node, underlay=str(underlay), addresses=_addresses(node.addresses), wireguard_keys=keys)


def _endpoint(endpoint: TableEndpoint) -> TableEndpoint:
    addresses = _addresses(endpoint.addresses)
    # There are many, and nearly all are spelled as they should be.
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
        raise ValueError(f"port {port.published} is published on {host_ip}")
    options: PublishOptions = replace(port.options, host_ip=str(host_ip))
    return replace(port, options=options)


def _addresses(addresses: Iterable[str]) -> tuple[str, ...]:
    return tuple(map(_of_a_container, addresses))


def _of_a_container(text: str) -> str:
    """Without ``ipaddress`` for IPv4: a large table has tens of thousands.  Raises: ValueError."""
    if ":" in text:
        address = parsed(text)
        if address.is_multicast or address.is_unspecified or address.is_loopback:
            raise ValueError(f"{text} is no address of a container")
        return str(address)
    try:
        packed = inet_pton(AF_INET, text)
    except OSError:
        raise ValueError(f"{text!r} is no address") from None
    if packed[0] in _NO_CONTAINERS:
        raise ValueError(f"{text} is no address of a container")
    return inet_ntop(AF_INET, packed)
