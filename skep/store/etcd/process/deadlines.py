"""Timeouts for the connections between members, which etcd fails to set.

A member reads the stream of another member until the connection ends. etcd intends to close a connection after 5 s of
silence (``ConnReadTimeout``).  But it sets the timeout on ``Dial`` (in ``NewTimeoutTransport``), which Go's transport
ignores, because ``NewTransport`` has already set ``DialContext``.  That is so in 3.5 and in 3.6.  Therefore connections
that a network partition has broken stay open, and lose raft's messages until the kernel retransmits, with exponential
backoff.  After a partition of 30 s, a manager got no messages for another 24 s.

This module sets TCP timeouts on duplicates of etcd's descriptors instead.  If the peer acknowledges nothing for that
time, both sides close the connection, and etcd opens a new one at once.
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
"""The timeout in seconds that etcd intends.  A message is sent in each direction at least every 1.7 s."""
_PROBES = {socket.TCP_KEEPIDLE: 2, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: SILENT_S - 2}
"""Keepalive probes, for an end that only reads.  They start after two seconds of silence and repeat every second."""


class Deadlines:
    """Sets the timeouts of one process, whose TCP connections all lead to peers."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._done: frozenset[str] = frozenset()
        """Open sockets that have their timeouts already, as named in ``/proc``."""

    def apply(self) -> int:
        """Set the timeouts of new connections.  Returns how many there were.

        Raises:
            OSError: The process has ended, or this process may not duplicate its descriptors.
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
        with suppress(OSError):  # the connection has just ended
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
