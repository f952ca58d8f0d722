"""Plans the WireGuard devices and peers between this node and the others.  Pure.

Every node that shares an encrypted network with this one is a peer by each key that it publishes.  Each key has an
address inside the tunnels (``inner_address``), which is the only source address that WireGuard accepts from that key.
The VXLANs of encrypted networks send only to these addresses.  ``tunnelled`` replaces the nodes' addresses in a
network's table by addresses inside the tunnels.

The devices are in a separate network namespace without other egress.  If no tunnel takes a packet of an encrypted
network, it is dropped there, so no packet can leave unencrypted.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from ipaddress import IPv6Address
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from skep.model.networks.reserved_ports import WIREGUARD_OFFSET
from skep.model.networks.tables import NetworkTable, TableNode
from skep.model.networks.wireguard import PublicKey
from skep.model.values.ids import NodeId
from skep.paths import DEFAULT_RUN

INNER_PORT_OFFSET = 12
"""Distance of the VXLAN port inside the tunnels from the port of unencrypted VXLAN (4801 by default).

Packets outside the tunnels never have this port.
"""
OVERHEAD_V4, OVERHEAD_V6 = 60, 80
"""Bytes that WireGuard adds to a packet: 32 for its header and tag, and the headers of UDP and IP.

Source: wireguard.com/protocol.
"""
PADDING = 16
"""WireGuard pads packets to a multiple of this, at most to the MTU of its device."""
KEEPALIVE_S = 25
"""Keepalive interval in seconds.

With it, sessions start at once, so that a key is known to work before traffic moves to it.
"""

_PREFIX = bytes.fromhex("fd736b6570656e63")
"""Unique local (RFC 4193): fd73:6b65:7065:6e63::/64.  It exists inside the tunnels' namespace only."""


class WireGuardKey(msgspec.Struct, frozen=True, kw_only=True):
    """A private key (X25519, 32 bytes) and the slot of the device that uses it.  Never logged or shown.

    ``made_at`` is in seconds since the machine booted.
    """

    private: bytes
    slot: int
    made_at: float

    @property
    def public(self) -> bytes:
        """The public key that peers have, 32 bytes."""
        return X25519PrivateKey.from_private_bytes(self.private).public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"KeyPair(slot={self.slot}, made_at={self.made_at})"


class WireGuardPeer(msgspec.Struct, frozen=True, kw_only=True):
    """One key of another node.

    Args:
        public: The public key, 32 bytes.
        endpoint: The node's underlay address, or empty if it is behind NAT.  WireGuard then learns it from the node's
            packets.
        inner: The address of this key inside the tunnels.
        relayed: Further addresses that are reached through this peer.
    """

    public: bytes
    endpoint: str
    port: int
    inner: str
    relayed: tuple[str, ...] = ()

    @property
    def allowed(self) -> tuple[str, ...]:
        """All addresses that this peer may send from, and that packets are sent to it for."""
        return (self.inner, *self.relayed)


class WireGuardDevice(msgspec.Struct, frozen=True, kw_only=True):
    """Desired configuration of a WireGuard device.  ``public`` is the public key of ``private``."""

    private: bytes
    public: bytes
    port: int
    peers: Mapping[bytes, WireGuardPeer] = {}

    def __repr__(self) -> str:
        return f"Device(port={self.port}, peers={len(self.peers)})"


class WireGuardPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The desired devices and peers of one node.

    Args:
        devices: The devices by slot, the oldest key first.
        peers: The peers by node, the oldest key first.
        sources: The tunnel address and VXLAN id of each allowed source of frames.
    """

    devices: Mapping[int, WireGuardDevice] = {}
    peers: Mapping[NodeId, tuple[WireGuardPeer, ...]] = {}
    sources: frozenset[tuple[str, int]] = frozenset()
    contested: tuple[NodeId, ...] = ()
    """Nodes that publish a key with the same inner address as another node's key.

    Such a key is used for neither node.
    """
    keyless: tuple[NodeId, ...] = ()
    """Nodes of encrypted networks without a usable key.  No frames are exchanged with them."""


Session = tuple[bytes, bytes]
"""A public key of this node and a public key of a peer, between which a handshake was completed.

