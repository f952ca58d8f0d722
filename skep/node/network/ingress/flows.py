"""UDP flows that have to move: the kernel's memory of them is removed, so that their next packet is dealt anew.

A UDP flow sticks to its backend as long as packets come, even after the backend has gone.  Its conntrack entry is
looked up and deleted over netlink (ctnetlink); a TCP connection is left alone, it ends by itself.

Source: linux, include/uapi/linux/netfilter/nfnetlink_conntrack.h.
"""

import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

import msgspec

from skep.node.network import netlink

_GET, _DELETE = 0x0101, 0x0102
_TUPLE_ORIGINAL, _TUPLE_REPLY = 1, 2
_TUPLE_IP, _TUPLE_PROTOCOL = 1, 2
_SOURCE = {4: 1, 6: 3}
_DESTINATION = {4: 2, 6: 4}
_RECEIVE_BYTES = 1 << 18
_TIMEOUT_S = 5.0


class Misled(msgspec.Struct, frozen=True):
    """Flows to the published port ``port`` that go elsewhere than to one of ``backends``.

    That is to a task of the ingress network (``subnets``) that serves no more, or to the node itself because they began
    before the port was published.
    """

    port: int
    backends: frozenset[str]
    subnets: tuple[str, ...]


class Tuple(msgspec.Struct, frozen=True):
    """One direction of a flow."""

    protocol: int
    source: str
    source_port: int
    destination: str
    destination_port: int


def forget(misled: tuple[Misled, ...], version: int) -> int:
    """Delete the UDP flows of IP ``version`` in the present namespace that are ``misled``; gives how many.

    Blocks for the time of a dump.  Raises: OSError.
    """
    with netlink.opened(netlink.NETFILTER, _TIMEOUT_S) as link:
        family = struct.pack("=BBH", socket.AF_INET if version == 4 else socket.AF_INET6, 0, 0)
        link.send(netlink.request(_GET, netlink.DUMP, family))
        found = list(_matching(link, misled, version))
        for original in found:
            named = netlink.attribute(netlink.NESTED | _TUPLE_ORIGINAL, original)
            link.send(netlink.request(_DELETE, netlink.ACK, family + named))
            link.recv(_RECEIVE_BYTES)  # one that has just ended by itself is an error that changes nothing
    return len(found)


def is_misled(misled: Misled, original: Tuple, reply: Tuple) -> bool:
    """Whether the flow of these two directions is one of those.  ``backends`` empty: they are to be refused."""
    if original.protocol != socket.IPPROTO_UDP or original.destination_port != misled.port:
        return False
    if reply.source in misled.backends:
        return False
    source = ip_address(reply.source)
    return reply.source == original.destination or any(source in ip_network(one) for one in misled.subnets)


def _matching(link: socket.socket, misled: tuple[Misled, ...], version: int) -> Iterator[bytes]:
    """The original tuples, as the kernel gave them, of the flows that are misled."""
    ports = {one.port.to_bytes(2, "big") for one in misled}
    while True:
        for kind, message in netlink.messages(link.recv(_RECEIVE_BYTES)):
            if kind in (netlink.DONE, netlink.ERROR):
                return
            body = message[4:]
            if not any(port in body for port in ports):  # most flows, without a closer look
                continue
            attributes = dict(netlink.attributes(body))
            original, reply = (
                _tuple(attributes.get(number, b""), version) for number in (_TUPLE_ORIGINAL, _TUPLE_REPLY)
            )
            if (
                original is not None
                and reply is not None
                and any(is_misled(one, original, reply) for one in misled)
            ):
                yield attributes[_TUPLE_ORIGINAL]


def _tuple(data: bytes, version: int) -> Tuple | None:
    parts = dict(netlink.attributes(data))
    addresses, ports = (
        dict(netlink.attributes(parts.get(_TUPLE_IP, b""))),
        dict(netlink.attributes(parts.get(_TUPLE_PROTOCOL, b""))),
    )
    try:
        return Tuple(
            ports[1][0],
            str(ip_address(addresses[_SOURCE[version]])),
            int.from_bytes(ports[2][:2], "big"),
            str(ip_address(addresses[_DESTINATION[version]])),
            int.from_bytes(ports[3][:2], "big"),
        )
    except (KeyError, ValueError, IndexError):
        return None  # a protocol without ports
