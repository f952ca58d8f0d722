"""Hands sockets over from one net process to the next, so that no query is lost during an upgrade."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec
import structlog

from skep.dataplane.net_process.ipc import LENGTH_BYTES
from skep.dataplane.net_process.protocol import (
    FRAME_BYTES_MAX,
    HandedOver,
    HandOverSockets,
    SocketLabel,
    WaitingQuery,
    decode_response,
    frame,
)
from skep.dataplane.ports import PROTOCOL_NUMBERS, Held
from skep.linux.descriptors import set_aside_descriptor

log = structlog.get_logger()

_TIMEOUT_S = 5.0
"""Time limit in seconds for one message between two processes, which normally takes less than a millisecond."""
_SOCKETS_PER_MESSAGE = 200
"""Sockets in one message.  The kernel passes at most 253 descriptors at once (``SCM_MAX_FD``)."""


class Taken(msgspec.Struct, frozen=True):
    """Everything that the predecessor held."""

    held: Held
    named: Mapping[SocketLabel, socket.socket] = {}
    waiting: tuple[WaitingQuery, ...] = ()


def give(connection: socket.socket, sockets: tuple[socket.socket, ...]) -> None:
    """Send ``sockets`` after the ``HandedOver`` message.  Blocks for up to 5 s.  Raises: OSError."""
    with socket.socket(fileno=os.dup(connection.fileno())) as blocking:
        blocking.settimeout(_TIMEOUT_S)
        for start in range(0, len(sockets), _SOCKETS_PER_MESSAGE):
            batch = sockets[start : start + _SOCKETS_PER_MESSAGE]
            socket.send_fds(blocking, [b"s"], [sock.fileno() for sock in batch])


def take(path: Path) -> Taken | None:
    """Take over everything that the net process at the socket ``path`` holds, or return None if no process serves it.

    Blocks for up to 5 s.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(str(path))
            connection.sendall(frame(HandOverSockets()))
            length = int.from_bytes(_exactly(connection, LENGTH_BYTES), "big")
            response = decode_response(_exactly(connection, min(length, FRAME_BYTES_MAX)))
            if not isinstance(response, HandedOver):
                raise ConnectionError(f"unexpected answer {type(response).__name__}")
            received = _sockets(connection)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning("predecessor has not handed over", reason=str(error))
        return None
    # Sockets without a label: the previous version sends no labels.
    named = dict(zip(response.labels, received, strict=False))
    by_name = {(sock.proto, *sock.getsockname()[:2]): sock for sock in received[len(named) :]}
    names = {
        one: (PROTOCOL_NUMBERS[one.protocol], one.address or "0.0.0.0", one.port)
        for one in response.reservations
    }
    held = {one: by_name[name] for one, name in names.items() if name in by_name}
    return Taken(held, named, response.waiting)


def _sockets(connection: socket.socket) -> list[socket.socket]:
    """Receive sockets until the other end closes."""
    sockets: list[socket.socket] = []
    while True:
        data, descriptors, _, _ = socket.recv_fds(connection, 1, _SOCKETS_PER_MESSAGE)
        if not data:
            return sockets
        sockets += [socket.socket(fileno=set_aside_descriptor(one)) for one in descriptors]


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionError("closed in the middle of a response")
        data += piece
    return data
