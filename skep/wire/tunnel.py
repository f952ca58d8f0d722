"""One end of a tunnel, which carries bytes in both directions over one streaming call.  Each direction ends separately.

Through the call's flow control, a slow reader stops the sender, so a tunnel buffers only a few pieces.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TypeAlias

from skep.errors import Unavailable
from skep.rpc.errors import LOST_PEER
from skep.wire import skep_pb2 as skep

PIECE_BYTES = 64 * 1024
"""Maximum bytes of one piece."""

Receive: TypeAlias = Callable[[], Awaitable[skep.TunnelPiece | None]]
"""Returns the peer's next piece, or None at the end of its call."""
Send: TypeAlias = Callable[[skep.TunnelPiece], Awaitable[None]]


class Tunnel:
    """One end of a tunnel, for one reader and one writer.

    Args:
        receive, send: Functions of the call.  Their errors for a lost peer become ``Unavailable`` here.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._has_ended = False

    async def read(self) -> bytes:
        """Return the next bytes, or none after the end.  Raises Unavailable if the stream was interrupted."""
        while not self._has_ended:
            try:
                piece = await self._receive()
            except LOST_PEER as error:
                raise _broken() from error
            if piece is None:
                raise _broken()
            self._has_ended = piece.end
            if piece.data:
                return piece.data
        return b""

    async def send(self, data: bytes) -> None:
        """Send data.  Waits while the other side reads slowly.  Raises Unavailable if the other side is lost."""
        for start in range(0, len(data), PIECE_BYTES):
            await self._put(skep.TunnelPiece(data=data[start : start + PIECE_BYTES]))

    async def end(self) -> None:
        """End our direction.  Raises Unavailable if the other side was lost."""
        await self._put(skep.TunnelPiece(end=True))

    async def wait_left(self) -> None:
        """Wait until the other side has ended the call, and discard the data that still arrives."""
        with suppress(Unavailable, *LOST_PEER):
            while await self._receive() is not None:
                pass

    async def _put(self, piece: skep.TunnelPiece) -> None:
        try:
            await self._send(piece)
        except LOST_PEER as error:
            raise _broken() from error


def over_requests(pieces: AsyncIterator[skep.TunnelPiece], send: Send) -> Tunnel:
    """Return the tunnel end of a call's handler."""

    async def receive() -> skep.TunnelPiece | None:
        return await anext(pieces, None)

    return Tunnel(receive, send)


async def copy(source: Tunnel, sink: Tunnel) -> None:
    """Copy one direction, including its end.  Raises Unavailable if either side is lost."""
    while data := await source.read():
        await sink.send(data)
    await sink.end()


def _broken() -> Unavailable:
    return Unavailable("the connection to the container was lost")
