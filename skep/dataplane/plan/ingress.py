"""What one node does for the routing mesh, and its nftables tables, from the ingress network's table.  Pure.

One table per address family, ``ip skep_ingress`` and ``ip6 skep_ingress``.  A packet to a local address of the node
finds its port in ``ports`` (or ``bound``, by address and port, where a port listens on one address only), which sends
it to ``pick_<n>`` for a port with n backends, or to ``sticky``; these read the backend from ``backends``.  So a change
of backends changes elements of maps and no rule, in a tenth of the time.  Only the first packet of a connection comes
here; the others follow connection tracking, whatever changes.

Address and port of a backend are in two maps, ``backends`` and ``targets``: nft 1.0.6 reads a map whose data are
both back from the kernel wrongly, and adds a test for TCP to rules that use it.

A port without a backend is refused by ``input``, which its packets reach because no rule leads them elsewhere.
"""

from collections.abc import Iterable
from functools import lru_cache
from hashlib import shake_128
from ipaddress import ip_address, ip_network
from socket import IPPROTO_UDP

import msgspec

from skep.dataplane.netns.nft_table import Element, NftTable
from skep.dataplane.netns.state import Flow
from skep.model.ids import NodeId, TaskId
from skep.model.publishing import PublishOptions
from skep.model.tables import Table, TableEndpoint, TablePort, TableService

PROTOCOLS = frozenset({"tcp", "udp", "sctp"})
STICKY_SLOTS = 256
"""Clients are assigned to this many slots by their address, and slots to tasks."""
BRIDGE = "skep-ingress"
_TABLE = "skep_ingress"
_STICKY = "sticky"
_STICKY_SEED = "0x736b6570"
"""The same on all nodes, so that a client meets its task through each of them."""


PortKey = tuple[str, int, str]
"""Protocol, published port, the only address or empty."""


class Backend(msgspec.Struct, frozen=True, order=True):
    """A serving task, by its address on the ingress network."""

    task_id: TaskId
    address: str
    port: int


class MeshPort(msgspec.Struct, frozen=True, kw_only=True):
    """A published port and its backends, by address family, in the order of task ids."""

    protocol: str
    published: int
    options: PublishOptions = PublishOptions()
    ipv4: tuple[Backend, ...] = ()
    ipv6: tuple[Backend, ...] = ()

    @property
    def answers_ipv4(self) -> bool:
        """Whether it is published on IPv4 addresses of the node."""
        return self.options.host_ip == "" or ip_address(self.options.host_ip).version == 4

    @property
    def answers_ipv6(self) -> bool:
        """Whether it is published on IPv6 addresses of the node."""
        return self.options.host_ip == "" or ip_address(self.options.host_ip).version == 6

    @property
    def key(self) -> PortKey:
        """Protocol, port, and the only address that it is published on (empty: all)."""
        return self.protocol, self.published, self.only_address

    def backends(self, version: int) -> frozenset[str]:
        """Addresses of one IP version."""
        return frozenset(backend.address for backend in (self.ipv4 if version == 4 else self.ipv6))

    @property
    def only_address(self) -> str:
        """The only address it answers on; empty: every one of its family."""
        host_ip = self.options.host_ip
        return "" if not host_ip or ip_address(host_ip).is_unspecified else host_ip


class IngressNode(msgspec.Struct, frozen=True, order=True):
    """A node that connections come through: its own addresses on the ingress network; empty: it has none."""

    ipv4: str
    ipv6: str = ""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All that one node does.  The empty plan: it takes no part."""

    ports: tuple[MeshPort, ...] = ()
    subnets: tuple[str, ...] = ()
    nodes: tuple[IngressNode, ...] = ()
    own: IngressNode = IngressNode("")

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
        nodes=tuple(
            sorted(
                one for node in table.nodes.values() if (one := addresses_of(node.addresses)).ipv4 or one.ipv6
            )
        ),
        own=addresses_of(own.addresses) if own else IngressNode(""),
    )


def addresses_of(addresses: Iterable[str]) -> IngressNode:
    """The first address of each family."""
    by_version = {ip_address(address).version: address for address in reversed(tuple(addresses))}
    return IngressNode(by_version.get(4, ""), by_version.get(6, ""))


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
        node = addresses_of(endpoint.addresses)
        if node.ipv4:
            backends[4].append(Backend(endpoint.task_id, node.ipv4, port.target))
        if node.ipv6:
            backends[6].append(Backend(endpoint.task_id, node.ipv6, port.target))
    return MeshPort(
        protocol=port.protocol,
        published=port.published,
        options=port.options,
        ipv4=tuple(backends[4]),
        ipv6=tuple(backends[6]),
    )


# --- nftables ---------------------------------------------------------------------------------------------------------


class Family(msgspec.Struct, frozen=True):
    """An address family in nft's terms."""

    name: str
    address_type: str

    @property
    def table(self) -> str:
        """Family and name of the nftables table."""
        return f"{self.name} {_TABLE}"


IPV4 = Family("ip", "ipv4_addr")
IPV6 = Family("ip6", "ipv6_addr")
FAMILIES = (IPV4, IPV6)