Keys and not devices, because a handshake with one key does not tell whether the next key of the same device works.
"""


class KeyChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The key of each peer to which this node sends, and the slot of the device for each address inside the tunnels."""

    addresses: Mapping[NodeId, str] = {}
    slots: Mapping[str, int] = {}


class DeviceChange(msgspec.Struct, frozen=True, kw_only=True):
    """Changes that bring a device to its desired configuration.  ``removed`` is applied before ``put``.

    ``private`` is set together with the removal of all peers, so that no peer keeps a handshake of the previous key.
    """

    private: bytes | None = None
    port: int | None = None
    removed: tuple[bytes, ...] = ()
    put: tuple[WireGuardPeer, ...] = ()

    @property
    def is_needed(self) -> bool:
        """Whether anything has to change."""
        return self != DeviceChange()

    def __repr__(self) -> str:
        return f"Change(removed={len(self.removed)}, put={len(self.put)})"


class FoundPeer(msgspec.Struct, frozen=True, kw_only=True):
    """A peer as a device has it.  ``handshake_at`` is the time of the latest handshake in wall-clock seconds, or 0."""

    inner: tuple[str, ...] = ()
    keepalive_s: int = 0
    has_endpoint: bool = False
    handshake_at: float = 0.0


class FoundDevice(msgspec.Struct, frozen=True, kw_only=True):
    """The present configuration of a device."""

    private: bytes = b""
    port: int = 0
    peers: Mapping[bytes, FoundPeer] = {}

    def __repr__(self) -> str:
        return f"FoundDevice(port={self.port}, peers={len(self.peers)})"


@lru_cache(maxsize=4096)
def inner_address(public: bytes) -> str:
    """Return the address of a key inside the tunnels: 64 bits of its hash.

    The probability that two of 10,000 keys have the same address is 3e-12.  An attacker needs 2**64 attempts to make a
    key with a given address, but only 2**51 attempts, which is possible within a day, for the address of any of 10,000
    keys. So ``plan_of`` uses neither of two keys with the same address.
    """
    return str(IPv6Address(_PREFIX + sha256(public).digest()[:8]))


def tunnel_mtu(underlay_mtu: int, *, is_ipv6: bool) -> int:
    """Return the size of the largest packet that fits into one underlay packet after encryption and padding."""
    return (underlay_mtu - (OVERHEAD_V6 if is_ipv6 else OVERHEAD_V4)) // PADDING * PADDING


def device_name(run: Path, slot: int) -> str:
    """Return a device's name, for example ``skep-wg0``.

    If ``run`` is not the default directory, the name is unique to it.

    The name must be unique on the machine, because wireguard-go names its socket after the device.
    """
    if run == DEFAULT_RUN:
        return f"skep-wg{slot}"
    return f"skwg{sha256(str(run).encode()).hexdigest()[:8]}-{slot}"


def plan_of(
    own: NodeId, pairs: Sequence[WireGuardKey], tables: Iterable[NetworkTable], *, port: int = 0
) -> WireGuardPlan:
    """Return the plan of node ``own``, for all encrypted ``tables``.

    Args:
        pairs: The node's key pairs, the oldest first.
        port: UDP port of slot 0, or 0 for the port after VXLAN's.  Slot 1 has the next port.
    """
    encrypted = [table for table in tables if table.head.is_encrypted]
    nodes = {id: node for table in encrypted for id, node in table.nodes.items() if id != own}
    # Count addresses and not keys, because an attacker may have made a key with the address of another key.
    claims = Counter(inner for node in nodes.values() for inner in _inner_addresses(node))
    claims.update(inner_address(pair.public) for pair in pairs)
    peers = {
        id: tuple(
            _peer(one, node.underlay) for one in node.wireguard_keys if claims[inner_address(one.key)] == 1
        )
        for id, node in sorted(nodes.items())
    }
    by_key = {peer.public: peer for of_node in peers.values() for peer in of_node}
    vxlan_port = encrypted[0].head.port if encrypted else 0
    return WireGuardPlan(
        devices={
            pair.slot: WireGuardDevice(
                private=pair.private,
                public=pair.public,
                port=own_port(pair.slot, vxlan_port, port),
                peers=by_key,
            )
            for pair in pairs
        }
        if encrypted
        else {},
        peers=peers,
        sources=frozenset(
            (peer.inner, segment.vni)
            for table in encrypted
            for id in table.nodes
            for peer in peers.get(id, ())
            for segment in table.head.segments
        ),
        contested=tuple(
            id
            for id, node in sorted(nodes.items())
            if any(claims[inner] > 1 for inner in _inner_addresses(node))
        ),
        keyless=tuple(id for id, of_node in peers.items() if not of_node),
    )


