"""Timeouts for the connections between members, which etcd fails to set.

A member reads the stream of another one until the connection ends.  etcd intends to close a connection that was silent
for 5 s (``ConnReadTimeout``), but sets the timeout on a dialer that Go's transport ignores because it has another one:
``NewTimeoutTransport`` sets ``Dial`` where ``NewTransport`` has set ``DialContext``, in 3.5 and in 3.6.  So connections
broken by a network partition stay open, and raft's messages are lost in them until the kernel retransmits, with
exponential backoff: after a partition of 30 s a manager got no messages for 24 s more.

Therefore TCP timeouts are set on duplicates of etcd's descriptors.  If a connection's peer has acknowledged nothing for
so long, both sides close it, and etcd opens a new one at once.
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
"""etcd's intended value in seconds.  In both directions there is a message at least every 1.7 s."""
_PROBES = {socket.TCP_KEEPIDLE: 2, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: SILENT_S - 2}
"""For an end that only reads: keepalive probes after two seconds of silence, then every second."""


class Deadlines:
    """The timeouts of one process that has TCP connections to peers only."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._done: frozenset[str] = frozenset()
        """Open sockets that were handled already, as ``/proc`` names them."""

    def apply(self) -> int:
        """Set the timeouts of new connections.  Returns how many there were.

        Raises:
            OSError: The process has ended, or its descriptors may not be duplicated.
        """
        done, count = set(), 0
        for name, process, number in _sockets(self._pid):
            if name not in self._done:
                count += _on_connection(process, number, _limit)
            done.add(name)
        self._done = frozenset(done)
        return count


def end_connections(pid: int, port: int) -> int:
    """Close the connections that peers have made to ``port`` of a process.  Returns how many there were.

    etcd checks certificates and the revocation list only when a connection begins.  Peers with a valid certificate
    reconnect at once.

    Raises:
        OSError: As for ``Deadlines.apply``.
    """

    def end(connection: socket.socket) -> bool:
        if connection.getsockname()[1] != port:
            return False
        with suppress(OSError):  # it has just ended
            connection.shutdown(socket.SHUT_RDWR)
        return True

    return sum(_on_connection(process, number, end) for _, process, number in _sockets(pid))


def end_peer_connections(pid: int | None, port: int) -> None:
    """Make the peers of a running etcd reconnect, so that their certificates are checked again."""
    if pid is None:
        return
    try:
        ended = end_connections(pid, port)
    except OSError as error:
        log.error("peer connections of etcd not closed: restart this manager", error=str(error))
    else:
        log.info("peer connections of etcd closed, to check certificates again", connections=ended)


def _sockets(pid: int) -> Iterator[tuple[str, int, int]]:
    """Yield for each socket of a process its name in ``/proc``, a pidfd of the process, and its descriptor.

    Raises OSError.
    """
    process = os.pidfd_open(pid)
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            name = _socket(f"/proc/{pid}/fd/{number}")
            if name is not None:
                yield name, process, int(number)
    finally:
        os.close(process)


def _socket(path: str) -> str | None:
    """Return the target of a descriptor in ``/proc`` if it is a socket, otherwise None."""
    try:
        target = os.readlink(path)
    except FileNotFoundError:  # closed meanwhile
        return None
    return target if target.startswith("socket:") else None


def _on_connection(process: int, descriptor: int, act: Callable[[socket.socket], bool]) -> bool:
    """Call ``act`` if the descriptor is a TCP connection, and return its result, otherwise False.  Raises OSError."""
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
