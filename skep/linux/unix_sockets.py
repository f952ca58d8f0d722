"""Unix sockets that other users of the machine cannot connect to, and the process at the other end of a socket."""

import grp
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_GROUP = "docker"
_CREDENTIALS = struct.Struct("3i")
"""Source: linux/socket.h: struct ucred."""


class Credentials(NamedTuple):
    """The process that connected to a Unix socket, and its user and group at that time."""

    pid: int
    uid: int
    gid: int


def private_socket(
    path: Path, kind: socket.SocketKind = socket.SOCK_STREAM, *, is_listening: bool = False
) -> socket.socket:
    """Return a socket bound at ``path`` that only this user's processes can use.  An earlier socket there is replaced.

    Raises: OSError.
    """
    path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, kind)
    try:
        # The file gets the socket's mode before the bind (Linux, net/unix/af_unix.c, unix_bind_bsd).  The umask is
        # shared by the whole process: a directory that another thread makes meanwhile would lack its x bits.
        os.fchmod(bound.fileno(), 0o600)
        bound.bind(str(path))
        if is_listening:
            bound.listen()
    except BaseException:
        bound.close()
        raise
    return bound


def let_group_in(path: Path) -> None:
    """Let the group ``docker`` use the socket at ``path``, as Docker does for its API.

    Does nothing if the group does not exist.

    Raises: OSError.
    """
    with suppress(KeyError):  # no such group, so only root has access
        os.chown(path, 0, grp.getgrnam(_GROUP).gr_gid)
        path.chmod(0o660)


def credentials_of(connected: socket.socket) -> Credentials:
    """Return the process at the other end of a Unix socket.

    Its pid is 0 if the process is outside the calling process's pid namespace.
    """
    packed = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Credentials(*_CREDENTIALS.unpack(packed))
