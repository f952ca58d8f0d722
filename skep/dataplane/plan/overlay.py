"""The desired state of the node's namespaces, from tables and local containers.  Pure.

An overlay network has one bridge on a node, however many subnets it has, and one VXLAN device for each subnet's VXLAN
id.  The devices of an encrypted network send from the namespace of the WireGuard tunnels
(``skep.dataplane.wireguard``).  Everything is configured in advance: where frames for an address are sent (``FORWARD``,
``PORT``), and the answer to a container that asks for an address (``NEIGHBOR``).  Nothing is flooded or learned, so an
address that is in no table is unreachable.  An endpoint is reached over the device of the subnet that contains its
first address.  Each container treats all subnets of its network as on-link, so that frames between subnets need no
router.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_interface, ip_network

import msgspec

from skep.dataplane.addresses import mac_for
from skep.dataplane.netns.state import (
    Address,
    EntryKind,
    Link,
    NamespaceState,
    NeighborEntry,
    Route,
    VethPeer,
    Vxlan,
)
from skep.dataplane.plan.wireguard import tunnel_mtu
from skep.model.networks.sandbox import Endpoint, Sandbox
from skep.model.networks.tables import NetworkHead, NetworkTable, ParentLink, Segment
from skep.model.values.ids import NetworkId, NodeId

INGRESS_BRIDGE = "skep-ingress"
"""The ingress network's bridge, in the node's own namespace."""
INGRESS_VXLAN = "skep-vx"
BRIDGE = "br0"
VXLAN = "vx"
OVERHEAD_V4, OVERHEAD_V6 = 50, 70
"""Bytes that VXLAN adds to a packet: its own header, UDP, IP, and the inner Ethernet header."""
USUAL_MTU = 1500
"""Ethernet's."""
IPV6_MTU_MIN = 1280
"""Smallest MTU with which IPv6 works.  Source: RFC 8200, section 5."""
LOOPBACK, LOOPBACK_MTU = "lo", 65536
"""Name of the loopback device, and its MTU as the kernel sets it."""

OVERLAY_SYSCTLS = {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/ip_forward": "0",
    "net/ipv6/conf/all/disable_ipv6": "1",
    "net/ipv6/conf/default/disable_ipv6": "1",
    "net/bridge/bridge-nf-call-iptables": "0",
    "net/bridge/bridge-nf-call-ip6tables": "0",
    "net/bridge/bridge-nf-call-arptables": "0",
}
"""Sysctls of a network's namespace.  Bridged frames are not routed traffic, so the kernel's IP chains must not see
them."""
INGRESS_SYSCTLS = {
    # A client on the node may use 127.0.0.1.  Packets from outside are dropped (chain ``raw`` of the mesh).
    f"net/ipv4/conf/{INGRESS_BRIDGE}/route_localnet": "1",
}
"""Sysctls of the node's own namespace."""


class LocalEndpoint(msgspec.Struct, frozen=True):
    """A container of this node on a network: its namespace and its endpoint."""

    netns: str
    endpoint: Endpoint


class Underlay(msgspec.Struct, frozen=True):
    """The node's address on the network between the nodes, and the MTU of its device.

    Args:
        mtu: The device's MTU.  For overlays, the largest packet that reaches the other nodes.
        offloads: Whether checksums inside VXLAN may be left to the network card, or None to leave the setting
            unchanged.
        netns: The namespace that has the address, or empty for the node's own.
    """

    address: str
    mtu: int = USUAL_MTU
    offloads: bool | None = None
    netns: str = ""


UNKNOWN_TUNNEL = Underlay("::", tunnel_mtu(USUAL_MTU, is_ipv6=False))
"""Underlay of an encrypted network whose table has not arrived yet."""


def mtu_of(head: NetworkHead, underlay: Underlay | None) -> int:
    """Return the MTU of a network's interfaces: the configured one, else the underlay's MTU minus the overhead.

    A network with IPv6 has at least 1280 (RFC 8200, section 5).  With less, the kernel removes IPv6 addresses.
    """
    if head.mtu:
        return head.mtu
    least = IPV6_MTU_MIN if any(":" in one.subnet for one in head.segments) else 0
    of_underlay = underlay or (UNKNOWN_TUNNEL if head.is_encrypted else Underlay(""))
    return max(least, of_underlay.mtu - (OVERHEAD_V6 if ":" in of_underlay.address else OVERHEAD_V4))


