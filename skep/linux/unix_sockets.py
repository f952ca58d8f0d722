"""Unix sockets that other users of the machine cannot connect to."""

import grp
import os
import socket
from contextlib import suppress
from pathlib import Path

_GROUP = "docker"


def private_socket(
    path: Path, kind: socket.SocketKind = socket.SOCK_STREAM, *, is_listening: bool = False
) -> socket.socket:
    """A socket bound at ``path``, in place of the one there, for processes of this user alone.

    Raises: OSError.
    """
    path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, kind)
    try:
        # The file gets the mode that the socket has before it is bound (Linux, net/unix/af_unix.c, unix_bind_bsd). The
        # umask would be the whole process's: a directory that another thread makes meanwhile would lack its x bits.
        os.fchmod(bound.fileno(), 0o600)
        bound.bind(str(path))
        if is_listening:
            bound.listen()
    except BaseException:
        bound.close()
        raise
    return bound


def let_group_in(path: Path) -> None:
    """Let the group ``docker`` use the socket at ``path`` too, if there is one, as Docker's API.  Raises: OSError."""
    with suppress(KeyError):  # no such group: root only
        os.chown(path, 0, grp.getgrnam(_GROUP).gr_gid)
        path.chmod(0o660)
