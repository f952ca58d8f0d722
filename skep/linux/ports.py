"""The ports that programs of this machine listen on, as the kernel lists sockets: /proc/net/tcp and its neighbours."""

from collections.abc import Iterator
from pathlib import Path

_BYTES_MAX = 1 << 20
"""A busy server has tens of thousands of connections; listening sockets come first in /proc/net/tcp."""
_LISTENING, _UNCONNECTED = 0x0A, 0x07
_EPHEMERAL = range(32768, 61000)
"""The kernel's default for ports that it chooses itself."""


def read_listening_ports(
    proc: Path = Path("/proc/net"), settings: Path = Path("/proc/sys/net/ipv4")
) -> frozenset[tuple[str, int]]:
    """``(protocol, port)`` of every listening TCP socket and every UDP socket that receives packets of any source.

    Ports that the kernel gives to programs that ask for any are left out: clients have them, for moments, as have
    servers of tests, file transfers and remote calls.  Of IPv6 sockets those of all addresses count, since they take
    IPv4 as well.

    Raises: OSError: a list cannot be read, which says nothing about what it has.
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
    except FileNotFoundError:  # of a kernel without IPv6
        return ""


def _sockets(text: str, state: int) -> Iterator[tuple[str, int]]:
    """Columns: number, local address and port, remote ones, state, ...; in hexadecimal digits."""
    for line in text.splitlines()[1:]:
        words = line.split()
        try:
            address, _, port = words[1].partition(":")
            if int(words[3], 16) == state:
                yield address, int(port, 16)
        except (IndexError, ValueError):
            continue
