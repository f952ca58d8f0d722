"""Packets to a virtual address that wait for a neighbour whom nobody is.

A packet that left before the address was led waits for three seconds to be told where the address is, then fails; and
TCP sends nothing again while it waits.  So it is let go, to nobody: the next attempt is led.
"""

import socket
import struct
from collections.abc import Collection, Iterator
from contextlib import closing

from skep.node.virtual.conntrack import attributes, messages
from skep.node.virtual.wanted import is_ipv6

_NEW, _GET = 28, 30
_REQUEST, _ACK, _REPLACE, _DUMP = 0x1, 0x4, 0x100, 0x300
_ERROR, _DONE = 2, 3
_DESTINATION, _LINK_ADDRESS = 1, 2
_INCOMPLETE, _STALE = 0x01, 0x04
_HEADER = struct.Struct("=BBHiHBB")
_NOBODY = bytes.fromhex("02ffffffffff")
_TIMEOUT_S = 2.0


def let_go(addresses: Collection[str]) -> None:
    """Let go what waits for ``addresses``, in the namespace of the calling thread.  Blocks.  Raises: OSError."""
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    for family in sorted({socket.AF_INET6 if is_ipv6(one) else socket.AF_INET for one in addresses}):
        packed = {
            socket.inet_pton(family, one) for one in addresses if is_ipv6(one) == (family == socket.AF_INET6)
        }
        with closing(socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)) as netlink:
            netlink.settimeout(_TIMEOUT_S)
            netlink.bind((0, 0))
            for interface, address in list(_awaited(netlink, family)):
                if address in packed:
                    body = _HEADER.pack(family, 0, 0, interface, _STALE, 0, 0)
                    body += _attribute(_DESTINATION, address) + _attribute(_LINK_ADDRESS, _NOBODY)
                    netlink.send(_message(_NEW, _REQUEST | _ACK | _REPLACE, body))
                    netlink.recv(1 << 12)  # who is no neighbour any more does not matter


def _awaited(netlink: socket.socket, family: int) -> Iterator[tuple[int, bytes]]:
    """(interface, address) of neighbours that are being looked for."""
    netlink.send(_message(_GET, _REQUEST | _DUMP, _HEADER.pack(family, 0, 0, 0, 0, 0, 0)))
    while True:
        for type_, body in messages(netlink.recv(1 << 16)):
            if type_ == _DONE:
                return
            if type_ == _ERROR:
                raise OSError(-struct.unpack_from("=i", body)[0], "neighbours cannot be listed")
            _, _, _, interface, state, _, _ = _HEADER.unpack_from(body)
            address = attributes(body[_HEADER.size :]).get(_DESTINATION)
            if state & _INCOMPLETE and address is not None:
                yield interface, address


def _attribute(type_: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), type_) + value + b"\0" * (-len(value) % 4)


def _message(type_: int, flags: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), type_, flags, 1, 0) + body
