"""Moves long-lived descriptors to high numbers.

libnftables waits for the kernel with select(2), which only supports the first 1,024 descriptors: with a higher one the
C library aborts the process.  A process with hundreds of containers has more open, so long-lived descriptors get high
numbers and leave the low ones to short-lived descriptors.
"""

import fcntl
import os
import socket
from typing import Any

SELECT_MAX = 1024
"""Number of descriptors that select(2) supports (FD_SETSIZE of the C library)."""


def set_aside(opened: socket.socket) -> socket.socket:
    """Move a socket, with its timeout, to a high number and return it.  ``opened`` is closed.

    The socket keeps its number if the process's limit (RLIMIT_NOFILE) does not allow such high numbers.
    """
    timeout_s = opened.gettimeout()
    moved = socket.socket(fileno=set_aside_descriptor(opened.detach()))
    moved.settimeout(timeout_s)
    return moved


def set_aside_descriptor(descriptor: int) -> int:
    """Move a descriptor to a high number and return it, like ``set_aside``."""
    try:
        moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, SELECT_MAX)
    except OSError:
        return descriptor
    os.close(descriptor)
    return moved


class Listener(socket.socket):
    """A listening socket whose accepted connections are moved to high descriptors."""

    @classmethod
    def of(cls, opened: socket.socket) -> "Listener":
        """Return ``opened`` as a listener at a high number.  ``opened`` is closed."""
        timeout_s = opened.gettimeout()
        listener = cls(fileno=set_aside_descriptor(opened.detach()))
        listener.settimeout(timeout_s)
        return listener

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection, whose descriptor is moved to a high number."""
        connection, peer = super().accept()
        return set_aside(connection), peer


def lowest_free() -> int:
    """Return the number that the next descriptor would get."""
    descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.close(descriptor)
    return descriptor
