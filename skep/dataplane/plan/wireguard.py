"""What WireGuard has to carry between this node and the others.  Pure.

Every node that shares an encrypted network with this one is a peer by each key that it publishes.  Each key has an
address of its own inside the tunnel (``inner_address``), the only one that packets of that key may come from.  The
VXLANs of encrypted networks send to these addresses and to nothing else: ``tunnelled`` gives a network's table with
tunnel addresses in place of the nodes'.

The devices live in a network namespace of their own, which has no other way out.  So a packet of an encrypted network
that no tunnel takes is dropped there; none can leave in clear.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from ipaddress import IPv6Address
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from skep.model.ids import NodeId
from skep.model.reserved_ports import WIREGUARD_OFFSET
from skep.model.tables import Table, TableNode
from skep.model.wireguard import PublicKey
from skep.paths import DEFAULT_RUN

INNER_PORT_OFFSET = 12
"""UDP port of VXLAN inside the tunnels, above that of the plain one (4801); nothing outside ever sees it."""
OVERHEAD_V4, OVERHEAD_V6 = 60, 80
"""Bytes that WireGuard adds to a packet: its header and tag (32), UDP, IP.  Source: wireguard.com/protocol."""
PADDING = 16
"""WireGuard fills packets up to a multiple of this, at most to the MTU of its device."""
KEEPALIVE_S = 25
"""Sessions are begun at once and kept, so that a key is known to work before traffic moves to it."""

_PREFIX = bytes.fromhex("fd736b6570656e63")
"""Unique local (RFC 4193): fd73:6b65:7065:6e63::/64.  It exists inside the tunnels' namespace only."""


class KeyPair(msgspec.Struct, frozen=True, kw_only=True):
    """A private key (X25519, 32 bytes) with the device that uses it.  Never logged, never shown.

    ``made_at``: seconds since the machine booted.
    """

    private: bytes
    slot: int
    made_at: float

    @property
    def public(self) -> bytes:
        """32 bytes, which peers have."""
        return X25519PrivateKey.from_private_bytes(self.private).public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"KeyPair(slot={self.slot}, made_at={self.made_at})"


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """One key of another node.

    ``public``: 32 bytes; ``endpoint``: the node's underlay address; ``inner``: the address of this key in the tunnel.
    """

    public: bytes
    endpoint: str
    port: int
    inner: str


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One WireGuard device, as it should be configured.  ``public``: the key that belongs to ``private``."""

    private: bytes
    public: bytes
    port: int
    peers: Mapping[bytes, Peer] = {}

    def __repr__(self) -> str:
        return f"Device(port={self.port}, peers={len(self.peers)})"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All of one node.

    ``devices``: by slot, the oldest key first.  ``peers``: by node, the oldest key first.  ``sources``: the tunnel
    addresses that frames of each VXLAN id may come from.
    """

    devices: Mapping[int, Device] = {}
    peers: Mapping[NodeId, tuple[Peer, ...]] = {}
    sources: frozenset[tuple[str, int]] = frozenset()
    contested: tuple[NodeId, ...] = ()
    """Nodes that publish a key, or one with the address of a key, which another node publishes too: it is used for
    neither."""
    keyless: tuple[NodeId, ...] = ()
    """Nodes of encrypted networks without a usable key: nothing is sent to them, nothing taken from them."""


Session = tuple[bytes, bytes]
"""A public key of this node and one of a peer, between which a handshake was completed.

Keys, not devices: what was completed with one key says nothing of the next key of the same device.
"""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Which key of each peer this node sends to, and by which device each tunnel address is reached (its slot)."""

    addresses: Mapping[NodeId, str] = {}
    slots: Mapping[str, int] = {}


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What brings a device from what it has to what it should have.  ``removed`` comes before ``put``.

    ``private``: set together with the removal of all peers, so that none keeps the handshake of the key before.
    """

    private: bytes | None = None
    port: int | None = None
    removed: tuple[bytes, ...] = ()
    put: tuple[Peer, ...] = ()

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to change."""
        return self != Change()

    def __repr__(self) -> str:
        return f"Change(removed={len(self.removed)}, put={len(self.put)})"


class FoundPeer(msgspec.Struct, frozen=True, kw_only=True):
    """A peer as a device has it.  ``handshake_at``: of the latest one, wall-clock seconds; 0: none was completed."""

    inner: tuple[str, ...] = ()
    keepalive_s: int = 0
    has_endpoint: bool = False
    handshake_at: float = 0.0


class FoundDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device as it is configured."""

    private: bytes = b""
    port: int = 0
    peers: Mapping[bytes, FoundPeer] = {}

    def __repr__(self) -> str:
        return f"FoundDevice(port={self.port}, peers={len(self.peers)})"


