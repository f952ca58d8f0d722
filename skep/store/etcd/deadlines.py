"""Deadlines for the connections between members, which etcd has lost.

A member reads what another one streams to it until the connection ends.  etcd means to end one that has said nothing
for 5 s (``ConnReadTimeout``), but tells this to a dialer that Go's transport does not ask while it has another one,
and it has: ``NewTimeoutTransport`` sets ``Dial`` where ``NewTransport`` has set ``DialContext``, in 3.5 and in 3.6.
So what a cut of the network has killed is taken for alive, and all that raft says goes into it until the kernel sends
again, with pauses that double: after a cut of 30 s a manager heard nothing of the others for 24 s more.

The kernel keeps the deadline in etcd's stead, told so by duplicates of etcd's descriptors: a connection whose other end
has acknowledged nothing for so long ends, on both sides, and etcd makes a new one at once.
"""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress

import structlog

from skep.linux.processes import borrowed

log = structlog.get_logger()

SILENT_S = 5
"""As etcd means it to be; what both ends say, at least every 1.7 s, comes in between."""
_PROBES = {socket.TCP_KEEPIDLE: 2, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: SILENT_S - 2}
"""For an end that only reads: asked after two seconds of silence, and then each second."""


class Deadlines:
    """Those of one process, all of whose TCP connections are to peers."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._done: frozenset[str] = frozenset()
        """Sockets that were looked at, as ``/proc`` names them; only those that are still open."""

    def keep(self) -> int:
        """Give what is new a deadline; how many got one.

        Raises: OSError: the process has ended, or this one may not have its descriptors.
        """
        done, given = set(), 0
        for name, process, number in _sockets(self._pid):
            if name not in self._done:
                given += _on_connection(process, number, _limit)
            done.add(name)
        self._done = frozenset(done)
        return given


def end_connections(pid: int, port: int) -> int:
    """End the connections that others have made to ``port`` of a process; how many there were.

    etcd looks at a certificate, and at the list of those that were taken back, when a connection begins, and never
    again.  Those that may connect do so again at once.

    Raises: OSError: as ``Deadlines.keep``.
    """

    def end(connection: socket.socket) -> bool:
        if connection.getsockname()[1] != port:
            return False
        with suppress(OSError):  # it has just ended by itself
            connection.shutdown(socket.SHUT_RDWR)
        return True

    return sum(_on_connection(process, number, end) for _, process, number in _sockets(pid))


def end_peer_connections(pid: int | None, port: int) -> None:
    """Have the other members of a running etcd connect anew, each with a certificate that still counts."""
    if pid is None:
        return
    try:
        ended = end_connections(pid, port)
    except OSError as error:
        log.error("connections of etcd not ended: restart this manager", error=str(error))
    else:
        log.info("connections of etcd ended: its peers show their certificates anew", connections=ended)


def _sockets(pid: int) -> Iterator[tuple[str, int, int]]:
    """Of each socket of a process: its name in ``/proc``, a pidfd, and its number there.  Raises: OSError."""
    process = os.pidfd_open(pid)
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            name = _socket(f"/proc/{pid}/fd/{number}")
            if name is not None:
                yield name, process, int(number)
    finally:
        os.close(process)


def _socket(path: str) -> str | None:
    """What a descriptor leads to, if that is a socket."""
    try:
        target = os.readlink(path)
    except FileNotFoundError:  # closed meanwhile
        return None
    return target if target.startswith("socket:") else None


def _on_connection(process: int, descriptor: int, act: Callable[[socket.socket], bool]) -> bool:
    """What ``act`` gives, if the descriptor is a connection of TCP; else False.  Raises: OSError."""
    try:
        opened = socket.socket(fileno=borrowed(process, descriptor))
    except OSError as error:
        if error.errno == errno.EBADF:  # closed meanwhile
            return False
        raise
    with opened:
        if opened.family not in (socket.AF_INET, socket.AF_INET6) or opened.type != socket.SOCK_STREAM:
            return False
        if opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return False
        return act(opened)


def _limit(connection: socket.socket) -> bool:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _PROBES.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_S * 1000)
    return True
