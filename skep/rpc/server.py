"""The server's end of one HTTP/2 connection (RFC 9113), and of the calls on it.

It is made for thousands of silent connections, small messages and hostile peers.
What a peer can make it hold is bounded: what ``core`` bounds, its windows of unread data, and its number of streams
(one that it has reset counts until its handler has ended).  While it does not read, nothing is read of it.
"""

import asyncio
from collections.abc import Callable, Coroutine

import msgspec
import structlog
from google.protobuf.message import Message

from skep.rpc import frames, headers
from skep.rpc.coalescing import CoalescingTransport
from skep.rpc.core import MESSAGE_HEAD, Connection, Stream, framed
from skep.rpc.frames import Code, Frame, Violation
from skep.rpc.headers import Request
from skep.rpc.status import CallFailed

log = structlog.get_logger(__name__)


class ServerStream(Stream):
    """The server's end of a call.  One task reads requests and writes responses; the connection adds what arrives."""

    __slots__ = (
        "_has_answered", "_has_ended", "_has_headers", "_held", "_is_gone", "_owed", "_reader", "_received",
        "_server", "_taken", "_unsaid", "_window_in", "request", "task",
    )  # fmt: skip

    def __init__(self, connection: "ServerConnection", id: int, request: Request) -> None:
        super().__init__(connection, id)
        self.request = request
        self.task: asyncio.Task[None] | None = None
        self._server = connection
        self._window_in = connection.limits.stream_window
        self._received = bytearray()
        self._held = 0
        """Bytes, the last of those received, that the client may not send again on this stream yet."""
        self._taken = 0
        """Bytes that the handler has taken: they count towards the client's bound until it takes the next message,
        or ends."""
        self._unsaid = 0
        """Bytes taken for which the connection's window was not filled again yet."""
        self._owed = 0
        """Bytes that the client may send again; the window update is not sent yet."""
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
            self._server.allow(size)  # it will not be read
            return
        self._received += data
        self._held += len(data)
        if size > len(data):
            self._server.allow(size - len(data))
            self._allow(size - len(data))
        self._server.hold(len(data))
        self._wake()

    def end(self) -> None:
        """The client has sent everything."""
        self._has_ended = True
        self._wake()

    @property
    def has_ended(self) -> bool:
        """Whether the client has sent everything."""
        return self._has_ended

    @property
    def is_gone(self) -> bool:
        """Whether the client reads no more of it."""
        return self._is_gone

    def reset(self, code: int) -> None:
        """The client has reset the stream."""
        self.give_up()

    def give_up(self) -> None:
        """The client or the connection is gone: cancel the handler."""
        self._is_gone = True
        self.drop_unsent()
        self._server.wake()
        self._drop_received()
        if self.task is not None:
            self.task.cancel()

    def forget(self) -> None:
        """The handler has ended: give the window of what was not read back to the connection."""
        self._is_gone = True
        self._drop_received()
        self._let_go()
        if self._unsaid:
            self._server.allow(self._unsaid)
            self._unsaid = 0

    # -- the handler's side ---------------------------------------------------------------------------------------

    async def recv_data(self, size: int, within_s: float | None = None) -> bytes:
        """Exactly ``size`` bytes; none, when there are no more.  Raises: AssertionError: it ends between;
        TimeoutError.

        A message may be larger than the stream's window, which goes on while it arrives.  The connection's does not:
        it is filled again with what was taken whole, so that half messages cannot hold more than it.

        Args:
            within_s: how long the bytes may be on their way.
        """
        if self._taken > MESSAGE_HEAD.size:
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
        if size > MESSAGE_HEAD.size:  # with the prefix before it
            self._server.allow(self._unsaid)
            self._unsaid = 0
        self._release(len(received))
        return data

    async def _wait_received(self, size: int) -> None:
        while len(self._received) < size and not self._has_ended:
            self._release(0)  # a handler waits for all of it
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None

    async def send_initial_metadata(self) -> None:
        """Headers, if none were sent; waits while the peer reads slowly."""
        if not self._has_headers:
            await self.drained()
            self._send_headers()

    async def send_message(self, message: Message) -> None:
        """Waits while the peer reads slowly.  Raises: Lost: it is gone."""
        data = framed(message.SerializeToString())
        await self.drained()
        if not self._has_headers:
            self._send_headers()
        self.send_data(b"", data)
        await self.drained()

    async def send_status(self, failure: CallFailed | None = None) -> None:
        """Send the status.  A client that has more to send gets RST_STREAM (NO_ERROR)."""
        self.drop_unsent()  # of a message that was given up
        block = headers.TRAILERS_OK if failure is None else headers.trailers(failure)
        await self.drained()
        self._end_with(block if self._has_headers else headers.ANSWER + block)
        if failure is not None:
            self._reset_unless_ended()

    async def refuse(self, http_status: int) -> None:
        """Send an HTTP status to a client that does not use gRPC."""
        await self.drained()
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
        """The handler is done with what it took."""
        if self._taken:
            self._server.hold(-self._taken)
            self._taken = 0

    def _drop_received(self) -> None:
        if dropped := len(self._received):
            self._received.clear()
            self._server.hold(-dropped)
            self._server.allow(dropped)

    def _release(self, kept: int) -> None:
        """All but the last ``kept`` bytes received may be sent again on this stream."""
        if self._held > kept:
            self._allow(self._held - kept)
            self._held = kept

    def _allow(self, size: int) -> None:
        if self._has_ended:
            return
        self._owed += size
        # One window update for half a window, not one for each message.
        if self._owed >= self._server.limits.stream_window // 2:
            self._window_in += self._owed
            self._server.write(frames.window_update(self.id, self._owed))
            self._owed = 0

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class Limits(msgspec.Struct, frozen=True):
    """What a peer is granted."""

    streams: int
    stream_window: int
    connection_window: int
    """At least the default of HTTP/2: nothing takes that back."""

    def greeting(self) -> bytes:
        """What the connection begins with."""
        greeting = frames.settings(
            {
                frames.MAX_CONCURRENT_STREAMS: self.streams,
                frames.INITIAL_WINDOW_SIZE: self.stream_window,
                frames.MAX_HEADER_LIST_SIZE: headers.HEADER_LIST_BYTES_MAX,
            }
        )
        more = self.connection_window - frames.WINDOW
        return greeting + frames.window_update(0, more) if more else greeting


