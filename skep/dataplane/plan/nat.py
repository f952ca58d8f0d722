"""Plans this node's end of the tunnels through NAT, from what managers have sent.  Pure.

The tunnels are one WireGuard device in the node's own namespace.  A node behind NAT has its underlay address on it, and
sends everything from that address through it.  So VXLAN, encrypted networks and images reach such a node, and come
from it, as if the address were on a network between the nodes.  A node that others reach keeps its own address, and has
a route to the addresses of nodes behind NAT.

The packets of two nodes behind different NATs pass a relay, which forwards only between addresses of such nodes.
"""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network

import msgspec

from skep.dataplane.netns.nft_table import NftTable
from skep.dataplane.netns.state import Address, Link, NamespaceState, Route, RoutingRule
from skep.dataplane.plan.wireguard import WireGuardDevice, WireGuardKey, WireGuardPeer
from skep.model.networks.addresses import is_of_a_machine
from skep.model.networks.data_planes import TUNNEL_NETWORK
from skep.model.networks.paths import NatPeer, NatTunnels
from skep.model.networks.used_ports import UsedPort
from skep.model.networks.wireguard import PublicKey

PEERS_MAX = 8192
"""Maximum number of tunnels of a node.  More than the 5,000 nodes of the largest clusters that were tried."""
ADDRESSES_MAX = 2000
"""Maximum number of addresses behind one peer, so that one message to the kernel has room for them."""
TABLE = "inet skep_nat"

_PRIORITY = 1043
"""Priority of the routing rule for packets from the own address inside the tunnels."""
_ROUTES = 1043
"""Number of the routing table with the way into the tunnels."""
_EVERYWHERE = "0.0.0.0/0"
_NETWORK = IPv4Network(TUNNEL_NETWORK)
_ICMP_TYPES = "destination-unreachable, time-exceeded, parameter-problem, echo-request"
"""Messages about packets that connection tracking does not follow.  VXLAN's are not followed."""


def sound(tunnels: NatTunnels | None) -> NatTunnels | None:
    """Return ``tunnels`` without invalid peers and addresses, or None if nothing can be done with them.

    ``left_out`` counts the addresses that exceed the bounds.
    """
    if tunnels is None or not _is_host(tunnels.address, in_tunnels=tunnels.is_behind_nat):
        return None
    taken: set[str] = {tunnels.address}
    peers: dict[bytes, NatPeer] = {}
    left_out = sum(len(peer.addresses) for peer in tunnels.peers[PEERS_MAX:])
    for peer in tunnels.peers[:PEERS_MAX]:
        addresses = [one for one in dict.fromkeys(peer.addresses) if _is_host(one) and one not in taken]
        is_valid = PublicKey(peer.key, peer.port).is_valid and (not peer.endpoint or _is_host(peer.endpoint))
        if is_valid and addresses and peer.key not in peers:
            kept = tuple(addresses[:ADDRESSES_MAX])
            left_out += len(addresses) - len(kept)
            peers[peer.key] = msgspec.structs.replace(peer, addresses=kept)
            taken.update(kept)
    relayed = tuple(one for one in tunnels.relayed if _is_host(one, in_tunnels=True))
    if not peers:
        return None
    return msgspec.structs.replace(tunnels, peers=tuple(peers.values()), relayed=relayed, left_out=left_out)


def condition(tunnels: NatTunnels | None) -> str:
    """Return a sentence about what ``tunnels`` do not carry, or an empty text."""
    if tunnels is None or not tunnels.left_out:
        return ""
    return (
        f"the tunnels through NAT leave out {tunnels.left_out} nodes, because a node has at most {PEERS_MAX} tunnels "
        f"and a relay passes on packets of {ADDRESSES_MAX} nodes: let more nodes relay, or remove nodes that are gone"
    )


