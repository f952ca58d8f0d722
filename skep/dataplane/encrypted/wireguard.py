"""Kernel WireGuard: VXLAN between two nodes inside it.  What is configured, as data; a thin executor at the end.

One WireGuard device per node, in the node's own namespace.  Each node has an address of its own on it (IPv6, unique
local, made of its id), which is the only one its peer may use: so a decrypted packet's source says who sent it.  The
VXLAN of encrypted segments is bound to that address and a UDP port of its own, which is closed to everything that did
not come out of the WireGuard device.

Keys come from the managers (``manager/discovery/overlay_keys.py``).  The preshared key of a pair changes with every
epoch; WireGuard takes it at its next handshake, at the latest after two minutes, and goes on with the old session
until then, so nothing is lost while the two ends are told one after the other.
"""

import ipaddress
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import msgspec
from pyroute2 import AsyncIPRoute
from pyroute2.netlink.generic.wireguard import AsyncWireGuard

from skep.model.ids import NodeId
from skep.model.pair_keys import NodeKeys, PeerKeys

DEVICE = "skep-wg"
PORT_OFFSET = 11
"""WireGuard's UDP port is that of VXLAN plus this (4800)."""
INNER_PORT_OFFSET = 12
"""UDP port of the VXLAN inside (4801), which nothing outside may reach."""
OVERHEAD_V4, OVERHEAD_V6 = 60, 80
"""Bytes that WireGuard puts around a packet: its header and tag, UDP, IP."""
VXLAN_OVERHEAD = 70
"""VXLAN inside goes over IPv6."""

_PREFIX = bytes.fromhex("fd736b6570656e63")  # fd73:6b65:7065:6e63::/64
_LONGEST_HANDSHAKE_S = 25


class WireGuardPeer(msgspec.Struct, frozen=True, kw_only=True):
    """One other node.  ``endpoint``: its underlay address; ``inner``: the one address it may use inside."""

    public: bytes
    preshared: bytes
    endpoint: str
    port: int
    inner: str


class WireGuardDevice(msgspec.Struct, frozen=True, kw_only=True):
    """The whole device."""

    private: bytes
    port: int
    inner: str
    mtu: int
    peers: tuple[WireGuardPeer, ...] = ()


def inner_address(node: NodeId) -> str:
    """The node's address on WireGuard.

    64 bits of its id's hash: among 10,000 nodes two have the same one with a probability of 3e-12.
    """
    return str(ipaddress.IPv6Address(_PREFIX + sha256(node.encode()).digest()[:8]))


def device(
    own: NodeId, keys: NodeKeys, underlays: Mapping[NodeId, str], *, vxlan_port: int, underlay_mtu: int
) -> WireGuardDevice | None:
    """The device of node ``own``; None: no peer is reached by WireGuard.

    A pair's preshared key is that of the newest epoch: both directions' keys, the lower first, hashed together.
    """
    chosen = {id: peer for id, peer in keys.peers.items() if peer.wireguard_public and id in underlays}
    if not chosen or not keys.wireguard_private:
        return None
    is_ipv6 = any(":" in underlays[id] for id in chosen)
    return WireGuardDevice(
        private=keys.wireguard_private,
        port=vxlan_port + PORT_OFFSET,
        inner=inner_address(own),
        mtu=underlay_mtu - (OVERHEAD_V6 if is_ipv6 else OVERHEAD_V4),
        peers=tuple(
            WireGuardPeer(
                public=peer.wireguard_public,
                preshared=preshared(peer),
                endpoint=underlays[id],
                port=vxlan_port + PORT_OFFSET,
                inner=inner_address(id),
            )
            for id, peer in sorted(chosen.items())
            if peer.keys
        ),
    )


def preshared(peer: PeerKeys) -> bytes:
    """The pair's key for WireGuard, the same at both ends."""
    newest = max(peer.keys, key=lambda key: key.epoch)
    return sha256(b"skep overlay preshared 1" + b"".join(sorted((newest.sending, newest.receiving)))).digest()


def changes(old: WireGuardDevice | None, new: WireGuardDevice) -> list[dict[str, Any]]:
    """Messages that make ``new`` of ``old``, as arguments of pyroute2's ``WireGuard.set``, peers that go first.

    Peers that stay are updated, never replaced: their sessions go on.
    """
    messages: list[dict[str, Any]] = []
    if old is None or (old.private, old.port) != (new.private, new.port):
        messages.append({"private_key": _text(new.private), "listen_port": new.port})
    before = {peer.public: peer for peer in old.peers} if old is not None else {}
    after = {peer.public: peer for peer in new.peers}
    messages += [
        {"peer": {"public_key": _text(public), "remove": True}}
        for public in sorted(before.keys() - after.keys())
    ]
    messages += [
        {
            "peer": {
                "public_key": _text(peer.public),
                "preshared_key": _text(peer.preshared),
                "endpoint_addr": peer.endpoint,
                "endpoint_port": peer.port,
                "persistent_keepalive": _LONGEST_HANDSHAKE_S,
                "replace_allowed_ips": True,
                "allowed_ips": [f"{peer.inner}/128"],
            }
        }
        for public, peer in sorted(after.items())
        if before.get(public) != peer
    ]
    return messages


def rules(vxlan_port: int) -> str:
    """The nftables table that keeps the inner VXLAN's port closed to whatever did not come out of WireGuard."""
    port = vxlan_port + INNER_PORT_OFFSET
    return (
        "table inet skep_encrypted {}\n"
        "delete table inet skep_encrypted\n"
        "table inet skep_encrypted {\n"
        "  chain input { type filter hook input priority -10;\n"
        f'    iifname != "{DEVICE}" udp dport {port} drop\n'
        "  }\n"
        "  chain output { type filter hook output priority -10;\n"
        f'    oifname != "{DEVICE}" udp dport {port} drop\n'
        "  }\n"
        "}\n"
    )


async def program(
    route: AsyncIPRoute, wireguard: AsyncWireGuard, old: WireGuardDevice | None, new: WireGuardDevice
) -> None:
    """Make the device, or bring it up to date; both sockets are of the node's namespace.

    Raises: NetlinkError: the kernel refuses.
    """
    if not await route.link_lookup(ifname=DEVICE):
        await route.link("add", ifname=DEVICE, kind="wireguard")
        old = None
    (index,) = await route.link_lookup(ifname=DEVICE)
    for message in changes(old, new):
        await wireguard.set(DEVICE, **message)
    await route.addr("replace", index=index, address=new.inner, prefixlen=128)
    await route.link("set", index=index, mtu=new.mtu, state="up")
    for peer in new.peers:
        await route.route("replace", dst=f"{peer.inner}/128", oif=index)


def _text(key: bytes) -> str:
    return b64encode(key).decode()
