"""The server's end of one HTTP/2 connection (RFC 9113): takes frames, keeps its streams, and sends their answers.

What a peer can make it hold is bounded: one frame, one header block, its windows of unread data, its number of streams
(one that it has reset counts until its handler has ended), and what is written while it does not read.
"""

import asyncio
from collections.abc import Callable, Coroutine

import msgspec
import structlog

from skep.aio import http2
from skep.aio.http2 import Code, Frame, Violation
from skep.aio.lean_grpc import CoalescingTransport
from skep.wire.http2 import headers
from skep.wire.http2.stream import Stream

log = structlog.get_logger(__name__)

HEADER_BLOCK_BYTES_MAX = 32 * 1024
"""Of one request, as it comes, continuations included."""


class Limits(msgspec.Struct, frozen=True):
    """What a peer is granted."""

    streams: int
    stream_window: int
    connection_window: int
    """At least the default of HTTP/2: nothing takes that back."""

    def greeting(self) -> bytes:
        """What the connection begins with."""
        greeting = http2.settings(
            {
                http2.MAX_CONCURRENT_STREAMS: self.streams,
                http2.INITIAL_WINDOW_SIZE: self.stream_window,
                http2.MAX_HEADER_LIST_SIZE: headers.HEADER_LIST_BYTES_MAX,
            }
        )
        more = self.connection_window - http2.WINDOW
        return greeting + http2.window_update(0, more) if more else greeting


