"""A session within a call: the messages of ``Control.Session`` carry what ``POST /session`` has as a connection.

buildx opens one for the targets of a bake that share a directory: they share the session.

Source: moby/buildkit, session/grpchijack.
"""

import asyncio

from google.protobuf.message import DecodeError

from skep.aio.groups import errors_as_they_are
from skep.aio.race import wait_first
from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.buildkit.serving import receive_message
from skep.engine.buildkit.sessions import Session
from skep.errors import InvalidArgument
from skep.rpc.server import ServerStream

_PIECE_BYTES = 1 << 20
_UNSENT_BYTES_MAX = 1 << 20
"""With more than this the connection's protocol is asked to write nothing."""


class TunnelTransport(asyncio.Transport):
    """What the protocol of a session writes to; ``send`` takes that to the client."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._protocol = protocol
        self._unsent = bytearray()
        self._is_paused = False
        self._is_closed = False
        self._changed = asyncio.Event()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Never waits; what is written after the end is lost."""
        if self._is_closed:
            return
        self._unsent += data
        self._changed.set()
        if len(self._unsent) > _UNSENT_BYTES_MAX and not self._is_paused:
            self._is_paused = True
            self._protocol.pause_writing()

    def is_closing(self) -> bool:
        """Whether it has ended."""
        return self._is_closed

    def close(self) -> None:
        """End it when what was written has been sent."""
        self._is_closed = True
        self._changed.set()

    def abort(self) -> None:
        """End it now."""
        self._unsent.clear()
        self.close()

    async def send(self, stream: ServerStream) -> None:
        """Send what is written, in messages, until the transport is closed.  Raises: Lost: the client is gone."""
        while self._unsent or not self._is_closed:
            self._changed.clear()
            while self._unsent:
                piece = bytes(self._unsent[:_PIECE_BYTES])
                del self._unsent[:_PIECE_BYTES]
                await stream.send_message(pb.BytesMessage(data=piece))
            if self._is_paused:
                self._is_paused = False
                self._protocol.resume_writing()
            if not self._is_closed:
                await self._changed.wait()


async def carry(session: Session, stream: ServerStream) -> None:
    """Serve a session by the messages of ``stream`` until either end closes it.  Raises: SkepError; Lost."""
    connection = session.connection
    await stream.send_initial_metadata()
    transport = TunnelTransport(connection)
    connection.connection_made(transport)
    try:
        async with errors_as_they_are():
            await wait_first(_receive(connection, stream), transport.send(stream))
    finally:
        connection.connection_lost(None)
        transport.abort()


async def _receive(connection: asyncio.Protocol, stream: ServerStream) -> None:
    """Give the connection what arrives, until the client sends no more."""
    while (data := await receive_message(stream)) is not None:
        try:
            connection.data_received(pb.BytesMessage.FromString(data).data)
        except DecodeError as error:
            raise InvalidArgument("the message cannot be decoded") from error
