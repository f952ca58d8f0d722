"""Plans the namespace for a node's probes, which has a VXLAN device like an overlay.  Pure.

A node's probe address contains 24 bits of the hash of its id.  One node in ten thousand has two peers with the same
address.  Only the one with the lower id is then probed over VXLAN.
"""

from collections.abc import Mapping
from hashlib import sha256
from ipaddress import IPv4Address, ip_address

import msgspec

from skep.dataplane.addresses import mac_of
from skep.dataplane.netns.state import Address, EntryKind, Link, NamespaceState, NeighborEntry, Vxlan
from skep.dataplane.plan.nat import sound as sound_tunnels
from skep.dataplane.plan.overlay import OVERHEAD_V4, OVERHEAD_V6, OVERLAY_SYSCTLS, Underlay, plain_address
from skep.model.networks.addresses import PORT_MAX
from skep.model.networks.paths import PROBE_VNI, PathPeer, ProbeTargets
from skep.model.swarm import DEFAULT_DATA_PATH_PORT
from skep.model.values.ids import NodeId

DEVICE = "probe"
PORT = 4787
"""UDP and TCP port of probes.  Any port would do, because nothing else uses ports in the namespace."""
IP_UDP_BYTES = 28
"""Length of the IPv4 and UDP headers."""
# 10.0.0.0/8 as a number, and its hosts.  So many addresses make it unlikely that two nodes share one.
_NETWORK = 10 << 24
_HOSTS = (1 << 24) - 2
_LENGTH = 8
"""Prefix length of the network of probe addresses."""


def number_of(node: NodeId) -> int:
    """Return a node's probe address as a number, in 10.0.0.0/8."""
    return _NETWORK + 1 + int.from_bytes(sha256(node.encode()).digest()[:8]) % _HOSTS


def address_of(node: NodeId) -> str:
    """Return a node's probe address, ``10.x.y.z``."""
    return str(IPv4Address(number_of(node)))


def overhead(underlay: str) -> int:
    """Return the bytes that VXLAN on this underlay adds around an inner packet."""
    return OVERHEAD_V6 if ":" in underlay else OVERHEAD_V4


def reached(targets: ProbeTargets) -> Mapping[str, PathPeer]:
    """Return the peers that are probed over VXLAN, by probe address.

    Peers with an underlay address of the other family are left out.  If peers have the same probe address, all but one
    are left out.
    """
    own, is_v6 = address_of(targets.node.node_id), ":" in targets.node.data_path
    found: dict[str, PathPeer] = {}
    for peer in sorted(targets.peers, key=lambda one: one.node_id):
        address = address_of(peer.node_id)
        if targets.node.data_path and peer.data_path and (":" in peer.data_path) == is_v6 and address != own:
            found.setdefault(address, peer)
    return found


def probe_state(targets: ProbeTargets, underlay: Underlay, *, offloads: bool | None) -> NamespaceState:
    """Return the desired state of the namespace.

    ``offloads`` is the device's setting of checksum offload, or None to leave it unchanged.
    """
    own = address_of(targets.node.node_id)
    entries = set()
    for address, peer in reached(targets).items():
        mac = mac_of(IPv4Address(address))
        entries.add(NeighborEntry(EntryKind.FORWARD, DEVICE, mac, plain_address(peer.data_path)))
        entries.add(NeighborEntry(EntryKind.NEIGHBOR, DEVICE, mac, address))
    return NamespaceState(
        links={
            DEVICE: Link(
                name=DEVICE,
                kind="vxlan",
                mtu=underlay.mtu - overhead(underlay.address),
                mac=mac_of(IPv4Address(own)),
                vxlan=Vxlan(
                    vni=PROBE_VNI,
                    port=targets.node.vxlan_port,
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


PEERS_MAX = 512
"""Maximum number of peers that a node probes."""


def sound(targets: ProbeTargets) -> ProbeTargets:
    """Return ``targets`` with at most ``PEERS_MAX`` peers, without the node itself and without invalid addresses."""
    peers = {peer.node_id: _sound(peer) for peer in targets.peers if peer.node_id != targets.node.node_id}
    return ProbeTargets(
        node=_sound(targets.node),
        peers=tuple(peers.values())[:PEERS_MAX],
        tunnels=sound_tunnels(targets.tunnels),
    )


def host_and_port(text: str) -> tuple[str, int]:
    """Split ``192.0.2.1:2377`` or ``[fd09::1]:2377``.  Raises: ValueError: ``text`` is neither."""
    host, _, port = text.rpartition(":")
    number = int(port)
    if not 0 < number <= PORT_MAX:
        raise ValueError(f"invalid port {port!r}")
    return str(ip_address(host.removeprefix("[").removesuffix("]"))), number


def _sound(peer: PathPeer) -> PathPeer:
    # Earlier versions used the port ten above for a forwarder, and WireGuard's ports follow it.
    has_port = 0 < peer.vxlan_port <= PORT_MAX - 16
    return msgspec.structs.replace(
        peer,
        data_path=peer.data_path if has_port and _is_address(peer.data_path) else "",
        vxlan_port=peer.vxlan_port if has_port else DEFAULT_DATA_PATH_PORT,
        control=peer.control if _is_host_and_port(peer.control) else "",
        etcd=peer.etcd if _is_host_and_port(peer.etcd) else "",
        gossip=peer.gossip if _is_host_and_port(peer.gossip) else "",
    )


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def _is_host_and_port(text: str) -> bool:
    try:
        host_and_port(text)
    except ValueError:
        return False
    return True