class ServerConnection(Connection[ServerStream]):
    """One connection.  Its owner calls ``begin`` when it is made."""

    __slots__ = (
        "_handle", "_has_greeted", "_has_sent_block", "_last_stream_id", "_owed", "_table", "_window_in", "held",
        "limits",
    )  # fmt: skip
    limits: Limits

    def __init__(self, handle: Callable[[ServerStream], Coroutine[None, None, None]]) -> None:
        """``handle``: is run as a task for each call, and cancelled when its client is gone."""
        super().__init__()
        self.held = 0
        """Bytes of requests: not taken yet, or taken by a handler that is at work on them."""
        self._handle = handle
        self._has_greeted = False
        self._table = headers.EMPTY
        self._last_stream_id = 0
        self._owed = 0
        self._has_sent_block = False

    def begin(self, transport: asyncio.Transport, limits: Limits) -> None:
        """Greet the peer."""
        self._transport = CoalescingTransport(transport)
        self.limits = limits
        self._window_in = limits.connection_window
        self.is_open = True
        self.write(limits.greeting())

    # -- called by the transport ----------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """The peer does not read: accept no more pings and settings, whose acknowledgements would have to be held."""
        super().pause_writing()
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The client reads again: read its frames again, too."""
        if self._transport is not None:
            self._transport.resume_reading()
        super().resume_writing()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Cancel all handlers."""
        self._give_up()
        # No cycles: what TLS holds of a connection is freed at once, not when the collector comes by.
        self._handle = _handle_none
        self._transport = None

    # -- called by the owner --------------------------------------------------------------------------------------

    def close(self, code: Code = Code.NO_ERROR) -> None:
        """Send GOAWAY and close the connection; all its calls end."""
        if self.is_open:
            self.write(frames.goaway(self._last_stream_id, code))
            self._give_up()
            if self._transport is not None:
                self._transport.close()

    def abort(self) -> None:
        """Close the connection without GOAWAY: for a peer that does not need it, or would not read it."""
        if self.is_open:
            self._give_up()
            if self._transport is not None:
                self._transport.abort()

    async def wait_closed(self) -> None:
        """Return when no handler runs any more."""
        if tasks := [stream.task for stream in self._streams.values() if stream.task is not None]:
            await asyncio.wait(tasks)

    # -- for its streams ------------------------------------------------------------------------------------------

    def send_block(self, stream_id: int, block: bytes, flags: int) -> None:
        """Send HEADERS; no block of ours is longer than a frame."""
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
        """Called when the last handler has ended."""

    def hold(self, size: int) -> None:
        """So many bytes more (or less) are held for the peer.  Raises: Violation: more than it is granted."""
        self.held += size

    def allow(self, size: int) -> None:
        """The peer may send ``size`` bytes again, on whatever stream."""
        self._owed += size
        # What is owed and what is held come out of the same window: no more is owed than a stream may hold.
        if self._owed >= min(self.limits.stream_window, self.limits.connection_window // 2):
            self._window_in += self._owed
            self.write(frames.window_update(0, self._owed))
            self._owed = 0

    def _frames(self, data: bytes) -> list[Frame]:
        """The frames in ``data``; keeps what is left.  Raises: Violation."""
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
        """As in ``Connection``."""
        if not stream_id % 2 or stream_id > self._last_stream_id:
            raise Violation("a stream that was never opened")
        return self._streams.get(stream_id)

    def take_data(self, frame: Frame) -> None:
        """As in ``Connection``."""
        stream, size = self.known(frame.stream_id), len(frame.payload)
        data = frames.content(frame)
        self._window_in -= size
        if self._window_in < 0:
            raise Violation("more than the connection's window", Code.FLOW_CONTROL_ERROR)
        if stream is None:
            self.allow(size)  # sent before the end of the stream arrived there
            return
        if stream.has_ended:
            raise Violation("data after the end", Code.STREAM_CLOSED)
        stream.put(data, size)
        if frame.flags & frames.END_STREAM:
            stream.end()

    def take_block(self, stream_id: int, block: bytes, *, is_last: bool) -> None:
        """As in ``Connection``: headers begin a stream, trailers end one."""
        request, self._table = headers.decoded(self._table, block)
        if stream_id <= self._last_stream_id:
            # Trailers.  Those of a stream that has ended crossed our end of it.
            if stream := self.known(stream_id):
                stream.end()
            return
        if not stream_id % 2:
            raise Violation("a stream of ours, opened by the client")
        self._last_stream_id = stream_id
        if len(self._streams) >= self.limits.streams:
            self.write(frames.reset(stream_id, Code.REFUSED_STREAM))
            return
        self._open(ServerStream(self, stream_id, request), has_ended=is_last)

    def _open(self, stream: ServerStream, *, has_ended: bool) -> None:
        if has_ended:
            stream.end()
        self._streams[stream.id] = stream
        # Its parent is this connection, which ends it, and whose ``wait_closed`` waits for it.
        task = stream.task = asyncio.get_running_loop().create_task(self._handle(stream))
        task.add_done_callback(lambda _: self._forget(stream))

    def _forget(self, stream: ServerStream) -> None:
        del self._streams[stream.id]
        stream.task = None
        stream.forget()
        if not self._streams:
            self.became_idle()

    def take_goaway(self) -> None:
        """As in ``Connection``."""
        self.close()

    def fail(self, fault: Violation) -> None:
        """As in ``Connection``: close with the code of the fault."""
        log.info("connection closed: not a peer of gRPC", reason=str(fault))
        self.close(fault.code)

    # -- ends -----------------------------------------------------------------------------------------------------

    def _give_up(self) -> None:
        self.is_open = False
        for stream in self._streams.values():
            stream.give_up()
        self.wake()


async def _handle_none(_stream: ServerStream) -> None:
    """Stands for the handler on a connection that is gone."""
