"""One node's part in the routing mesh and its nftables tables, from the ingress network's table.  Pure.

There is one table per address family, ``ip skep_ingress`` and ``ip6 skep_ingress``.  A packet to a local address of the
node is looked up in ``ports``, or in ``bound`` if a port listens on one address only.  These lead to the chain
``pick_<n>`` for a port with n backends, or to ``sticky``.  During a staged update it is ``pick_<n>_<m>_<p>``, which
first draws whether a connection is among the ``p`` percent for the ``m`` new backends.  All chains read the backend
from the map ``backends``.  A change of backends therefore changes elements of maps and no rules, which takes a tenth of
the time.  Only the first packet of a connection is looked up.  The others follow connection tracking, whatever changes.

A backend's address and port are in two maps, ``backends`` and ``targets``.  With a single map for both, nft 1.0.6 lists
the map wrongly and adds a test for TCP to rules that use it.

Packets for a port without a backend are sent nowhere else, so they reach the chain ``input``, which refuses them.

A port has rules only if the node holds its socket (``IngressPlan.held``).  If another program has the port, it has no
rules here, so that the program's clients reach the program.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from hashlib import shake_128
from ipaddress import ip_address, ip_network
from socket import IPPROTO_TCP

import msgspec

from skep.dataplane.netns.nft_table import Element, NftTable
from skep.dataplane.plan.drawing import Draw, numbered
from skep.dataplane.plan.flows import StalePort
from skep.model.networks.publishing import PublishOptions
from skep.model.networks.tables import NetworkTable, TableEndpoint, TablePort, TableService
from skep.model.staging.shares import ALL_PERCENT, shares_of
from skep.model.values.ids import NodeId, TaskId

PROTOCOLS = frozenset({"tcp", "udp", "sctp"})
STICKY_SLOTS = 256
"""Number of slots of a sticky port.  A client's address determines its slot, and each slot belongs to a task."""
BRIDGE = "skep-ingress"
_TABLE = "skep_ingress"
_STICKY = "sticky"
_STICKY_SEED = "0x736b6570"
"""Seed of the hash of client addresses.

The same on all nodes, so that a client reaches the same task through each node.
"""


PortKey = tuple[str, int, str]
"""Protocol, number and address of a socket that holds a port.

The address is empty for all IPv4 addresses, and ``::`` for all IPv6 addresses.
"""


class Backend(msgspec.Struct, frozen=True, order=True):
    """A serving task, by its address on the ingress network."""

    task_id: TaskId
    address: str
    port: int
    is_new: bool = False
    """Whether it gets ``MeshPort.percent`` of the connections, together with the other new tasks."""


class MeshPort(msgspec.Struct, frozen=True, kw_only=True):
    """A published port, and for each address family its backends in the order of task ids."""

    protocol: str
    published: int
    options: PublishOptions = PublishOptions()
    ipv4: tuple[Backend, ...] = ()
    ipv6: tuple[Backend, ...] = ()
    percent: int = 0
    """Share of new connections for new tasks during a staged update."""

    @property
    def keys(self) -> tuple[PortKey, ...]:
        """The sockets that hold the port: one for each address family on which it is published."""
        host_ip = self.options.host_ip
        addresses = (host_ip if host_ip != "0.0.0.0" else "",) if host_ip else ("", "::")
        return tuple((self.protocol, self.published, address) for address in addresses)

    def backends(self, version: int) -> frozenset[tuple[str, int]]:
        """Return the address and port of each backend of one IP version."""
        return frozenset(
            (backend.address, backend.port) for backend in (self.ipv4 if version == 4 else self.ipv6)
        )


class IngressNode(msgspec.Struct, frozen=True, order=True):
    """The addresses of a node that forwards connections, on the ingress network.

    Empty for a family without an address.
    """

    ipv4: str
    ipv6: str = ""


class IngressPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One node's part in the routing mesh.  The default plan takes no part."""

    ports: tuple[MeshPort, ...] = ()
    subnets: tuple[str, ...] = ()
    nodes: tuple[IngressNode, ...] = ()
    own: IngressNode = IngressNode("")
    held: frozenset[PortKey] = frozenset()
    """Sockets that the node holds.  A port in ``ports`` without such a socket has no effect."""

    def in_force(self, *versions: int) -> Iterator[tuple[MeshPort, PortKey]]:
        """Yield each port with each socket of IP ``versions`` that the node holds for it."""
        for port in self.ports:
            for key in port.keys:
                if key in self.held and version_of(key) in versions:
                    yield port, key

    @property
    def has_ipv6(self) -> bool:
        """Whether tasks have IPv6 addresses on the ingress network."""
        return any(ip_network(subnet).version == 6 for subnet in self.subnets)


