"""Configures the kernel's WireGuard over generic netlink.  ``read_device`` and ``change_device`` block.

Source: linux, include/uapi/linux/wireguard.h, include/uapi/linux/genetlink.h.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from functools import cache
from ipaddress import ip_address
from socket import AF_INET, AF_INET6

from skep.dataplane.netns.kernel.netlink import NESTED, attribute, attributes, dump, send_changes
from skep.dataplane.plan.wireguard import KEEPALIVE_S, DeviceChange, FoundDevice, FoundPeer, WireGuardPeer

GENERIC = 16
"""The netlink protocol of families that are addressed by name."""
# Source: linux/genetlink.h: the controller, which tells the family's number.
_CONTROL, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 16, 3, 1, 2
_FAMILY = b"wireguard\0"
# Source: linux/wireguard.h.
_GET_DEVICE, _SET_DEVICE, _VERSION = 0, 1, 1
_IFNAME, _PRIVATE, _DEVICE_FLAGS, _PORT, _PEERS = 2, 3, 5, 6, 8
_PUBLIC, _FLAGS, _ENDPOINT, _KEEPALIVE, _HANDSHAKE, _ALLOWED = 1, 3, 4, 5, 6, 9
_REMOVE, _REPLACE_ALLOWED = 1, 2
_REPLACE_PEERS = 1
_IP_FAMILY, _IP_ADDRESS, _IP_LENGTH = 1, 2, 3
"""WGALLOWEDIP_A_FAMILY, _IPADDR and _CIDR_MASK."""
_HEADER = struct.Struct("=BBxx")
_PEERS_BYTES_MAX = 60_000
"""Limit for the peers in one message, because an attribute has at most 64 KiB."""


def read_device(name: str) -> FoundDevice:
    """Read the device ``name`` of the calling thread's namespace.  Raises: OSError."""
    body = _HEADER.pack(_GET_DEVICE, _VERSION) + attribute(_IFNAME, name.encode() + b"\0")
    replies = dump(_family_id(), body, GENERIC)
    return decoded(bytes(body[_HEADER.size :]) for _, body in replies)


def change_device(name: str, change: DeviceChange) -> None:
    """Configure the device ``name`` of the calling thread's namespace.  Raises: OSError."""
    requests = [(_family_id(), 0, message) for message in encoded(name, change)]
    for number in send_changes(requests, GENERIC):
        if number:
            raise OSError(number, f"{name}: {os.strerror(number)}")


def encoded(name: str, change: DeviceChange) -> Iterator[bytes]:
    """Yield the messages of a change.

    Peers are removed before others are put.  A new private key removes all peers.
    """
    head = _HEADER.pack(_SET_DEVICE, _VERSION) + attribute(_IFNAME, name.encode() + b"\0")
    own = b""
    if change.private is not None:
        own += _number(_DEVICE_FLAGS, _REPLACE_PEERS) + attribute(_PRIVATE, change.private)
    if change.port is not None:
        own += attribute(_PORT, struct.pack("=H", change.port))
    if own:
        yield head + own
    peers = [attribute(_PUBLIC, public) + _number(_FLAGS, _REMOVE) for public in change.removed]
    peers += map(_encoded_peer, change.put)
    for part in _parts([attribute(NESTED, peer) for peer in peers]):
        yield head + attribute(_PEERS | NESTED, part)


def _parts(peers: Iterable[bytes]) -> Iterator[bytes]:
    part = b""
    for peer in peers:
        if part and len(part) + len(peer) > _PEERS_BYTES_MAX:
            yield part
            part = b""
        part += peer
    if part:
        yield part


def decoded(messages: Iterable[bytes]) -> FoundDevice:
    """Decode the kernel's response.  Many peers come in several messages, and one peer may be in two of them."""
    private, port = b"", 0
    peers: dict[bytes, FoundPeer] = {}
    for message in messages:
        for kind, value in attributes(message):
            if kind == _PRIVATE:
                private = value
            elif kind == _PORT:
                (port,) = struct.unpack("=H", value[:2])
            elif kind == _PEERS:
                for _, body in attributes(value):
                    found = dict(attributes(body))
                    peers[found[_PUBLIC]] = _decoded_peer(found, peers.get(found[_PUBLIC], FoundPeer()))
    return FoundDevice(private=private, port=port, peers=peers)


def _decoded_peer(found: dict[int, bytes], before: FoundPeer) -> FoundPeer:
    keepalive = struct.unpack("=H", found[_KEEPALIVE][:2])[0] if _KEEPALIVE in found else 0
    seconds, nanoseconds = struct.unpack("=qq", found[_HANDSHAKE][:16]) if _HANDSHAKE in found else (0, 0)
    allowed = [dict(attributes(one)) for _, one in attributes(found.get(_ALLOWED, b""))]
    return FoundPeer(
        inner=(*before.inner, *map(_decoded_address, allowed)),
        keepalive_s=keepalive or before.keepalive_s,
        has_endpoint=_ENDPOINT in found or before.has_endpoint,
        handshake_at=seconds + nanoseconds / 1e9 or before.handshake_at,
    )


def _decoded_address(allowed: dict[int, bytes]) -> str:
    """Return a single address without prefix length, as plans have it.

    Any other address, which no plan has, keeps its length.
    """
    address, length = ip_address(allowed[_IP_ADDRESS]), allowed[_IP_LENGTH][0]
    return str(address) if length == address.max_prefixlen else f"{address}/{length}"


def _encoded_peer(peer: WireGuardPeer) -> bytes:
    return (
        attribute(_PUBLIC, peer.public)
        + _number(_FLAGS, _REPLACE_ALLOWED)
        + (attribute(_ENDPOINT, _socket_address(peer)) if peer.endpoint else b"")
        + attribute(_KEEPALIVE, struct.pack("=H", KEEPALIVE_S))
        + attribute(_ALLOWED | NESTED, b"".join(map(_encoded_address, peer.allowed)))
    )


def _encoded_address(text: str) -> bytes:
    address = ip_address(text)
    family = AF_INET6 if address.version == 6 else AF_INET
    return attribute(
        NESTED,
        attribute(_IP_FAMILY, struct.pack("=H", family))
        + attribute(_IP_ADDRESS, address.packed)
        + attribute(_IP_LENGTH, bytes((address.max_prefixlen,))),
    )


def _socket_address(peer: WireGuardPeer) -> bytes:
    address = ip_address(peer.endpoint)
    family, port = AF_INET6 if address.version == 6 else AF_INET, peer.port.to_bytes(2, "big")
    if address.version == 4:
        return struct.pack("=H", family) + port + address.packed + bytes(8)
    return struct.pack("=H", family) + port + bytes(4) + address.packed + bytes(4)


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


@cache
def _family_id() -> int:
    """Return the number that the kernel assigned to WireGuard in this boot.  Raises: OSError: it has no WireGuard."""
    body = _HEADER.pack(_GET_FAMILY, 2)
    for _, found in dump(_CONTROL, body, GENERIC):
        family = dict(attributes(bytes(found[_HEADER.size :])))
        if family.get(_FAMILY_NAME) == _FAMILY:
            return int(struct.unpack("=H", family[_FAMILY_ID][:2])[0])
    raise OSError("the kernel has no WireGuard")
