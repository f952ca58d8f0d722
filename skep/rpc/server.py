"""The server end of one HTTP/2 connection (RFC 9113) and its calls.

It is designed for thousands of idle connections, small messages and hostile peers.  Three things limit the memory that
a peer can occupy: the limits in ``core``, the windows of unread data, and the number of streams.  A stream that the
peer has reset counts until its handler has ended.  From a peer that does not read, the server does not read either.
"""

import asyncio
from collections.abc import Callable, Coroutine

import msgspec
import structlog
from google.protobuf.message import Message

from skep.rpc import frames, headers
from skep.rpc.coalescing import CoalescingTransport
from skep.rpc.core import MESSAGE_HEAD, Http2Connection, SendStream, framed
from skep.rpc.frames import Code, Frame, Violation
from skep.rpc.headers import CallHeaders
from skep.rpc.status import CallFailed

log = structlog.get_logger(__name__)


class ServerStream(SendStream):
    """The server end of a call.

    One task reads requests and writes responses.  The connection adds received data.
    """

    __slots__ = (
        "_consumed",
        "_has_answered",
        "_has_ended",
        "_has_headers",
        "_is_gone",
        "_pending_update",
        "_reader",
        "_received",
        "_server",
        "_unacked",
        "_unreturned",
        "_window_in",
        "request",
        "task",
    )  # fmt: skip

    def __init__(self, connection: "ServerConnection", id: int, request: CallHeaders) -> None:
        super().__init__(connection, id)
        self.request = request
        self.task: asyncio.Task[None] | None = None
        self._server = connection
        self._window_in = connection.limits.stream_window
        self._received = bytearray()
        self._unacked = 0
        """Received bytes for which this stream has not sent a window update."""
        self._consumed = 0
        """Size of the message that the handler is working on.

        It counts towards the client's limit until the handler reads the next message or ends.
        """
        self._unreturned = 0
        """Bytes of an incomplete message, for which no window update of the connection is due yet."""
        self._pending_update = 0
        """Size of the next window update of this stream."""
        self._reader: asyncio.Future[None] | None = None
        self._has_ended = False
        self._has_headers = False
        self._has_answered = False
        self._is_gone = False

    # -- the connection's side ------------------------------------------------------------------------------------

    def put(self, data: bytes, size: int) -> None:
        """Add received ``data``, whose frame used ``size`` bytes of the window, with padding.  Raises: Violation."""
        self._window_in -= size
        if self._window_in < 0:
            raise Violation("more than the stream's window", Code.FLOW_CONTROL_ERROR)
        if self._is_gone or self._has_answered:
            self._server.allow(size)  # the handler will not read these bytes
            return
        self._received += data
        self._unacked += len(data)
        if size > len(data):
            self._server.allow(size - len(data))
            self._allow(size - len(data))
        self._server.hold(len(data))
        self._wake()

    def end(self) -> None:
        """Note that the client has sent everything."""
        self._has_ended = True
        self._wake()

    @property
    def has_ended(self) -> bool:
        """Whether the client has sent everything."""
        return self._has_ended

    @property
    def is_gone(self) -> bool:
        """Whether the client has stopped reading this call."""
        return self._is_gone

    def reset(self, code: int) -> None:
        """Cancel the handler after the client has reset the stream."""
        self.give_up()

    def give_up(self) -> None:
        """Cancel the handler after the end of the stream or of the connection."""
        self._is_gone = True
        self.drop_unsent()
        self._server.wake()
        self._drop_received()
        if self.task is not None:
            self.task.cancel()

    def forget(self) -> None:
        """Return the window of unread bytes to the connection after the handler has ended."""
        self._is_gone = True
        self._drop_received()
        self._let_go()
        if self._unreturned:
            self._server.allow(self._unreturned)
            self._unreturned = 0

    # -- the handler's side ---------------------------------------------------------------------------------------

    async def recv_data(self, size: int, within_s: float | None = None) -> bytes:
        """Return exactly ``size`` bytes, or no bytes after the end of the stream.

        A message may be larger than the stream's window, which is extended while the message arrives.  The connection's
        window is extended only by complete messages, so that incomplete messages cannot occupy more than one window.

        Args:
            within_s: Time limit for the bytes to arrive, in seconds, or None for no limit.

        Raises:
            AssertionError: The stream ends within the ``size`` bytes.
            TimeoutError: The bytes did not arrive in time.
        """
        if self._consumed > MESSAGE_HEAD.size:
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
        self._consumed += size
        self._unreturned += size
        if size > MESSAGE_HEAD.size:  # the prefix that precedes a message
            self._server.allow(self._unreturned)
            self._unreturned = 0
        self._release(len(received))
        return data

    async def _wait_received(self, size: int) -> None:
        while len(self._received) < size and not self._has_ended:
            self._release(0)  # the handler waits for all of these bytes
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None

    async def send_initial_metadata(self) -> None:
        """Send the headers unless they were sent.  Waits while the peer reads slowly."""
        if not self._has_headers:
            await self.drain()
            self._send_headers()

    async def send_message(self, message: Message) -> None:
        """Send a message.  Waits while the peer reads slowly.  Raises: Lost: the peer has closed the stream."""
        data = framed(message.SerializeToString())
        await self.drain()
        if not self._has_headers:
            self._send_headers()
        self.send_data(b"", data)
        await self.drain()

    async def send_status(self, failure: CallFailed | None = None) -> None:
        """Send the status.  A client that has not finished sending gets RST_STREAM (NO_ERROR)."""
        self.drop_unsent()  # the rest of an abandoned message
        block = headers.TRAILERS_OK if failure is None else headers.trailers(failure)
        await self.drain()
        self._end_with(block if self._has_headers else headers.ANSWER + block)
        if failure is not None:
            self._reset_unless_ended()

    async def refuse(self, http_status: int) -> None:
        """Send an HTTP status to a client that does not use gRPC."""
        await self.drain()
        self._end_with(headers.refusal(http_status))
        self._reset_unless_ended()

    def _end_with(self, block: bytes) -> None:
        self._server.send_block(self.id, block, frames.END_HEADERS | frames.END_STREAM)
        self._has_headers = self._has_answered = True

    def _reset_unless_ended(self) -> None:
        if not self._has_ended:
            self._server.write(frames.reset(self.id, Code.NO_ERROR))

    def _send_headers(self) -> None:
        self._server.send_block(self.id, headers.ANSWER, frames.END_HEADERS)
        self._has_headers = True

    def _let_go(self) -> None:
        """Release the message that the handler has finished."""
        if self._consumed:
            self._server.hold(-self._consumed)
            self._consumed = 0

    def _drop_received(self) -> None:
        if dropped := len(self._received):
            self._received.clear()
            self._server.hold(-dropped)
            self._server.allow(dropped)

    def _release(self, kept: int) -> None:
        """Extend the stream's window by all received bytes except the last ``kept`` ones."""
        if self._unacked > kept:
            self._allow(self._unacked - kept)
            self._unacked = kept

    def _allow(self, size: int) -> None:
        if self._has_ended:
            return
        self._pending_update += size
        # One window update for half a window instead of one for each message.
        if self._pending_update >= self._server.limits.stream_window // 2:
            self._window_in += self._pending_update
            self._server.write(frames.window_update(self.id, self._pending_update))
            self._pending_update = 0

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class PeerLimits(msgspec.Struct, frozen=True):
    """Limits of a peer: number of streams, and window sizes in bytes."""

    streams: int
    stream_window: int
    connection_window: int
    """At least the default of HTTP/2, below which a connection's window cannot be set."""

    def greeting(self) -> bytes:
        """Return the settings frame and the window update that open the connection."""
        greeting = frames.settings(
            {
                frames.MAX_CONCURRENT_STREAMS: self.streams,
                frames.INITIAL_WINDOW_SIZE: self.stream_window,
                frames.MAX_HEADER_LIST_SIZE: headers.HEADER_LIST_BYTES_MAX,
            }
        )
        more = self.connection_window - frames.WINDOW
        return greeting + frames.window_update(0, more) if more else greeting