def version_of(key: PortKey) -> int:
    """Return the IP version of a socket."""
    return 6 if ":" in key[2] else 4


def is_any(address: str) -> bool:
    """Return whether a socket with this ``address`` (``PortKey``) is bound to every address of its family."""
    return address in ("", "::")


def present_table(tables: Iterable[NetworkTable], node_id: NodeId) -> NetworkTable | None:
    """Return the table of the ingress network, or None without one.

    A removed ingress network keeps its table until its last task has ended, but nodes have no addresses there.
    """

    def order(table: NetworkTable) -> tuple[bool, bool]:
        own = table.nodes.get(node_id)
        has_nodes = any(one.addresses for one in table.nodes.values())
        return own is not None and bool(own.addresses), has_nodes

    return max((one for one in tables if one.head.is_ingress), key=order, default=None)


def plan(table: NetworkTable, node_id: NodeId) -> IngressPlan:
    """Return the plan of the node ``node_id``, with no port held yet.

    If two services have the same port, which managers prevent, the service with the lower id gets it.
    """
    serving: dict[str, list[TableEndpoint]] = {}
    for _, endpoint in sorted(table.endpoints.items()):
        if endpoint.gets_connections:
            serving.setdefault(endpoint.service_id, []).append(endpoint)
    ports: dict[tuple[str, int], MeshPort] = {}
    for _, service in sorted(table.services.items()):
        for port in service.ports:
            key = (port.protocol, port.published)
            if key not in ports and _is_possible(port):
                ports[key] = _mesh_port(service, port, serving.get(service.id, ()), node_id)
    own = table.nodes.get(node_id)
    return IngressPlan(
        ports=tuple(port for _, port in sorted(ports.items())),
        subnets=tuple(segment.subnet for segment in table.head.segments),
        nodes=tuple(
            sorted(
                one for node in table.nodes.values() if (one := addresses_of(node.addresses)).ipv4 or one.ipv6
            )
        ),
        own=addresses_of(own.addresses) if own else IngressNode(""),
    )


def addresses_of(addresses: Iterable[str]) -> IngressNode:
    """Return the first address of each family."""
    by_version = {ip_address(address).version: address for address in reversed(tuple(addresses))}
    return IngressNode(by_version.get(4, ""), by_version.get(6, ""))


def sticky_slots(backends: tuple[Backend, ...], percent: int = 0) -> tuple[Backend, ...]:
    """Return the backend of each slot, or an empty tuple without backends.

    Each slot belongs to the backend with the highest hash value for it (rendezvous hashing).  So all nodes agree, and a
    backend that is added or removed changes only its own slots.  During a staged update, a share of the slots belongs
    to new backends.  As the share grows, clients change from old backends to new ones and never back.
    """
    if not backends:
        return ()
    even, new = divided(backends)
    if not even or not new:
        return _owners(backends)
    changed = frozenset(_ORDER[: round(STICKY_SLOTS * percent / ALL_PERCENT)])
    return tuple(
        after if slot in changed else before
        for slot, (before, after) in enumerate(zip(_owners(even), _owners(new), strict=True))
    )


def _owners(backends: tuple[Backend, ...]) -> tuple[Backend, ...]:
    values = [_values(backend.task_id) for backend in backends]
    order = range(len(backends))
    return tuple(
        backends[max(order, key=lambda number: values[number][slot])] for slot in range(STICKY_SLOTS)
    )


def divided(backends: Iterable[Backend]) -> tuple[tuple[Backend, ...], tuple[Backend, ...]]:
    """Return the old and the new backends."""
    found = tuple(backends)
    return tuple(one for one in found if not one.is_new), tuple(one for one in found if one.is_new)


@lru_cache(maxsize=4096)
def _values(task_id: TaskId) -> memoryview:
    """Return the hash values of a task for each slot."""
    return memoryview(shake_128(task_id.encode()).digest(4 * STICKY_SLOTS)).cast("I")


_ORDER = tuple(sorted(range(STICKY_SLOTS), key=_values(TaskId("")).__getitem__))
"""The slots in the order in which they change to new backends, as if drawn."""


def _is_possible(port: TablePort) -> bool:
    """Return whether a port is valid.  An invalid port must be left out, or no port could be published."""
    numbers = range(1, 65536)
    return port.protocol in PROTOCOLS and port.published in numbers and port.target in numbers