def network_state(
    head: NetworkHead,
    table: NetworkTable | None,
    endpoints: Sequence[LocalEndpoint],
    *,
    node_id: NodeId,
    underlay: Underlay | None,
    remote: frozenset[NeighborEntry],
) -> NamespaceState:
    """Return the desired state of one network on this node.  ``remote`` are its ``remote_entries``.

    Without a table, it has only the local containers and their bridge.  Without an ``underlay``, no other node is
    reachable.  For an encrypted network, ``table`` and ``underlay`` are those inside the tunnels.
    """
    bridge, mtu = bridge_of(head), mtu_of(head, underlay)
    devices = _devices(head, underlay, bridge, mtu) if table is not None else {}
    own = _own_addresses(head, table, node_id)
    links = {bridge: Link(name=bridge, kind="bridge", mtu=mtu, mac=mac_for(one.split("/")[0] for one in own))}
    links |= devices
    links |= {
        one.endpoint.port: Link(
            name=one.endpoint.port,
            kind="veth",
            mtu=mtu,
            master=bridge,
            is_closed_port=True,
            peer=VethPeer(netns=one.netns, interface=one.endpoint.interface, mac=one.endpoint.mac_address),
        )
        for one in endpoints
    }
    entries = _one_device_each(remote if devices else frozenset(), endpoints, table, node_id)
    return NamespaceState(
        links=links,
        addresses=frozenset(Address(bridge, one) for one in own),
        entries=entries,
        sysctls=(INGRESS_SYSCTLS if head.is_ingress else OVERLAY_SYSCTLS)
        | _sysctls(
            bridge,
            devices,
            is_dual=any(":" in one.subnet for one in head.segments),
        ),
    )


def bridge_of(head: NetworkHead) -> str:
    """Return the name of the network's bridge."""
    return INGRESS_BRIDGE if head.is_ingress else BRIDGE


def device_of(head: NetworkHead, segment: Segment) -> str:
    """Return the name of the device that carries a subnet to other nodes."""
    return f"{INGRESS_VXLAN if head.is_ingress else VXLAN}{segment.vni}"


def remote_entries(
    table: NetworkTable, node_id: NodeId, underlay: Underlay | None
) -> frozenset[NeighborEntry]:
    """Return the entries through which this node reaches the endpoints on other nodes, and the nodes' own addresses,
    over VXLAN.
    """
    if underlay is None:
        return frozenset()
    family = ":" in underlay.address
    reached = {
        node.id: node.underlay
        for node in table.nodes.values()
        if node.id != node_id and (":" in node.underlay) == family
    }
    found: set[NeighborEntry] = set()
    for endpoint in table.endpoints.values():
        if endpoint.node_id in reached:
            found.update(_entries(table.head, endpoint.addresses, reached[endpoint.node_id]))
    for node in table.nodes.values():
        if node.id in reached:
            found.update(_entries(table.head, node.addresses, reached[node.id]))
    return frozenset(found)


def check_sandbox(sandbox: Sandbox) -> None:
    """Check that networks can be built from a recorded sandbox.  Raises: ValueError, or any other error, if not."""
    for one in sandbox.endpoints:
        endpoint = LocalEndpoint(sandbox.netns, one)
        network_state(
            one.config.head, None, (endpoint,), node_id=NodeId(""), underlay=None, remote=frozenset()
        )
    container_state(sandbox, {one.network_id: (one.config.head, USUAL_MTU) for one in sandbox.endpoints})
    if sandbox.address:
        IPv4Address(sandbox.address)


