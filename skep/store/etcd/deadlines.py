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

from skep.linux.processes import borrowed

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
        process = os.pidfd_open(self._pid)
        try:
            for number in os.listdir(f"/proc/{self._pid}/fd"):
                name = _socket(f"/proc/{self._pid}/fd/{number}")
                if name is None:
                    continue
                if name not in self._done:
                    given += _limit(process, int(number))
                done.add(name)
        finally:
            os.close(process)
        self._done = frozenset(done)
        return given


def _socket(path: str) -> str | None:
    """What a descriptor leads to, if that is a socket."""
    try:
        target = os.readlink(path)
    except FileNotFoundError:  # closed meanwhile
        return None
    return target if target.startswith("socket:") else None


def _limit(process: int, descriptor: int) -> bool:
    """Whether it is a connection of TCP that has a deadline now.  Raises: OSError."""
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
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _PROBES.items():
            opened.setsockopt(socket.IPPROTO_TCP, option, value)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_S * 1000)
        return True