def _mesh_port(
    service: TableService, port: TablePort, serving: Iterable[TableEndpoint], node_id: NodeId
) -> MeshPort:
    shares = shares_of(service, serving)
    backends: dict[int, list[Backend]] = {4: [], 6: []}
    for chosen, is_new in ((shares.even, False), (shares.new, True)):
        if port.options.prefers_local:
            chosen = tuple(endpoint for endpoint in chosen if endpoint.node_id == node_id) or chosen
        for endpoint in chosen:
            node = addresses_of(endpoint.addresses)
            if node.ipv4:
                backends[4].append(Backend(endpoint.task_id, node.ipv4, port.target, is_new))
            if node.ipv6:
                backends[6].append(Backend(endpoint.task_id, node.ipv6, port.target, is_new))
    return MeshPort(
        protocol=port.protocol,
        published=port.published,
        options=port.options,
        ipv4=tuple(backends[4]),
        ipv6=tuple(backends[6]),
        percent=shares.percent,
    )


# --- nftables ---------------------------------------------------------------------------------------------------------


class Family(msgspec.Struct, frozen=True):
    """An address family in nft's terms."""

    name: str
    address_type: str
    version: int

    @property
    def table(self) -> str:
        """Family and name of the nftables table."""
        return f"{self.name} {_TABLE}"


IPV4 = Family("ip", "ipv4_addr", 4)
IPV6 = Family("ip6", "ipv6_addr", 6)
FAMILIES = (IPV4, IPV6)


def ingress_table(plan: IngressPlan, family: Family) -> NftTable:
    """Return the table of ``family``, with the ports that the node holds.

    The table sends no packets of a port that user space serves (for the PROXY protocol, or for IPv6 if the tasks have
    none).  While no task serves it, it is refused like any other port.
    """
    key = "meta l4proto . th dport"
    held = tuple(plan.in_force(family.version))
    forwarded = [(port, key, backends) for port, key in held if (backends := _kernel_backends(port, family))]
    picks = sorted({_pick(port, backends) for port, _, backends in forwarded if not port.options.is_sticky})
    return NftTable(
        name=family.table,
        sets=(
            ("backends", f"typeof {key} . numgen random mod 65536 : {family.name} daddr"),
            ("targets", "type inet_proto . inet_service : inet_service"),
            ("ports", "type inet_proto . inet_service : verdict"),
            ("bound", f"type {family.address_type} . inet_proto . inet_service : verdict"),
            ("refused", "type inet_proto . inet_service"),
            ("bound_refused", f"type {family.address_type} . inet_proto . inet_service"),
        ),
        chains=(
            (_STICKY, ""),
            ("refuse", ""),
            ("raw", "{ type filter hook prerouting priority -300; }"),
            ("pre", "{ type nat hook prerouting priority -100; }"),
            ("out", "{ type nat hook output priority -100; }"),
            ("post", "{ type nat hook postrouting priority 100; }"),
            ("input", "{ type filter hook input priority 0; }"),
            ("forward", "{ type filter hook forward priority 0; }"),
            *((one.chain, "") for one in picks),
        ),
        rules=(
            *_rules(family),
            *((one.chain, rule) for one in picks for rule in one.rules(partial(_dnat, family))),
        ),
        elements=frozenset((*_forwarding_elements(forwarded), *_refusing_elements(held))),
    )


def _rules(family: Family) -> tuple[tuple[str, str], ...]:
    """Return the rules that do not depend on the published ports."""
    key, bound_key = "meta l4proto . th dport", f"{family.name} daddr . meta l4proto . th dport"
    return (
        (_STICKY, _dnat(family, f"jhash {family.name} saddr mod {STICKY_SLOTS} seed {_STICKY_SEED}")),
        ("refuse", "meta l4proto tcp reject with tcp reset"),
        ("refuse", "reject"),
        *([("raw", 'iifname != "lo" ip daddr 127.0.0.0/8 drop')] if family is IPV4 else []),
        # The kernel lets no packet from ::1 leave the node, so the net process relays such connections.
        *([("out", "ip6 daddr ::1 accept")] if family is IPV6 else []),
        *(
            (hook, f"fib daddr type local {rule}")
            for hook in ("pre", "out")
            for rule in (f"{bound_key} vmap @bound", f"{key} vmap @ports")
        ),
        # A task could not answer to the node's own address over the network.
        ("post", f'oifname "{BRIDGE}" fib saddr type local masquerade'),
        ("input", f"ct state new {bound_key} @bound_refused goto refuse"),
        ("input", f"ct state new {key} @refused goto refuse"),
        # Packets that these rules send to a task pass, and so do the responses.  No other packets pass from or to tasks
        # this way.
        ("forward", f'oifname "{BRIDGE}" ct state established,related accept'),
        ("forward", f'iifname "{BRIDGE}" ct state established,related accept'),
        ("forward", f'oifname "{BRIDGE}" ct status dnat accept'),
        ("forward", f'oifname "{BRIDGE}" drop'),
        ("forward", f'iifname "{BRIDGE}" drop'),
    )