def container_state(
    sandbox: Sandbox, networks: Mapping[NetworkId, tuple[NetworkHead, int]]
) -> NamespaceState:
    """Return a container's interfaces with their addresses, and its routes.

    ``networks`` has the current head and MTU of each of its networks.
    """
    links = {LOOPBACK: Link(name=LOOPBACK, kind="loopback", mtu=LOOPBACK_MTU)}
    addresses = {Address(LOOPBACK, "127.0.0.1/8")}
    routes: set[Route] = set()
    sysctls = dict(sandbox.sysctls)
    for endpoint in sandbox.endpoints:
        name, (head, mtu) = endpoint.interface, networks[endpoint.network_id]
        if head.parent is None:
            links[name] = Link(name=name, kind="veth", mtu=mtu, mac=endpoint.mac_address)
        else:
            links[name] = _on_parent(name, head, head.parent, endpoint.mac_address)
        held = [ip_interface(one) for one in endpoint.config.addresses]
        addresses |= {Address(name, str(one)) for one in held}
        if any(one.version == 6 for one in held):
            sysctls |= _ipv6_sysctls(name)
        versions = {one.version for one in held}
        reached = {one.network for one in held}
        for segment in head.segments:
            subnet = subnet_of(segment.subnet)
            if subnet not in reached and subnet.version in versions:
                routes.add(Route(name, str(subnet)))
    if sandbox.interface and sandbox.address:
        links[sandbox.interface] = Link(
            name=sandbox.interface, kind="veth", mtu=USUAL_MTU, mac=sandbox.mac_address
        )
        addresses.add(Address(sandbox.interface, f"{sandbox.address}/{sandbox.prefix_length}"))
    if sandbox.interface and sandbox.address6:
        addresses.add(Address(sandbox.interface, f"{sandbox.address6}/64"))
        sysctls |= _ipv6_sysctls(sandbox.interface)
    routes.update(_default_routes(sandbox, networks))
    return NamespaceState(
        links=links, addresses=frozenset(addresses), routes=frozenset(routes), sysctls=sysctls
    )


def _default_routes(
    sandbox: Sandbox, networks: Mapping[NetworkId, tuple[NetworkHead, int]]
) -> Collection[Route]:
    """Return the default route of each IP version: through the gateway with the highest priority.

    Of equal priorities, the gateway bridge comes first, because published ports reply through it, and then the networks
    in their order.
    """
    choices: list[tuple[int, Collection[Route]]] = []
    shared = [one.config.gw_priority for one in sandbox.endpoints if _uses_gateway_bridge(one.config.head)]
    if sandbox.is_open:
        shared.append(0)  # the priority of the network ``bridge``
    if sandbox.interface and sandbox.address:
        choices.append((max(shared, default=0), _bridge_routes(sandbox)))
    for endpoint in sandbox.endpoints:
        head, _ = networks[endpoint.network_id]
        if head.parent is not None:
            choices.append((endpoint.config.gw_priority, _parent_routes(endpoint.interface, head)))
    found: dict[str, Route] = {}
    for _, routes in sorted(choices, key=lambda choice: -choice[0]):
        for route in routes:
            found.setdefault(route.destination, route)
    return found.values()


def _uses_gateway_bridge(head: NetworkHead) -> bool:
    return head.parent is None and not head.is_internal


def _bridge_routes(sandbox: Sandbox) -> Collection[Route]:
    routes = [Route(sandbox.interface, "0.0.0.0/0", sandbox.gateway)]
    if sandbox.address6:
        routes.append(Route(sandbox.interface, "::/0", sandbox.gateway6))
    return routes


def _on_parent(name: str, head: NetworkHead, parent: ParentLink, mac: str) -> Link:
    return Link(
        name=name,
        kind=parent.kind,
        mtu=head.mtu,
        mac="" if parent.kind == "ipvlan" else mac,  # an ipvlan device has its parent's MAC address
        parent=parent,
    )


def _parent_routes(name: str, head: NetworkHead) -> Collection[Route]:
    """Return the default routes on a parent device: through the gateways, or without a gateway for ipvlan modes that
    route.
    """
    if head.is_internal:
        return ()
    is_router = head.parent is not None and head.parent.mode in ("l3", "l3s")
    return [
        Route(name, "::/0" if ":" in one.subnet else "0.0.0.0/0", "" if is_router else one.gateway)
        for one in head.segments
        if is_router or one.gateway
    ]


def _ipv6_sysctls(interface: str) -> dict[str, str]:
    """Return the IPv6 sysctls of an interface: no duplicate address detection, and no routes except Skep's."""
    return {
        f"net/ipv6/conf/{interface}/accept_dad": "0",
        f"net/ipv6/conf/{interface}/accept_ra": "0",
        f"net/ipv6/conf/{interface}/addr_gen_mode": "0",
        f"net/ipv6/conf/{interface}/disable_ipv6": "0",
    }


def just_made(wanted: NamespaceState, sysctls: Mapping[str, str]) -> NamespaceState:
    """Return the state of a container's namespace whose interfaces have just been created: down and unconfigured.

    ``sysctls`` were set when the namespace was created.
    """
    return NamespaceState(
        links={
            name: msgspec.structs.replace(link, is_up=False)
            for name, link in wanted.links.items()
            if link.parent is None  # links with a parent are created from inside the namespace
        },
        # The kernel adds these as soon as the interfaces are up.
        addresses=frozenset(one for one in wanted.addresses if one.interface.startswith(("127.", "fe80:"))),
        rules=frozenset(one for one in wanted.rules if not one.is_policy),
        sysctls={**dict.fromkeys(wanted.sysctls, ""), **sysctls},
    )


