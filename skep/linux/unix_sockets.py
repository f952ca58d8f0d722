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
    mask = os.umask(0o177)  # of the whole process: nothing is awaited while it is another
    try:
        bound.bind(str(path))
        if is_listening:
            bound.listen()
    except BaseException:
        bound.close()
        raise
    finally:
        os.umask(mask)
    return bound


def let_group_in(path: Path) -> None:
    """Let the group ``docker`` use the socket at ``path`` too, if there is one, as Docker's API.  Raises: OSError."""
    with suppress(KeyError):  # no such group: root only
        os.chown(path, 0, grp.getgrnam(_GROUP).gr_gid)
        path.chmod(0o660)