def port_towards(tunnels: NatTunnels | None, address: str, own_port: int) -> int:
    """Return the UDP port on which the tunnel towards ``address`` is opened: of the node at its other end, or this
    node's ``own_port`` if the other one has to begin.
    """
    peers = tunnels.peers if tunnels is not None else ()
    return next((one.port for one in peers if one.endpoint and address in one.addresses), own_port)


def tunnel_device(tunnels: NatTunnels, pair: WireGuardKey, port: int) -> WireGuardDevice:
    """Return the desired configuration of the device."""
    return WireGuardDevice(
        private=pair.private,
        public=pair.public,
        port=port,
        peers={
            peer.key: WireGuardPeer(
                public=peer.key,
                endpoint=peer.endpoint,
                port=peer.port,
                inner=peer.addresses[0],
                relayed=peer.addresses[1:],
            )
            for peer in tunnels.peers
            if peer.key != pair.public
        },
    )


def tunnel_state(tunnels: NatTunnels, link: Link, *, has_address: bool = True) -> NamespaceState:
    """Return the desired state of the node's own namespace: the device ``link``, with its address, routes and rules.

    ``has_address``: whether the machine has the address of a node that others reach.  If it is translated outside of
    the machine, as in many clouds, the device has it, so that packets in the tunnels arrive and leave with it.
    """
    name, own = link.name, tunnels.address
    is_on_device = tunnels.is_behind_nat or not has_address
    settings = f"net/ipv4/conf/{name}"
    return NamespaceState(
        links={name: link},
        addresses=frozenset({Address(name, f"{own}/32")} if is_on_device else ()),
        routes=frozenset(
            {
                Route(name, TUNNEL_NETWORK, source=own),
                *([Route(name, _EVERYWHERE, table=_ROUTES)] if tunnels.is_behind_nat else ()),
            }
        ),
        rules=frozenset({RoutingRule(4, _PRIORITY, _ROUTES, source=own)} if tunnels.is_behind_nat else ()),
        sysctls={
            f"{settings}/forwarding": "1" if tunnels.relayed else "0",
            f"{settings}/send_redirects": "0",
        },
    )


def tunnel_filter(tunnels: NatTunnels, name: str, ports: Iterable[UsedPort]) -> NftTable:
    """Return the rules for the device ``name``.

    From the tunnels, packets reach only ``ports`` of this node's own address, and relays pass on packets between nodes
    behind NAT only.  No packet from elsewhere has an address inside the tunnels as its source.
    """
    open_ports = [("here", f'iifname "{name}" {protocol} dport {port} accept') for protocol, port in ports]
    return NftTable(
        name=TABLE,
        sets=(("relayed", "type ipv4_addr"),),
        chains=(
            ("arriving", "{ type filter hook prerouting priority -310; }"),
            ("here", "{ type filter hook input priority -10; }"),
            ("through", "{ type filter hook forward priority -10; }"),
        ),
        rules=(
            ("arriving", f'iifname != {{ "{name}", "lo" }} ip saddr {TUNNEL_NETWORK} drop'),
            ("here", f'iifname "{name}" ip daddr != {tunnels.address} drop'),
            # Responses to this node's own connections, and what path MTU discovery needs.
            ("here", f'iifname "{name}" ct state established,related accept'),
            ("here", f'iifname "{name}" icmp type {{ {_ICMP_TYPES} }} accept'),
            *open_ports,
            ("here", f'iifname "{name}" drop'),
            ("through", f'iifname "{name}" oifname "{name}" ip saddr @relayed ip daddr @relayed accept'),
            ("through", f'iifname "{name}" drop'),
            ("through", f'oifname "{name}" drop'),
        ),
        elements=frozenset(("relayed", one) for one in tunnels.relayed),
    )


def _is_host(text: str, *, in_tunnels: bool | None = None) -> bool:
    """Return whether ``text`` is an IPv4 address that a node may have."""
    try:
        address = IPv4Address(text)
    except ValueError:
        return False
    is_inside = address in _NETWORK
    return (is_inside or is_of_a_machine(address)) and in_tunnels in (None, is_inside)
