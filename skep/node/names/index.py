"""A network's table ordered by name and by address, built once for each version of it."""

import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network

import msgspec

from skep.model.ids import NetworkId, ServiceId
from skep.model.tables import Table, TableEndpoint, TableService
from skep.node.names.messages import key

IPV4_BYTES = 4


class Known(msgspec.Struct, frozen=True):
    """What a name stands for.  Addresses are packed.

    ``services``: those whose virtual addresses are among them.
    """

    ipv4: tuple[bytes, ...] = ()
    ipv6: tuple[bytes, ...] = ()
    services: frozenset[ServiceId] = frozenset()


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """``names`` are spelled as in questions, without the network's own as a suffix."""

    id: NetworkId
    name: str
    names: Mapping[str, Known] = {}
    reverse: Mapping[str, tuple[str, ServiceId]] = {}
    """From an address to what is there, and the service if the address is virtual."""
    services: Mapping[str, tuple[ServiceId, ...]] = {}
    """From names and aliases of services."""
    serving: Mapping[ServiceId, tuple[tuple[str, tuple[str, ...]], ...]] = {}
    """Names and addresses of the tasks that serve."""
    subnets: tuple[IPv4Network | IPv6Network, ...] = ()


def build(table: Table) -> Index:
    """The index of ``table``.  Names that several things claim stand for all of them, as with Docker.

    The ingress network has no names.  A name whose tasks do not serve is known, and has no address.
    Source: moby, libnetwork/service_common.go (addEndpointNameResolution).
    """
    head = table.head
    if head.is_ingress:
        return Index(id=head.id, name=key(head.name))
    addresses: dict[str, list[bytes]] = defaultdict(list)
    virtual: dict[str, set[ServiceId]] = defaultdict(set)
    services: dict[str, list[ServiceId]] = defaultdict(list)
    reverse: dict[str, tuple[str, ServiceId]] = {}
    tasks: dict[ServiceId, list[tuple[TableEndpoint, list[bytes]]]] = defaultdict(list)
    for _, endpoint in sorted(table.endpoints.items()):
        packed = [_packed(one) for one in endpoint.addresses]
        if endpoint.name:
            for address in endpoint.addresses:
                reverse.setdefault(address, (endpoint.name, ServiceId("")))
        for name in (endpoint.name, *endpoint.aliases):
            if name:
                addresses[key(name)] += packed if endpoint.is_serving else []
        tasks[endpoint.service_id].append((endpoint, packed))
    for id, service in sorted(table.services.items()):
        for address in service.virtual_ips:
            reverse[address] = (service.name, id)
        for name in map(key, _names(service)):
            services[name].append(id)
            if service.virtual_ips:
                virtual[name].add(id)
            addresses[name] += map(_packed, service.virtual_ips)
            _add_tasks(addresses, name, tasks[id], is_round_robin=not service.virtual_ips)
    return Index(
        id=head.id,
        name=key(head.name),
        names={name: _known(found, virtual.get(name, ())) for name, found in addresses.items()},
        reverse=reverse,
        services={name: tuple(ids) for name, ids in services.items()},
        serving={
            id: tuple((task.name, task.addresses) for task, _ in tasks[id] if task.is_serving)
            for id in table.services
        },
        subnets=tuple(ip_network(segment.subnet, strict=False) for segment in head.segments),
    )


def _add_tasks(
    addresses: dict[str, list[bytes]],
    name: str,
    tasks: Iterable[tuple[TableEndpoint, list[bytes]]],
    *,
    is_round_robin: bool,
) -> None:
    """``tasks.<name>``, ``all.tasks.<name>`` and ``<slot>.<name>``; and ``<name>`` itself."""
    ready, everyone = addresses[f"tasks.{name}"], addresses[f"all.tasks.{name}"]
    for task, packed in tasks:
        if task.is_running:
            everyone += packed
        serving = packed if task.is_serving else []
        ready += serving
        if task.slot:
            addresses[f"{task.slot}.{name}"] += serving
        if is_round_robin:
            addresses[name] += serving


def _names(service: TableService) -> Iterable[str]:
    return dict.fromkeys((service.name, *service.aliases))


def _known(addresses: Iterable[bytes], services: Iterable[ServiceId]) -> Known:
    unique = dict.fromkeys(addresses)
    return Known(
        tuple(one for one in unique if len(one) == IPV4_BYTES),
        tuple(one for one in unique if len(one) != IPV4_BYTES),
        frozenset(services),
    )


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