@lru_cache(maxsize=4096)
def inner_address(public: bytes) -> str:
    """The address of a key inside the tunnels: 64 bits of its hash.

    Among 10,000 keys two have the same one with a probability of 3e-12.  A key with a given address takes
    2**64 attempts, one with the address of any of 10,000 keys 2**51, within a day; ``plan_of`` then uses neither.
    """
    return str(IPv6Address(_PREFIX + sha256(public).digest()[:8]))


def tunnel_mtu(underlay_mtu: int, *, is_ipv6: bool) -> int:
    """The largest packet that fits into one packet of the underlay when it is encrypted and padded."""
    return (underlay_mtu - (OVERHEAD_V6 if is_ipv6 else OVERHEAD_V4)) // PADDING * PADDING


def device_name(run: Path, slot: int) -> str:
    """``skep-wg0``; with another run directory than the usual one it is unique to that.

    wireguard-go's socket is named after its device, in a folder that all of a machine's share.
    """
    if run == DEFAULT_RUN:
        return f"skep-wg{slot}"
    return f"skwg{sha256(str(run).encode()).hexdigest()[:8]}-{slot}"


def plan_of(own: NodeId, pairs: Sequence[KeyPair], tables: Iterable[Table], *, port: int = 0) -> Plan:
    """The plan of node ``own``, for those of ``tables`` that are encrypted.

    ``pairs``: its key pairs, the oldest first.  ``port``: UDP, of slot 0, slot 1 has the next one; 0: after that of
    VXLAN.
    """
    encrypted = [table for table in tables if table.head.is_encrypted]
    nodes = {id: node for table in encrypted for id, node in table.nodes.items() if id != own}
    # By address, not by key: a key may have been made so that its address is that of another one.
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
    return Plan(
        devices={
            pair.slot: Device(
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
    """UDP port of the device in ``slot``.  ``port``: as configured for slot 0; 0: after that of VXLAN."""
    return (port or vxlan_port + WIREGUARD_OFFSET) + slot


def chosen(plan: Plan, sessions: Collection[Session]) -> Choice:
    """What is sent to, and by which device: always the newest of both that is known to work.

    Traffic moves to a new key, of this node or of a peer, when a handshake with it was completed, and not before; so
    nothing waits for one.  Where no handshake was completed yet, it is the newest key and the newest device.
    """
    newest_first = tuple(plan.devices.items())[::-1]
    if not newest_first:
        return Choice()
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
    return Choice(addresses=addresses, slots=slots)


def tunnelled(table: Table, own: NodeId, addresses: Mapping[NodeId, str]) -> Table:
    """``table`` of an encrypted network as its VXLANs need it: nodes are at their addresses inside the tunnels.

    A node without such an address is left out.  This node itself sends from whatever address the tunnel has (``::``).
    """
    inner = {**addresses, own: "::"}
    nodes = {
        id: msgspec.structs.replace(node, underlay=inner[id])
        for id, node in table.nodes.items()
        if id in inner
    }
    head = msgspec.structs.replace(table.head, port=table.head.port + INNER_PORT_OFFSET)
    return msgspec.structs.replace(table, head=head, nodes=nodes)


def changes(found: FoundDevice, wanted: Device, before: Device | None) -> Change:
    """``before``: what this process wanted last; None: it wanted nothing yet.

    Peers that stay are never replaced: their sessions go on.  WireGuard follows a peer whose packets come from
    another address than its endpoint, so an endpoint is set only when the wanted one has changed.  With another
    private key all peers are made anew: a device would go on showing the handshakes made with the key before.
    """
    if found.private != wanted.private:
        port = wanted.port if found.port != wanted.port else None
        return Change(private=wanted.private, port=port, put=_sorted(wanted))
    old = before.peers if before is not None else {}
    return Change(
        port=wanted.port if found.port != wanted.port else None,
        removed=tuple(sorted(found.peers.keys() - wanted.peers.keys())),
        put=tuple(
            peer
            for peer in _sorted(wanted)
            if old.get(peer.public) != peer or not _is_as_wanted(found.peers.get(peer.public), peer)
        ),
    )


def _sorted(device: Device) -> tuple[Peer, ...]:
    return tuple(peer for _, peer in sorted(device.peers.items()))


def _is_as_wanted(found: FoundPeer | None, peer: Peer) -> bool:
    return (
        found is not None
        and found.inner == (peer.inner,)
        and found.keepalive_s == KEEPALIVE_S
        and found.has_endpoint
    )


def _inner_addresses(node: TableNode) -> frozenset[str]:
    return frozenset(inner_address(one.key) for one in node.wireguard_keys)


def _peer(key: PublicKey, underlay: str) -> Peer:
    return Peer(public=key.key, endpoint=underlay, port=key.port, inner=inner_address(key.key))
