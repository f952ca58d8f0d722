"""Unix sockets that other users of the machine cannot connect to."""

import os
import socket
from pathlib import Path


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
