"""Releases packets to a virtual address that wait in the kernel for a MAC address.

If a packet is sent before the rules of the address exist, the kernel asks for the MAC address of the virtual address,
which nobody has.  The packet waits three seconds and then fails, and TCP does not retransmit while it waits.  So the
neighbor entry is given an unused MAC address, and the next attempt reaches a backend.
"""

import socket
import struct
from collections.abc import Collection, Iterator

from skep.dataplane.netns.kernel import netlink
from skep.dataplane.plan.vip import is_ipv6

# Source: linux/neighbour.h: NDA_* and NUD_*.
_DESTINATION, _LINK_ADDRESS = 1, 2
_INCOMPLETE, _STALE = 0x01, 0x04
_HEADER = struct.Struct("=BBHiHBB")
_UNUSED_MAC = bytes.fromhex("02ffffffffff")
_TIMEOUT_S = 2.0
"""Time limit in seconds for the kernel's response."""


def flush_pending(addresses: Collection[str]) -> None:
    """Release the packets queued for ``addresses``, in the calling thread's namespace.  Blocks.  Raises: OSError."""
    for family in sorted({socket.AF_INET6 if is_ipv6(one) else socket.AF_INET for one in addresses}):
        packed = {
            socket.inet_pton(family, one) for one in addresses if is_ipv6(one) == (family == socket.AF_INET6)
        }
        with netlink.open_socket(socket.NETLINK_ROUTE, _TIMEOUT_S) as connection:
            for interface, address in list(_pending(connection, family)):
                if address in packed:
                    body = _HEADER.pack(family, 0, 0, interface, _STALE, 0, 0)
                    body += netlink.attribute(_DESTINATION, address)
                    body += netlink.attribute(_LINK_ADDRESS, _UNUSED_MAC)
                    connection.send(netlink.request(netlink.NEWNEIGH, netlink.ACK | netlink.REPLACE, body))
                    connection.recv(1 << 12)  # ignore an error, because the neighbor may have been removed


def _pending(connection: socket.socket, family: int) -> Iterator[tuple[int, bytes]]:
    """Yield interface and address of each neighbor that is being resolved."""
    head = _HEADER.pack(family, 0, 0, 0, 0, 0, 0)
    connection.send(netlink.request(netlink.GETNEIGH, netlink.DUMP, head))
    while True:
        for type_, body in netlink.messages(connection.recv(1 << 16)):
            if type_ == netlink.DONE:
                return
            if type_ == netlink.ERROR:
                raise OSError(netlink.error_number(body), "neighbors cannot be listed")
            _, _, _, interface, state, _, _ = _HEADER.unpack_from(body)
            address = dict(netlink.attributes(body[_HEADER.size :])).get(_DESTINATION)
            if state & _INCOMPLETE and address is not None:
                yield interface, address