def own_port(slot: int, vxlan_port: int, port: int = 0) -> int:
    """Return the UDP port of the device in ``slot``.

    ``port`` is the configured port of slot 0, or 0 for the default.
    """
    return (port or vxlan_port + WIREGUARD_OFFSET) + slot


def chosen(plan: WireGuardPlan, sessions: Collection[Session]) -> KeyChoice:
    """Choose the key of each peer to which to send, and the device for it: the newest ones that are known to work.

    Traffic moves to a new key, of this node or of a peer, only after a handshake with it was completed, so that no
    packet waits for a handshake.  Before the first handshake, the newest key and the newest device are used.
    """
    newest_first = tuple(plan.devices.items())[::-1]
    if not newest_first:
        return KeyChoice()
    established = frozenset(sessions)
    addresses: dict[NodeId, str] = {}
    slots: dict[str, int] = {}
    for id, peers in plan.peers.items():
        if not peers:
            continue
        by_peer = {
            one.inner: [slot for slot, device in newest_first if (device.public, one.public) in established]
            for one in peers
        }
        working = [inner for inner, found in by_peer.items() if found]
        addresses[id] = working[-1] if working else peers[-1].inner
        slots |= {inner: found[0] if found else newest_first[0][0] for inner, found in by_peer.items()}
    return KeyChoice(addresses=addresses, slots=slots)


def tunnelled(table: NetworkTable, own: NodeId, addresses: Mapping[NodeId, str]) -> NetworkTable:
    """Return an encrypted network's ``table`` for its VXLANs, with the nodes' addresses inside the tunnels.

    A node without such an address is left out.  This node itself sends from whichever address the tunnel has (``::``).
    """
    inner = {**addresses, own: "::"}
    nodes = {
        id: msgspec.structs.replace(node, underlay=inner[id])
        for id, node in table.nodes.items()
        if id in inner
    }
    head = msgspec.structs.replace(table.head, port=table.head.port + INNER_PORT_OFFSET)
    return msgspec.structs.replace(table, head=head, nodes=nodes)


def changes(found: FoundDevice, wanted: WireGuardDevice, before: WireGuardDevice | None) -> DeviceChange:
    """Return the changes from the ``found`` to the ``wanted`` configuration of a device.

    ``before`` is the configuration that this process wanted last, or None.  Peers that stay are never replaced, so that
    their sessions continue.  WireGuard itself changes the endpoint of a peer whose packets come from another address,
    so an endpoint is set only if the wanted one has changed.  With a new private key, all peers are created again,
    because otherwise the device would still show handshakes with the previous key.
    """
    if found.private != wanted.private:
        port = wanted.port if found.port != wanted.port else None
        return DeviceChange(private=wanted.private, port=port, put=_sorted(wanted))
    old = before.peers if before is not None else {}
    return DeviceChange(
        port=wanted.port if found.port != wanted.port else None,
        removed=tuple(sorted(found.peers.keys() - wanted.peers.keys())),
        put=tuple(
            peer
            for peer in _sorted(wanted)
            if old.get(peer.public) != peer or not _is_as_wanted(found.peers.get(peer.public), peer)
        ),
    )


def _sorted(device: WireGuardDevice) -> tuple[WireGuardPeer, ...]:
    return tuple(peer for _, peer in sorted(device.peers.items()))


def _is_as_wanted(found: FoundPeer | None, peer: WireGuardPeer) -> bool:
    return (
        found is not None
        and frozenset(found.inner) == frozenset(peer.allowed)
        and found.keepalive_s == KEEPALIVE_S
        and (found.has_endpoint or not peer.endpoint)
    )


def _inner_addresses(node: TableNode) -> frozenset[str]:
    return frozenset(inner_address(one.key) for one in node.wireguard_keys)


def _peer(key: PublicKey, underlay: str) -> WireGuardPeer:
    return WireGuardPeer(public=key.key, endpoint=underlay, port=key.port, inner=inner_address(key.key))