def ingress_table(plan: Plan, family: Family) -> NftTable:
    """The table of ``family``.

    A port that user space serves (the PROXY protocol; IPv6 while the tasks have none) is led nowhere, but is refused
    as any other while no task serves it.
    """
    key = "meta l4proto . th dport"
    led = [(port, backends) for port in plan.ports if (backends := _led_to(port, family))]
    picks = sorted({len(backends) for port, backends in led if not port.options.is_sticky})
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
            *((f"pick_{count}", "") for count in picks),
        ),
        rules=(
            *_rules(family),
            *((f"pick_{count}", _dnat(family, f"numgen random mod {count}")) for count in picks),
        ),
        elements=frozenset((*_led(led), *_refused(plan, family))),
    )


def _rules(family: Family) -> tuple[tuple[str, str], ...]:
    """Those that are the same whatever is published."""
    key, bound_key = "meta l4proto . th dport", f"{family.name} daddr . meta l4proto . th dport"
    return (
        (_STICKY, _dnat(family, f"jhash {family.name} saddr mod {STICKY_SLOTS} seed {_STICKY_SEED}")),
        ("refuse", "meta l4proto tcp reject with tcp reset"),
        ("refuse", "reject"),
        *([("raw", 'iifname != "lo" ip daddr 127.0.0.0/8 drop')] if family is IPV4 else []),
        # The kernel lets no packet of ::1 leave the node: user space serves it.
        *([("out", "ip6 daddr ::1 accept")] if family is IPV6 else []),
        *(
            (chain, f"fib daddr type local {rule}")
            for chain in ("pre", "out")
            for rule in (f"{bound_key} vmap @bound", f"{key} vmap @ports")
        ),
        # A client on the node itself has no address that a task could answer to by way of the network.
        ("post", f'oifname "{BRIDGE}" fib saddr type local masquerade'),
        ("input", f"ct state new {bound_key} @bound_refused goto refuse"),
        ("input", f"ct state new {key} @refused goto refuse"),
        # What was led to a task passes, and the responses; there is no other way through here to tasks or from them.
        ("forward", f'oifname "{BRIDGE}" ct state established,related accept'),
        ("forward", f'iifname "{BRIDGE}" ct state established,related accept'),
        ("forward", f'oifname "{BRIDGE}" ct status dnat accept'),
        ("forward", f'oifname "{BRIDGE}" drop'),
        ("forward", f'iifname "{BRIDGE}" drop'),
    )


def _led_to(port: MeshPort, family: Family) -> tuple[Backend, ...]:
    """The backends that the kernel leads a port to; empty: it does not."""
    is_answered = port.answers_ipv4 if family is IPV4 else port.answers_ipv6
    if not is_answered or port.options.proxy_protocol:
        return ()
    return port.ipv4 if family is IPV4 else port.ipv6


def _led(ports: Iterable[tuple[MeshPort, tuple[Backend, ...]]]) -> Iterable[Element]:
    for port, backends in ports:
        key, bound = f"{port.protocol} . {port.published}", port.only_address
        chain = _STICKY if port.options.is_sticky else f"pick_{len(backends)}"
        yield ("bound", f"{bound} . {key} : goto {chain}") if bound else ("ports", f"{key} : goto {chain}")
        yield "targets", f"{key} : {backends[0].port}"
        chosen = sticky_slots(backends) if port.options.is_sticky else backends
        for number, one in enumerate(chosen):
            yield "backends", f"{key} . {number} : {one.address}"


def _refused(plan: Plan, family: Family) -> Iterable[Element]:
    for port in plan.ports:
        is_answered = port.answers_ipv4 if family is IPV4 else port.answers_ipv6
        if is_answered and not port.ipv4 and not port.ipv6:
            key, bound = f"{port.protocol} . {port.published}", port.only_address
            yield ("bound_refused", f"{bound} . {key}") if bound else ("refused", key)


def _dnat(family: Family, number: str) -> str:
    """Lead to the backend of this number."""
    key = "meta l4proto . th dport"
    return f"dnat {family.name} to {key} . {number} map @backends : {key} map @targets"


# --- flows ------------------------------------------------------------------------------------------------------------


class StalePort(msgspec.Struct, frozen=True):
    """A published UDP port whose flows to anything but ``backends`` are stale.

    They lead to a task of the ingress network (``subnets``) that serves no more, or to the node itself because they
    began before the port was published.  ``backends`` empty: they are to be refused, or led nowhere any more.
    """

    port: int
    backends: frozenset[str]
    subnets: tuple[str, ...]

    def is_stale(self, flow: Flow) -> bool:
        """Whether ``flow`` is one of those."""
        original, backend = flow.original, flow.reply.source
        if (
            original.protocol != IPPROTO_UDP
            or original.destination_port != self.port
            or backend in self.backends
        ):
            return False
        is_of_node = backend == original.destination
        return is_of_node or any(ip_address(backend) in ip_network(one) for one in self.subnets)


def stale_ports(before: Plan | None, after: Plan, version: int) -> tuple[StalePort, ...]:
    """UDP ports that are new, lost a backend, or are not published any more.  ``version``: of IP."""
    before = before if before is not None else Plan()
    earlier = {port.key: port.backends(version) for port in before.ports}
    found, gone = [], {port.published for port in before.ports if port.protocol == "udp"}
    for port in after.ports:
        if port.protocol != "udp":
            continue
        gone.discard(port.published)
        backends = port.backends(version)
        if port.key not in earlier or not backends >= earlier[port.key]:
            found.append(StalePort(port.published, backends, after.subnets))
    return (*found, *(StalePort(port, frozenset(), before.subnets) for port in sorted(gone)))