def _kernel_backends(port: MeshPort, family: Family) -> tuple[Backend, ...]:
    """Return the backends to which the kernel sends a port's packets, or none if user space serves it."""
    if port.options.proxy_protocol:
        return ()
    return port.ipv4 if family is IPV4 else port.ipv6


def _forwarding_elements(ports: Iterable[tuple[MeshPort, PortKey, tuple[Backend, ...]]]) -> Iterable[Element]:
    for port, (protocol, number, address), backends in ports:
        key = f"{protocol} . {number}"
        pick = _STICKY if port.options.is_sticky else _pick(port, backends).chain
        is_bound = not is_any(address)
        yield (
            ("bound", f"{address} . {key} : goto {pick}") if is_bound else ("ports", f"{key} : goto {pick}")
        )
        yield "targets", f"{key} : {backends[0].port}"
        for slot, one in _numbered(port, backends):
            yield "backends", f"{key} . {slot} : {one.address}"


def _numbered(port: MeshPort, backends: tuple[Backend, ...]) -> Iterable[tuple[int, Backend]]:
    if port.options.is_sticky:
        return enumerate(sticky_slots(backends, port.percent))
    even, new = divided(backends)
    return numbered(even, new) if even and new else enumerate(backends)


def _pick(port: MeshPort, backends: tuple[Backend, ...]) -> Draw:
    even, new = divided(backends)
    return Draw("pick", len(even), len(new), port.percent) if even and new else Draw("pick", len(backends))


def _refusing_elements(ports: Iterable[tuple[MeshPort, PortKey]]) -> Iterable[Element]:
    for port, (protocol, number, address) in ports:
        if not port.ipv4 and not port.ipv6:
            key = f"{protocol} . {number}"
            yield ("refused", key) if is_any(address) else ("bound_refused", f"{address} . {key}")


def _dnat(family: Family, number: str) -> str:
    """Return the rule that sends a packet to the backend with this number."""
    key = "meta l4proto . th dport"
    return f"dnat {family.name} to {key} . {number} map @backends : {key} map @targets"


# --- flows ------------------------------------------------------------------------------------------------------------


def stale_ports(before: IngressPlan | None, after: IngressPlan, version: int) -> tuple[StalePort, ...]:
    """Return UDP ports that are new, have lost a backend or have got their first one, followed by unpublished ports."""
    before = before if before is not None else IngressPlan()
    earlier = {
        key: port.backends(version) for port, key in before.in_force(version) if port.protocol == "udp"
    }
    found, gone = [], set(earlier)
    # A new ingress network may replace a network with other subnets.
    subnets = tuple(dict.fromkeys((*after.subnets, *before.subnets)))
    for port, key in after.in_force(version):
        if port.protocol != "udp":
            continue
        gone.discard(key)
        backends, were = port.backends(version), earlier.get(key)
        # If a program of the node sends while no backend serves, it creates a flow to the node although the packet is
        # refused.
        if were is None or not backends >= were or (backends and not were):
            found.append(StalePort(port.published, backends, subnets, _destination(key)))
    return (
        *found,
        *(StalePort(key[1], frozenset(), before.subnets, _destination(key)) for key in sorted(gone)),
    )


def lose_tcp_backends(before: IngressPlan, after: IngressPlan) -> bool:
    """Return whether a TCP port of ``after`` has fewer backends than ``before``."""
    return any(
        not backends >= earlier.get(key, frozenset())
        for version in (4, 6)
        for earlier in (_tcp_backends(before, version),)
        for key, backends in _tcp_backends(after, version).items()
    )


def unaccepted_ports(plan: IngressPlan, version: int) -> tuple[StalePort, ...]:
    """Return the TCP ports that have backends, to find connections that were sent elsewhere and not accepted."""
    return tuple(
        StalePort(key[1], backends, plan.subnets, _destination(key), IPPROTO_TCP)
        for key, backends in _tcp_backends(plan, version).items()
        if backends
    )


def _tcp_backends(plan: IngressPlan, version: int) -> dict[PortKey, frozenset[tuple[str, int]]]:
    return {key: port.backends(version) for port, key in plan.in_force(version) if port.protocol == "tcp"}


def _destination(key: PortKey) -> str:
    """Return the address to which flows to a socket are sent, or an empty text if any address of the node is
    possible.
    """
    return "" if is_any(key[2]) else key[2]