class Connection(asyncio.Protocol):
    """One connection.  Whoever accepts it calls ``begin`` when it is made."""

    __slots__ = (
        "_answer",
        "_begun",
        "_has_greeted",
        "_has_sent_block",
        "_last_stream_id",
        "_owed",
        "_received",
        "_streams",
        "_table",
        "_transport",
        "_waiting",
        "_window_in",
        "held",
        "is_open",
        "is_paused",
        "limits",
        "window_of_streams",
        "window_out",
    )  # fmt: skip
    limits: Limits
    _transport: asyncio.Transport

    def __init__(self, answer: Callable[[Stream], Coroutine[None, None, None]]) -> None:
        """``answer``: is run as a task for each call, and cancelled when its client is gone."""
        self.window_out = http2.WINDOW
        """Bytes that the peer takes on all streams together."""
        self.window_of_streams = http2.WINDOW
        """Bytes that the peer takes on a stream that begins."""
        self.is_paused = False
        """Whether the peer does not read."""
        self.is_open = False
        self.held = 0
        """Bytes of requests: not taken yet, or taken by a handler that is at work on them."""
        self._answer = answer
        self._received = b""
        """A frame that is not complete, or the preface."""
        self._has_greeted = False
        self._table = headers.EMPTY
        self._streams: dict[int, Stream] = {}
        self._last_stream_id = 0
        self._begun: tuple[int, int, bytes] | None = None
        """A header block that continues: stream, flags of its first frame, what has come of it."""
        self._owed = 0
        self._waiting: dict[asyncio.Future[None], None] = {}
        self._has_sent_block = False

    def begin(self, transport: asyncio.Transport, limits: Limits) -> None:
        """Greet the peer."""
        self._transport = CoalescingTransport(transport)
        self.limits = limits
        self._window_in = limits.connection_window
        self.is_open = True
        self.write(limits.greeting())

    # -- what the transport says ----------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if not self.is_open:
            return
        try:
            for frame in self._frames(self._received + data):
                self._take(frame)
        except Violation as fault:
            log.info("connection closed: not a peer of gRPC", reason=str(fault))
            self.close(fault.code)

    def pause_writing(self) -> None:
        """The peer does not read: take no more of its pings and settings, each of which has an answer to hold."""
        self.is_paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self.is_paused = False
        self._transport.resume_reading()
        self._wake()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._give_up()
        # No cycles: what TLS holds of a connection is freed at once, not when the collector comes by.
        self._answer = _nobody
        if hasattr(self, "_transport"):
            del self._transport

    # -- for whoever owns it --------------------------------------------------------------------------------------

    def close(self, code: Code = Code.NO_ERROR) -> None:
        """End it with a last word, and all its calls."""
        if self.is_open:
            self.write(http2.goaway(self._last_stream_id, code))
            self._give_up()
            self._transport.close()

    def abort(self) -> None:
        """End it without a word: for a peer that need not be told, or would not read it."""
        if self.is_open:
            self._give_up()
            self._transport.abort()

    async def wait_closed(self) -> None:
        """Return when no call is being answered any more."""
        if tasks := [stream.task for stream in self._streams.values() if stream.task is not None]:
            await asyncio.wait(tasks)

    # -- for its streams ------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self.is_open:
            self._transport.write(data)

    def send_block(self, stream_id: int, block: bytes, flags: int) -> None:
        """Send HEADERS; no block of ours is longer than a frame."""
        if not self._has_sent_block:
            self._has_sent_block = True
            block = headers.NO_TABLE + block
        self.write(http2.frame(http2.HEADERS, flags, stream_id, block))

    async def wait_change(self) -> None:
        """Return when a window has grown, or the peer reads again."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting[waiter] = None
        try:
            await waiter
        finally:
            self._waiting.pop(waiter, None)

    @property
    def is_idle(self) -> bool:
        """Whether no call is being answered."""
        return not self._streams

    @property
    def has_called(self) -> bool:
        """Whether the peer has ever made a call."""
        return self._last_stream_id > 0

    def became_idle(self) -> None:
        """The last call under way has ended; for whoever counts."""

    def hold(self, size: int) -> None:
        """So many bytes more (or less) are held for the peer.  Raises: Violation: more than it is granted."""
        self.held += size

    def allow(self, size: int) -> None:
        """The peer may send ``size`` bytes again, on whatever stream."""
        self._owed += size
        # What is owed and what is held come out of the same window: no more is owed than a stream may hold.
        if self._owed >= min(self.limits.stream_window, self.limits.connection_window // 2):
            self._window_in += self._owed
            self.write(http2.window_update(0, self._owed))
            self._owed = 0

    def _frames(self, data: bytes) -> list[Frame]:
        """The frames in ``data``; keeps what is left.  Raises: Violation."""
        if not self._has_greeted:
            size = len(http2.PREFACE)
            if data[:size] != http2.PREFACE[: len(data)]:
                raise Violation("this is not HTTP/2")
            if len(data) < size:
                self._received = data
                return []
            self._has_greeted, data = True, data[size:]
        frames, self._received = http2.split(data)
        return frames

    # -- frames ---------------------------------------------------------------------------------------------------

    def _take(self, frame: Frame) -> None:
        """Raises: Violation."""
        if not self.is_open:
            return  # ended by a frame before this one
        kind = frame.kind
        if self._begun is not None and kind != http2.CONTINUATION:
            raise Violation("headers that do not go on")
        if kind == http2.DATA:
            self._take_data(frame)
        elif kind == http2.HEADERS:
            self._take_block(frame.stream_id, frame.flags, http2.content(frame), frame.flags)
        elif kind == http2.CONTINUATION:
            self._take_continuation(frame)
        elif kind == http2.WINDOW_UPDATE:
            self._take_window(frame.stream_id, http2.number(frame.payload))
        elif kind == http2.RST_STREAM:
            http2.number(frame.payload)
            if stream := self._known(frame.stream_id):
                stream.give_up()
        elif frame.stream_id and kind in (http2.SETTINGS, http2.PING, http2.GOAWAY):
            raise Violation("a word on the connection, said on a stream")
        elif kind == http2.SETTINGS:
            self._take_settings(frame)
        elif kind == http2.PING:
            if len(frame.payload) != 8:
                raise Violation("a ping of the wrong length", Code.FRAME_SIZE_ERROR)
            if not frame.flags & http2.ACK:
                self.write(http2.frame(http2.PING, http2.ACK, 0, frame.payload))
        elif kind == http2.GOAWAY:
            self.close()
        elif kind == http2.PUSH_PROMISE:
            raise Violation("a client that pushes")

    def _known(self, stream_id: int) -> Stream | None:
        """The stream; None: it has ended.  Raises: Violation: it never began."""
        if not stream_id % 2 or stream_id > self._last_stream_id:
            raise Violation("a stream that was never opened")
        return self._streams.get(stream_id)

    def _take_data(self, frame: Frame) -> None:
        stream, size = self._known(frame.stream_id), len(frame.payload)
        data = http2.content(frame)
        self._window_in -= size
        if self._window_in < 0:
            raise Violation("more than the connection's window", Code.FLOW_CONTROL_ERROR)
        if stream is None:
            self.allow(size)  # sent before it knew that the stream has ended
            return
        if stream.has_ended:
            raise Violation("data after the end", Code.STREAM_CLOSED)
        stream.put(data, size)
        if frame.flags & http2.END_STREAM:
            stream.end()

    def _take_continuation(self, frame: Frame) -> None:
        if self._begun is None or self._begun[0] != frame.stream_id:
            raise Violation("a continuation of nothing")
        stream_id, first_flags, block = self._begun
        self._take_block(stream_id, frame.flags, block + frame.payload, first_flags)

    def _take_block(self, stream_id: int, flags: int, block: bytes, first_flags: int) -> None:
        if len(block) > HEADER_BLOCK_BYTES_MAX:
            raise Violation("too many headers", Code.ENHANCE_YOUR_CALM)
        if not flags & http2.END_HEADERS:
            if self._begun is not None and block == self._begun[2]:
                raise Violation("continuations of nothing", Code.ENHANCE_YOUR_CALM)
            self._begun = stream_id, first_flags, block
            return
        self._begun = None
        request, self._table = headers.decoded(self._table, block)
        if stream_id <= self._last_stream_id:
            # Trailers.  Those of a stream that has ended were sent before its client knew.
            if stream := self._known(stream_id):
                stream.end()
            return
        if not stream_id % 2:
            raise Violation("a stream of ours, opened by the client")
        self._last_stream_id = stream_id
        if len(self._streams) >= self.limits.streams:
            self.write(http2.reset(stream_id, Code.REFUSED_STREAM))
            return
        self._open(Stream(self, stream_id, request), has_ended=bool(first_flags & http2.END_STREAM))

    def _open(self, stream: Stream, *, has_ended: bool) -> None:
        if has_ended:
            stream.end()
        self._streams[stream.id] = stream
        # Its parent is this connection, which ends it, and whose ``wait_closed`` waits for it.
        task = stream.task = asyncio.get_running_loop().create_task(self._answer(stream))
        task.add_done_callback(lambda _: self._forget(stream))

    def _forget(self, stream: Stream) -> None:
        del self._streams[stream.id]
        stream.task = None
        stream.forget()
        if not self._streams:
            self.became_idle()

    def _take_window(self, stream_id: int, size: int) -> None:
        if not stream_id:
            self.window_out += size
            window = self.window_out
        elif stream := self._known(stream_id):
            stream.window_out += size
            window = stream.window_out
        else:
            return
        if not size or window > http2.WINDOW_MAX:
            raise Violation("a window that cannot be", Code.FLOW_CONTROL_ERROR)
        self._wake()

    def _take_settings(self, frame: Frame) -> None:
        if frame.flags & http2.ACK:
            return
        for number, value in http2.settings_of(frame.payload).items():
            if number == http2.INITIAL_WINDOW_SIZE:
                if value > http2.WINDOW_MAX:
                    raise Violation("a window that cannot be", Code.FLOW_CONTROL_ERROR)
                for stream in self._streams.values():
                    stream.window_out += value - self.window_of_streams
                self.window_of_streams = value
        self.write(http2.frame(http2.SETTINGS, http2.ACK, 0))
        self._wake()

    # -- ends -----------------------------------------------------------------------------------------------------

    def _give_up(self) -> None:
        self.is_open = False
        for stream in self._streams.values():
            stream.give_up()
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)


async def _nobody(_stream: Stream) -> None:
    """Who answers on a connection that is gone."""
