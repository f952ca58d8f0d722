"""Sessions within a call: the messages of ``Control.Session`` carry the data of a ``POST /session`` connection.

buildx opens one for bake targets that share a directory, which then share the session.

Source: moby/buildkit, session/grpchijack.
"""

import asyncio

from google.protobuf.message import DecodeError

from skep.aio.groups import errors_as_they_are
from skep.aio.race import wait_first
from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.buildkit.protocol.sessions import BuildSession
from skep.errors import InvalidArgument
from skep.rpc.server import ServerStream
from skep.rpc.serving import receive_message

_PIECE_BYTES = 1 << 20
"""Well below the message limit of 16 MiB, and one window of a stream."""
_UNSENT_BYTES_MAX = 1 << 20
"""Number of unsent bytes above which the protocol of the connection is paused."""


class TunnelTransport(asyncio.Transport):
    """Transport for the protocol of a session.  ``send`` forwards its data to the client."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._protocol = protocol
        self._unsent = bytearray()
        self._is_paused = False
        self._is_closed = False
        self._changed = asyncio.Event()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Buffer data without waiting.  Data written after the end is dropped."""
        if self._is_closed:
            return
        self._unsent += data
        self._changed.set()
        if len(self._unsent) > _UNSENT_BYTES_MAX and not self._is_paused:
            self._is_paused = True
            self._protocol.pause_writing()

    def is_closing(self) -> bool:
        """Return whether the transport has ended."""
        return self._is_closed

    def close(self) -> None:
        """End the transport once the buffered data is sent."""
        self._is_closed = True
        self._changed.set()

    def abort(self) -> None:
        """End the transport now."""
        self._unsent.clear()
        self.close()

    async def send(self, stream: ServerStream) -> None:
        """Send the buffered data in messages until the transport is closed.  Raises: Lost: the client disconnected."""
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


async def carry(session: BuildSession, stream: ServerStream) -> None:
    """Serve a session over the messages of ``stream`` until either end closes it.  Raises: SkepError; Lost."""
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
    """Pass received data to the connection until the client ends its stream."""
    while (data := await receive_message(stream)) is not None:
        try:
            connection.data_received(pb.BytesMessage.FromString(data).data)
        except DecodeError as error:
            raise InvalidArgument("the message cannot be decoded") from error
