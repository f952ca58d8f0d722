"""Asks the kernel where packets to one address go.  Source: linux/rtnetlink.h."""

import socket
import struct
import sys
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, NamedTuple

# Source: linux/rtnetlink.h and linux/netlink.h.
_RTM_GETROUTE, _NLM_F_REQUEST, _NLMSG_ERROR, _RTA_DST, _RTA_OIF = 26, 1, 2, 1, 4
_HEADER, _ROUTE, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=8BI"), struct.Struct("=HH")
# Source: linux/rtnetlink.h: RTN_LOCAL.
_LOCAL: Final = 2
_ANY_PORT: Final = 9
"""Any port will do (this is the discard service's), because connecting a UDP socket sends nothing."""
_OWN_TYPES: Final = frozenset({_LOCAL, 3, 4})
"""Route types RTN_LOCAL, RTN_BROADCAST and RTN_ANYCAST."""
_RESPONSE_BYTES: Final = 4096
"""Buffer size in bytes.  A response is one message with a few short attributes."""


class KernelRoute(NamedTuple):
    """The kernel's route to one address."""

    type: int = 0
    """``RTN_...``, or 0 without a route."""
    device: str = ""
    """The device to which packets go, or empty if it is not known."""

    @property
    def is_local(self) -> bool:
        """Return whether the address is one of the namespace's own, as ``fib daddr type local`` in nftables."""
        return self.type == _LOCAL

    @property
    def is_own(self) -> bool:
        """Return whether packets to the address stay in the namespace, or are broadcasts of its networks."""
        return self.type in _OWN_TYPES


def route_to(address: IPv4Address | IPv6Address) -> KernelRoute:
    """Return the route to ``address`` in the calling thread's namespace.  Raises: OSError.

    Trying to bind an address would not tell: with ``ip_nonlocal_bind``, which keepalived sets, every address can be
    bound.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    body = _ROUTE.pack(family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
    body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(address.packed), _RTA_DST) + address.packed
    header = _HEADER.pack(_HEADER.size + len(body), _RTM_GETROUTE, _NLM_F_REQUEST, 1, 0)
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as kernel:
        kernel.send(header + body)  # the kernel has responded once this returns
        response = kernel.recv(_RESPONSE_BYTES)
    if _HEADER.unpack_from(response)[1] == _NLMSG_ERROR:  # no route, so the connection will fail by itself
        return KernelRoute()
    type = _ROUTE.unpack_from(response, _HEADER.size)[7]
    at, device = _HEADER.size + _ROUTE.size, ""
    while at + _ATTRIBUTE.size <= len(response):
        size, kind = _ATTRIBUTE.unpack_from(response, at)
        if kind == _RTA_OIF:
            with suppress(OSError):  # the device was just removed
                device = socket.if_indextoname(int.from_bytes(response[at + 4 : at + 8], sys.byteorder))
        at += max(-(-size // 4) * 4, 4)
    return KernelRoute(type, device)


def source_address(host: str) -> str:
    """Return this machine's address from which packets to the IP address ``host`` are sent, or an empty text without a
    route.  Sends nothing.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        suppress(OSError, ValueError),
        socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe,
    ):
        probe.connect((str(ip_address(host)), _ANY_PORT))
        return str(probe.getsockname()[0])
    return ""
