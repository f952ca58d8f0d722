"""The networks that this machine reaches, from the kernel's routes in /proc/net/route and /proc/net/ipv6_route."""

from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

_BYTES_MAX = 1 << 17
"""Limit in bytes for reading one list.  A router may have a million routes, of which about the first thousand are read.
"""
# Source: linux/route.h: RTF_*.
_UP = 0x1
_REJECT = 0x200
_LOOPBACK = "lo"


def read_routes(proc: Path = Path("/proc/net")) -> list[tuple[IPv4Network | IPv6Network, str]]:
    """Return every network and its interface, without default routes and the machine's own addresses.

    Raises: OSError: a list cannot be read, so its routes are unknown.
    """
    return [*_routes_4(_text(proc / "route")), *_routes_6(_text(proc / "ipv6_route"))]


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_BYTES_MAX).decode("ascii", "replace").rpartition("\n")[0]
    except FileNotFoundError:  # the kernel does not support IPv6
        return ""


def _routes_4(text: str) -> Iterator[tuple[IPv4Network, str]]:
    """Yield IPv4 networks.

    Columns: interface, destination, gateway, flags, three counters, mask; in host byte order.
    """
    for line in text.splitlines()[1:]:
        words = line.split()
        try:
            interface, flags = words[0], int(words[3], 16)
            address, mask = (bytes.fromhex(words[column])[::-1] for column in (1, 7))
            length = int.from_bytes(mask).bit_count()
            if flags & _UP and not flags & _REJECT and length and interface != _LOOPBACK:
                yield IPv4Network((address, length), strict=False), interface
        except (IndexError, ValueError):
            continue


def _routes_6(text: str) -> Iterator[tuple[IPv6Network, str]]:
    """Yield IPv6 networks.

    Columns: destination, its length, source, its length, next hop, four numbers (the last one: flags), interface.
    """
    for line in text.splitlines():
        words = line.split()
        try:
            subnet = IPv6Network((bytes.fromhex(words[0]), int(words[1], 16)), strict=False)
            flags, interface = int(words[8], 16), words[9]
        except (IndexError, ValueError):
            continue
        is_network = 0 < subnet.prefixlen < 128 and not subnet.is_link_local and not subnet.is_multicast
        if is_network and flags & _UP and not flags & _REJECT and interface != _LOOPBACK:
            yield subnet, interface
