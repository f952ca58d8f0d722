"""One call: what its client has sent and nobody has read yet, and its answer, each within the windows of HTTP/2."""

import asyncio
from typing import TYPE_CHECKING

from google.protobuf.message import Message
from grpclib.const import Status
from grpclib.exceptions import StreamTerminatedError
from grpclib.metadata import encode_grpc_message

from skep.aio import http2
from skep.aio.http2 import Code, Violation
from skep.wire.http2 import headers
from skep.wire.http2.headers import Request

if TYPE_CHECKING:
    from skep.wire.http2.connection import Connection


PREFIX_BYTES = 5
"""Before each message of gRPC: whether it is compressed, and its length."""


class Stream:
    """The server's end of a call.  One task reads and answers; the connection puts in what arrives."""

    __slots__ = (
        "_connection", "_has_answered", "_has_ended", "_has_headers", "_held", "_is_gone", "_owed", "_reader",
        "_received", "_taken", "_unsaid", "_window_in", "id", "request", "task", "window_out",
    )  # fmt: skip

    def __init__(self, connection: "Connection", id: int, request: Request) -> None:
        self.id = id
        self.request = request
        self.task: asyncio.Task[None] | None = None
        self.window_out = connection.window_of_streams
        """Bytes that the client takes; may be negative."""
        self._connection = connection
        self._window_in = connection.limits.stream_window
        self._received = bytearray()
        self._held = 0
        """Bytes, the last of those received, that the client may not send again on this stream yet."""
        self._taken = 0
        """Bytes that the handler has: they count as the client's until it asks for more, or ends."""
        self._unsaid = 0
        """Bytes taken for which the connection's window was not filled again yet."""
        self._owed = 0
        """Bytes that it may send again, and was not told so yet."""
        self._reader: asyncio.Future[None] | None = None
        self._has_ended = False
        self._has_headers = False
        self._has_answered = False
        self._is_gone = False

    # -- the connection's side ------------------------------------------------------------------------------------

    def put(self, data: bytes, size: int) -> None:
        """``data`` has arrived; ``size``: what it counts for, padding included.  Raises: Violation."""
        self._window_in -= size
        if self._window_in < 0:
            raise Violation("more than the stream's window", Code.FLOW_CONTROL_ERROR)
        if self._is_gone or self._has_answered:
            self._connection.allow(size)  # nobody will read it
            return
        self._received += data
        self._held += len(data)
        if size > len(data):
            self._connection.allow(size - len(data))
            self._allow(size - len(data))
        self._connection.hold(len(data))
        self._wake()

    def end(self) -> None:
        """The client has sent everything."""
        self._has_ended = True
        self._wake()

    @property
    def has_ended(self) -> bool:
        return self._has_ended

    def give_up(self) -> None:
        """The client or the connection is gone: end whoever answers."""
        self._is_gone = True
        self._drop_received()
        if self.task is not None:
            self.task.cancel()

    def forget(self) -> None:
        """Nobody answers any more: what was not read is the connection's to fill again."""
        self._is_gone = True
        self._drop_received()
        self._let_go()
        if self._unsaid:
            self._connection.allow(self._unsaid)
            self._unsaid = 0

    # -- the handler's side ---------------------------------------------------------------------------------------

    async def recv_data(self, size: int, within_s: float | None = None) -> bytes:
        """Exactly ``size`` bytes; none, when there are no more.  Raises: AssertionError: it ends between; TimeoutError.

        A message may be larger than the stream's window, which goes on while it arrives.  The connection's does not:
        it is filled again with what was taken whole, so that half messages cannot hold more than it.

        Args:
            within_s: how long the bytes may be on their way.
        """
        if self._taken > PREFIX_BYTES:
            self._let_go()
        received = self._received
        if len(received) < size and not self._has_ended:
            async with asyncio.timeout(within_s):
                await self._wait_received(size)
        if len(received) < size:
            if received:
                raise AssertionError("a message that ends early")
            return b""
        data = bytes(received[:size])
        del received[:size]
        self._taken += size
        self._unsaid += size
        if size > PREFIX_BYTES:  # with the prefix before it
            self._connection.allow(self._unsaid)
            self._unsaid = 0
        self._release(len(received))
        return data

    async def _wait_received(self, size: int) -> None:
        while len(self._received) < size and not self._has_ended:
            self._release(0)  # somebody waits for all of it
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None

    async def send_initial_metadata(self) -> None:
        """Headers, if none were sent; waits while the peer reads slowly."""
        if not self._has_headers:
            await self._wait_writable(0)
            self._send_headers()

    async def send_message(self, message: Message) -> None:
        """Waits while the peer reads slowly.  Raises: StreamTerminatedError: it is gone."""
        data = message.SerializeToString()
        data = b"\0" + len(data).to_bytes(4, "big") + data
        while data:
            await self._wait_writable(1)
            if not self._has_headers:
                self._send_headers()
            room = min(self.window_out, self._connection.window_out, http2.FRAME_BYTES)
            part, data = data[:room], data[room:]
            self.window_out -= len(part)
            self._connection.window_out -= len(part)
            self._connection.write(http2.frame(http2.DATA, 0, self.id, part))

    async def send_status(
        self, status: Status, message: str | None = None, pushback_s: float | None = None
    ) -> None:
        """The last word.  A client that was refused and has more to send is told not to.

        ``pushback_s``: when the same call works, if that is known.
        """
        if status is Status.OK:
            block = headers.TRAILERS_OK
        else:
            pushback_ms = round(pushback_s * 1000) if pushback_s is not None else None
            block = headers.trailers(status.value, encode_grpc_message(message or ""), pushback_ms)
        await self._wait_writable(0)
        self._end_with(block if self._has_headers else headers.ANSWER + block)
        if status is not Status.OK:
            self._reset_unless_ended()

    async def refuse(self, http_status: int) -> None:
        """The last word to something that is no client of gRPC."""
        await self._wait_writable(0)
        self._end_with(headers.refusal(http_status))
        self._reset_unless_ended()

    def _end_with(self, block: bytes) -> None:
        self._connection.send_block(self.id, block, http2.END_HEADERS | http2.END_STREAM)
        self._has_headers = self._has_answered = True

    def _reset_unless_ended(self) -> None:
        if not self._has_ended:
            self._connection.write(http2.reset(self.id, Code.NO_ERROR))

    def _send_headers(self) -> None:
        self._connection.send_block(self.id, headers.ANSWER, http2.END_HEADERS)
        self._has_headers = True

    async def _wait_writable(self, size: int) -> None:
        """Return when ``size`` bytes may be sent.  Raises: StreamTerminatedError."""
        connection = self._connection
        while not self._is_gone:
            is_open = not size or (self.window_out >= size and connection.window_out >= size)
            if is_open and not connection.is_paused:
                return
            await connection.wait_change()
        raise StreamTerminatedError("the peer is gone")

    def _let_go(self) -> None:
        """The handler is done with what it took."""
        if self._taken:
            self._connection.hold(-self._taken)
            self._taken = 0

    def _drop_received(self) -> None:
        if dropped := len(self._received):
            self._received.clear()
            self._connection.hold(-dropped)
            self._connection.allow(dropped)

    def _release(self, kept: int) -> None:
        """All but the last ``kept`` bytes received may be sent again on this stream."""
        if self._held > kept:
            self._allow(self._held - kept)
            self._held = kept

    def _allow(self, size: int) -> None:
        if self._has_ended:
            return
        self._owed += size
        # Not a word for every message: half a window is worth one.
        if self._owed >= self._connection.limits.stream_window // 2:
            self._window_in += self._owed
            self._connection.write(http2.window_update(self.id, self._owed))
            self._owed = 0

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