def _devices(head: NetworkHead, underlay: Underlay | None, bridge: str, mtu: int) -> dict[str, Link]:
    if underlay is None:
        return {}
    found = {}
    for segment in head.segments:
        name = device_of(head, segment)
        found[name] = Link(
            name=name,
            kind="vxlan",
            mtu=mtu,
            master=bridge,
            is_closed_port=True,
            vxlan=Vxlan(vni=segment.vni, port=head.port, local=plain_address(underlay.address)),
            offloads=underlay.offloads,
            sockets=underlay.netns,
        )
    return found


def _own_addresses(head: NetworkHead, table: NetworkTable | None, node_id: NodeId) -> list[str]:
    """Return the bridge's addresses.

    These are the gateways, which are the same on every node.  On the ingress network, they are the node's own
    addresses.
    """
    if not head.is_ingress:
        return [f"{one.gateway}/{subnet_of(one.subnet).prefixlen}" for one in head.segments if one.gateway]
    node = table.nodes.get(node_id) if table is not None else None
    found = []
    for address in node.addresses if node is not None else ():
        segment = _segment_of(head, address)
        if segment is not None:
            found.append(f"{address}/{subnet_of(segment.subnet).prefixlen}")
    return found


def _sysctls(bridge: str, devices: Iterable[str], *, is_dual: bool) -> dict[str, str]:
    sysctls = {f"net/ipv4/conf/{bridge}/rp_filter": "0"}
    if is_dual:
        for (
            device
        ) in devices:  # a device answers for neighbors only if IPv6 is enabled, but needs no address for that
            sysctls[f"net/ipv6/conf/{device}/addr_gen_mode"] = "1"
            sysctls[f"net/ipv6/conf/{device}/disable_ipv6"] = "0"
        sysctls[f"net/ipv6/conf/{bridge}/accept_dad"] = "0"
        sysctls[f"net/ipv6/conf/{bridge}/disable_ipv6"] = "0"
    return sysctls


def _entries(head: NetworkHead, addresses: Sequence[str], underlay: str) -> Iterable[NeighborEntry]:
    segment = next((found for one in addresses if (found := _segment_of(head, one)) is not None), None)
    if segment is None:
        return
    device, mac = device_of(head, segment), mac_for(addresses)
    yield NeighborEntry(EntryKind.PORT, device, mac)
    yield NeighborEntry(EntryKind.FORWARD, device, mac, plain_address(underlay))
    for address in addresses:
        yield NeighborEntry(EntryKind.NEIGHBOR, device, mac, plain_address(address))


def _one_device_each(
    remote: frozenset[NeighborEntry],
    attached: Sequence[LocalEndpoint],
    table: NetworkTable | None,
    node_id: NodeId,
) -> frozenset[NeighborEntry]:
    """Return all entries, with one device for each MAC address.

    If the table assigns an address to another node, the remote entry is used, because a container here may be about to
    end and still hold the address.  If two containers here have it, the later one is used.
    """
    endpoints = table.endpoints.values() if table is not None else ()
    local = {mac_for(one.addresses) for one in endpoints if one.node_id == node_id}
    elsewhere = {one.mac for one in remote} - local
    ports = {one.endpoint.mac_address: one.endpoint.port for one in attached}
    here = {NeighborEntry(EntryKind.PORT, port, mac) for mac, port in ports.items() if mac not in elsewhere}
    return frozenset(one for one in remote if one.mac not in local) | here if local else remote | here


def _segment_of(head: NetworkHead, address: str) -> Segment | None:
    wanted = ip_address(address)
    return next((one for one in head.segments if wanted in subnet_of(one.subnet)), None)


@lru_cache(maxsize=4096)
def subnet_of(text: str) -> IPv4Network | IPv6Network:
    """Return ``ip_network(text)``.  Cached, because a table names few subnets for many addresses."""
    return ip_network(text)


def plain_address(text: str) -> str:
    """Return ``text`` in the kernel's spelling.  IPv4 has one spelling only."""
    return str(ip_address(text)) if ":" in text else text
