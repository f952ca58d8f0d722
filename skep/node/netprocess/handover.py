"""Sockets from one net process to the next, so that a port is held without a gap while the version changes."""

import os
import socket
from pathlib import Path

import structlog

from skep.node.netprocess.protocol import (
    FRAME_BYTES_MAX,
    LENGTH_BYTES,
    HandedOver,
    HandOver,
    decode_answer,
    frame,
)
from skep.node.netprocess.reservations import PROTOCOL_NUMBERS, Held

log = structlog.get_logger()

_TIMEOUT_S = 5.0
_SOCKETS_PER_MESSAGE = 200
"""The kernel passes at most 253 descriptors at once."""


def give(connection: socket.socket, sockets: tuple[socket.socket, ...]) -> None:
    """Send ``sockets`` behind a ``HandedOver``.  Blocks for up to 5 s.  Raises: OSError."""
    with socket.socket(fileno=os.dup(connection.fileno())) as blocking:
        blocking.settimeout(_TIMEOUT_S)
        for start in range(0, len(sockets), _SOCKETS_PER_MESSAGE):
            batch = sockets[start : start + _SOCKETS_PER_MESSAGE]
            socket.send_fds(blocking, [b"s"], [sock.fileno() for sock in batch])


def take(path: Path) -> Held | None:
    """Everything that the process serving ``path`` holds; None: nobody serves it.  Blocks for up to 5 s."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(str(path))
            connection.sendall(frame(HandOver()))
            length = int.from_bytes(_exactly(connection, LENGTH_BYTES), "big")
            answer = decode_answer(_exactly(connection, min(length, FRAME_BYTES_MAX)))
            if not isinstance(answer, HandedOver):
                raise ConnectionError(f"unexpected answer {type(answer).__name__}")
            received = _sockets(connection)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except OSError as error:
        log.warning("predecessor does not hand over", reason=str(error))
        return None
    by_name = {(sock.proto, *sock.getsockname()[:2]): sock for sock in received}
    names = {
        held: (PROTOCOL_NUMBERS[held.protocol], held.address or "0.0.0.0", held.port)
        for held in answer.reservations
    }
    return {held: by_name[name] for held, name in names.items() if name in by_name}


def _sockets(connection: socket.socket) -> list[socket.socket]:
    """All sockets until the other end closes."""
    sockets: list[socket.socket] = []
    while True:
        data, descriptors, _, _ = socket.recv_fds(connection, 1, _SOCKETS_PER_MESSAGE)
        if not data:
            return sockets
        sockets += [socket.socket(fileno=descriptor) for descriptor in descriptors]


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionError("closed in the middle of an answer")
        data += piece
    return data
