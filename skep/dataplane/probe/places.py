"""Where the probes of a node are: a namespace of their own with a VXLAN device, as overlays have.  Pure.

Its address is made of the node's id: 24 bits of its hash, of which two among a node's peers are the same for one node
in ten thousand.  A peer whose address another one has (the one whose id comes first has it) is not probed by VXLAN.
"""

from collections.abc import Mapping
from hashlib import sha256
from ipaddress import IPv4Address

from skep.dataplane.addresses import mac_of
from skep.dataplane.netns.state import Address, Entry, EntryKind, Link, State, Vxlan
from skep.dataplane.plan.overlay import OVERHEAD_V4, OVERHEAD_V6, OVERLAY_SYSCTLS, Underlay, plain_address
from skep.model.ids import NodeId
from skep.model.paths import PROBE_VNI, PathPeer, ProbeTargets

DEVICE = "probe"
PORT = 4787
"""UDP and TCP, inside: nothing else is in the namespace."""
IP_UDP_BYTES = 28
_NETWORK = 10 << 24
_HOSTS = (1 << 24) - 2
_LENGTH = 8


def number_of(node: NodeId) -> int:
    """A node's probe address as a number, in 10.0.0.0/8."""
    return _NETWORK + 1 + int.from_bytes(sha256(node.encode()).digest()[:8]) % _HOSTS


def address_of(node: NodeId) -> str:
    """``10.x.y.z``."""
    return str(IPv4Address(number_of(node)))


def overhead(underlay: str) -> int:
    """Bytes of an underlay's packet around the IP packet inside."""
    return OVERHEAD_V6 if ":" in underlay else OVERHEAD_V4


def reached(wish: ProbeTargets) -> Mapping[str, PathPeer]:
    """Peers that are probed by VXLAN, by probe address: those on an underlay of the same kind, one at each address."""
    own, is_v6 = address_of(wish.node.node_id), ":" in wish.node.data_path
    found: dict[str, PathPeer] = {}
    for peer in sorted(wish.peers, key=lambda one: one.node_id):
        address = address_of(peer.node_id)
        if wish.node.data_path and peer.data_path and (":" in peer.data_path) == is_v6 and address != own:
            found.setdefault(address, peer)
    return found


def probe_state(wish: ProbeTargets, underlay: Underlay, *, offloads: bool | None) -> State:
    """The namespace.  ``offloads``: of its device; None: as it is."""
    own = address_of(wish.node.node_id)
    entries = set()
    for address, peer in reached(wish).items():
        mac = mac_of(IPv4Address(address))
        entries.add(Entry(EntryKind.FORWARD, DEVICE, mac, plain_address(peer.data_path)))
        entries.add(Entry(EntryKind.NEIGHBOUR, DEVICE, mac, address))
    return State(
        links={
            DEVICE: Link(
                name=DEVICE,
                kind="vxlan",
                mtu=underlay.mtu - overhead(underlay.address),
                mac=mac_of(IPv4Address(own)),
                vxlan=Vxlan(
                    vni=PROBE_VNI,
                    port=wish.node.vxlan_port,
                    local=plain_address(underlay.address),
                    is_whole=True,
                ),
                offloads=offloads,
            ),
        },
        addresses=frozenset({Address(DEVICE, f"{own}/{_LENGTH}")}),
        entries=frozenset(entries),
        sysctls=OVERLAY_SYSCTLS,
    )
