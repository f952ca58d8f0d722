"""The ports on which programs of this machine listen, from the kernel's lists in /proc/net/tcp and similar files."""

from collections.abc import Iterator
from pathlib import Path

_BYTES_MAX = 1 << 20
"""Limit in bytes for reading one list.

A busy server has tens of thousands of connections, but listening sockets come first in /proc/net/tcp.
"""
# Source: net/tcp_states.h.  A UDP socket without a peer has the state TCP_CLOSE.
_LISTENING, _UNCONNECTED = 0x0A, 0x07
_EPHEMERAL = range(32768, 61000)
"""The kernel's default range of ephemeral ports."""


def read_listening_ports(
    proc: Path = Path("/proc/net"), settings: Path = Path("/proc/sys/net/ipv4")
) -> frozenset[tuple[str, int]]:
    """Return ``(protocol, port)`` of every listening TCP socket, and of every UDP socket that accepts any source.

    Leaves out ephemeral ports, because clients, and servers of tests or file transfers, use them only for a moment.
    IPv6 sockets count if they listen on all addresses, since they then also accept IPv4.

    Raises: OSError: a list cannot be read, so its ports are unknown.
    """
    found, ephemeral = set(), _ephemeral(settings / "ip_local_port_range")
    for protocol, state in (("tcp", _LISTENING), ("udp", _UNCONNECTED)):
        for suffix in ("", "6"):
            for address, port in _sockets(_text(proc / (protocol + suffix)), state):
                is_taken = not suffix or not address.strip("0")
                if is_taken and port not in ephemeral:
                    found.add((protocol, port))
    return frozenset(found)


def _ephemeral(file: Path) -> range:
    try:
        first, last = map(int, file.read_text().split())
    except (FileNotFoundError, ValueError):
        return _EPHEMERAL
    return range(first, last + 1)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_BYTES_MAX).decode("ascii", "replace").rpartition("\n")[0]
    except FileNotFoundError:  # the kernel does not support IPv6
        return ""


def _sockets(text: str, state: int) -> Iterator[tuple[str, int]]:
    """Yield local address and port.

    Columns, in hexadecimal: number, local address and port, remote ones, state, ...
    """
    for line in text.splitlines()[1:]:
        words = line.split()
        try:
            address, _, port = words[1].partition(":")
            if int(words[3], 16) == state:
                yield address, int(port, 16)
        except (IndexError, ValueError):
            continue