class ServerConnection(Http2Connection[ServerStream]):
    """One connection.  Its owner calls ``begin`` once the transport is connected."""

    __slots__ = (
        "_handle", "_has_greeted", "_has_sent_block", "_last_stream_id", "_pending_update", "_table", "_window_in",
        "held", "limits",
    )  # fmt: skip
    limits: PeerLimits

    def __init__(self, handle: Callable[[ServerStream], Coroutine[None, None, None]]) -> None:
        """
        Args:
            handle: Runs as a task for each call, and is canceled when the client ends the call.
        """
        super().__init__()
        self.held = 0
        """Bytes of requests that wait for a handler or that a handler works on."""
        self._handle = handle
        self._has_greeted = False
        self._table = headers.EMPTY
        self._last_stream_id = 0
        self._pending_update = 0
        self._has_sent_block = False

    def begin(self, transport: asyncio.Transport, limits: PeerLimits) -> None:
        """Send the settings."""
        self._transport = CoalescingTransport(transport)
        self.limits = limits
        self._window_in = limits.connection_window
        self.is_open = True
        self.write(limits.greeting())

    # -- called by the transport ----------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """Stop reading from a peer that does not read, because the acknowledgements of its pings and settings would
        pile up.
        """
        super().pause_writing()
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Resume reading after the client reads again."""
        if self._transport is not None:
            self._transport.resume_reading()
        super().resume_writing()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Cancel all handlers."""
        self._give_up()
        # Break reference cycles, so that the TLS buffers are freed now and not by the garbage collector.
        self._handle = _handle_none
        self._transport = None

    # -- called by the owner --------------------------------------------------------------------------------------

    def close(self, code: Code = Code.NO_ERROR) -> None:
        """Send GOAWAY, close the connection and end all its calls."""
        if self.is_open:
            self.write(frames.goaway(self._last_stream_id, code))
            self._give_up()
            if self._transport is not None:
                self._transport.close()

    def abort(self) -> None:
        """Close the connection without GOAWAY, for a peer that does not need it or would not read it."""
        if self.is_open:
            self._give_up()
            if self._transport is not None:
                self._transport.abort()

    async def wait_closed(self) -> None:
        """Wait until all handlers have ended."""
        if tasks := [stream.task for stream in self._streams.values() if stream.task is not None]:
            await asyncio.wait(tasks)

    # -- for its streams ------------------------------------------------------------------------------------------

    def send_block(self, stream_id: int, block: bytes, flags: int) -> None:
        """Send HEADERS.  The block fits in one frame."""
        if not self._has_sent_block:
            self._has_sent_block = True
            block = headers.NO_TABLE + block
        self.write(frames.frame(frames.HEADERS, flags, stream_id, block))

    @property
    def is_idle(self) -> bool:
        """Whether no handler runs."""
        return not self._streams

    @property
    def has_called(self) -> bool:
        """Whether the peer has ever made a call."""
        return self._last_stream_id > 0

    def became_idle(self) -> None:
        """Hook for the end of the last handler."""

    def hold(self, size: int) -> None:
        """Change the number of buffered request bytes by ``size``.  Raises: Violation: the peer's limit is exceeded."""
        self.held += size

    def allow(self, size: int) -> None:
        """Extend the connection's window by ``size`` bytes."""
        self._pending_update += size
        # Pending updates and buffered bytes share one window, so an update is sent once it is as large as a stream's
        # window.
        if self._pending_update >= min(self.limits.stream_window, self.limits.connection_window // 2):
            self._window_in += self._pending_update
            self.write(frames.window_update(0, self._pending_update))
            self._pending_update = 0

    def _frames(self, data: bytes) -> list[Frame]:
        """Return the complete frames in ``data`` and keep the rest.  Raises: Violation."""
        if not self._has_greeted:
            size = len(frames.PREFACE)
            if data[:size] != frames.PREFACE[: len(data)]:
                raise Violation("this is not HTTP/2")
            if len(data) < size:
                self._received = data
                return []
            self._has_greeted, data = True, data[size:]
        return super()._frames(data)

    # -- frames ---------------------------------------------------------------------------------------------------

    def known(self, stream_id: int) -> ServerStream | None:
        """Implement ``Http2Connection.known``."""
        if not stream_id % 2 or stream_id > self._last_stream_id:
            raise Violation("a stream that was never opened")
        return self._streams.get(stream_id)

    def take_data(self, frame: Frame) -> None:
        """Implement ``Http2Connection.take_data``."""
        stream, size = self.known(frame.stream_id), len(frame.payload)
        data = frames.content(frame)
        self._window_in -= size
        if self._window_in < 0:
            raise Violation("more than the connection's window", Code.FLOW_CONTROL_ERROR)
        if stream is None:
            self.allow(size)  # the client sent this before it received the end of the stream
            return
        if stream.has_ended:
            raise Violation("data after the end", Code.STREAM_CLOSED)
        stream.put(data, size)
        if frame.flags & frames.END_STREAM:
            stream.end()

    def take_block(self, stream_id: int, block: bytes, *, is_last: bool) -> None:
        """Open a stream if the block has headers, or end a stream if the block has trailers."""
        request, self._table = headers.decoded(self._table, block)
        if stream_id <= self._last_stream_id:
            # These are trailers. The stream may have ended while they were on their way.
            if stream := self.known(stream_id):
                stream.end()
            return
        if not stream_id % 2:
            raise Violation("a stream with a number of the server, opened by the client")
        self._last_stream_id = stream_id
        if len(self._streams) >= self.limits.streams:
            self.write(frames.reset(stream_id, Code.REFUSED_STREAM))
            return
        self._open(ServerStream(self, stream_id, request), has_ended=is_last)

    def _open(self, stream: ServerStream, *, has_ended: bool) -> None:
        if has_ended:
            stream.end()
        self._streams[stream.id] = stream
        # The connection owns the task: ``_give_up`` cancels it, and ``wait_closed`` waits for it.
        task = stream.task = asyncio.get_running_loop().create_task(self._handle(stream))
        task.add_done_callback(lambda _: self._forget(stream))

    def _forget(self, stream: ServerStream) -> None:
        del self._streams[stream.id]
        stream.task = None
        stream.forget()
        if not self._streams:
            self.became_idle()

    def take_goaway(self) -> None:
        """Close the connection."""
        self.close()

    def fail(self, fault: Violation) -> None:
        """Close the connection with the error code of the violation."""
        log.info("connection closed: not a peer of gRPC", reason=str(fault))
        self.close(fault.code)

    # -- ends -----------------------------------------------------------------------------------------------------

    def _give_up(self) -> None:
        self.is_open = False
        for stream in self._streams.values():
            stream.give_up()
        self.wake()


async def _handle_none(_stream: ServerStream) -> None:
    """Do nothing.  Closed connections have this handler, so that they do not keep the real one."""
