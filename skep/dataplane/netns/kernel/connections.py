"""Counts the clients that are still connected to a container, from the kernel's tables of its namespace.

Source: proc(5), /proc/net/tcp; the kernel's include/net/tcp_states.h.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_LISTEN = "0A"
_OPEN = frozenset({"01", "03", "04", "08", "09", "0B"})
"""TCP states in which data may still be sent or has yet to arrive.

These are ESTABLISHED, SYN_RECV, FIN_WAIT1, CLOSE_WAIT, LAST_ACK and CLOSING.  Not FIN_WAIT2: there the client has
received everything, and only has not closed its own side.
"""
_LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
"""127.0.0.1, ::1 and ::ffff:127.0.0.1, as a little-endian kernel writes them."""


def inbound(tables: Iterable[str]) -> int:
    """Count open TCP connections from elsewhere to listening ports.

    Args:
        tables: The texts of /proc/net/tcp and /proc/net/tcp6 of one namespace.
    """
    connections = [
        words for table in tables for line in table.splitlines()[1:] if len(words := line.split()) > 3
    ]
    listened = {_port(local) for _, local, _, state, *_ in connections if state == _LISTEN}
    return sum(
        state in _OPEN and _port(local) in listened and not remote.startswith(_LOOPBACK)
        for _, local, remote, state, *_ in connections
    )


def inbound_of(pid: int) -> int:
    """Count open TCP connections to the namespace of process ``pid``.  0 if the process has ended."""
    tables = []
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            tables.append(Path(f"/proc/{pid}/net/{name}").read_text())
    return inbound(tables)


def _port(address: str) -> str:
    return address.rpartition(":")[2]
