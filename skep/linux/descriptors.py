"""Long-lived descriptors are moved to high numbers.

libnftables waits for the kernel by select(2), which supports the first 1,024 descriptors only: with a higher one the C
library aborts the process.  A process with hundreds of containers has more open, so long-lived descriptors get high
numbers, and the low ones are left to short-lived ones.
"""

import fcntl
import os
import socket
from typing import Any

SELECT_MAX = 1024
"""FD_SETSIZE of the C library."""


def set_aside(opened: socket.socket) -> socket.socket:
    """The same socket at a high number, with its timeout; ``opened`` is closed.

    It stays where it is if this process may have no descriptor there.
    """
    timeout_s = opened.gettimeout()
    moved = socket.socket(fileno=set_aside_descriptor(opened.detach()))
    moved.settimeout(timeout_s)
    return moved


def set_aside_descriptor(descriptor: int) -> int:
    """The same for a bare descriptor."""
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
        """``opened``, which is closed, set aside itself."""
        timeout_s = opened.gettimeout()
        listener = cls(fileno=set_aside_descriptor(opened.detach()))
        listener.settimeout(timeout_s)
        return listener

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection, whose descriptor is moved to a high number."""
        connection, peer = super().accept()
        return set_aside(connection), peer


def lowest_free() -> int:
    """The number that the next descriptor gets, without a race."""
    descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.close(descriptor)
    return descriptor
