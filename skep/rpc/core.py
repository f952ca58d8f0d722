"""Frame parsing and flow control that both ends of an HTTP/2 connection share (RFC 9113).

This module bounds the memory that a peer can occupy with one frame, one header block, and the acknowledgements of its
pings and settings while it does not read.  ``server`` and ``client`` bound everything else.
"""

import asyncio
from abc import abstractmethod
from struct import Struct
from typing import Any, Generic, TypeVar

from skep.rpc import frames
from skep.rpc.frames import Code, Frame, Violation
from skep.rpc.status import Lost

HEADER_BLOCK_BYTES_MAX = 32 * 1024
"""Largest encoded size of the headers of one request or response, with continuations."""

MESSAGE_HEAD = Struct(">BI")
"""The gRPC message prefix: the compression flag and the message length."""

_NOTHING = memoryview(b"")


def framed(message: bytes) -> bytes:
    """Return ``message`` with its gRPC prefix."""
    return MESSAGE_HEAD.pack(0, len(message)) + message


class SendStream:
    """The sending half of one call, with the bytes that wait until the peer opens its windows."""

    __slots__ = ("_connection", "ends_after_unsent", "id", "unsent", "window_out")

    def __init__(self, connection: "Http2Connection[Any]", id: int) -> None:
        self.id = id
        self.window_out = connection.window_of_streams
        """Bytes that the peer accepts on this stream.  A settings change can make it negative."""
        self.unsent = _NOTHING
        self.ends_after_unsent = False
        """Whether the sending direction ends with the last byte of ``unsent``."""
        self._connection = connection

    @property
    @abstractmethod
    def is_gone(self) -> bool:
        """Whether the stream has ended, so that the peer discards further data."""

    def reset(self, code: int) -> None:
        """Handle RST_STREAM: the peer has ended the call without a status."""

    def send_data(self, head: bytes, data: bytes, *, ends: bool = False) -> None:
        """Send the frames ``head`` now, and ``data`` as the peer's windows allow."""
        self.unsent = memoryview(bytes(self.unsent) + data if self.unsent else data)
        self.ends_after_unsent = ends
        self._connection.write(head + self._connection.sendable(self))

    async def drain(self) -> None:
        """Wait until everything is sent and the peer reads.  Raises: Lost: the peer has closed the stream."""
        connection = self._connection
        while not self.is_gone:
            if not self.unsent and not connection.is_paused:
                return
            await connection.wait_change()
        raise Lost("the peer is gone")

    def drop_unsent(self) -> None:
        """Drop unsent bytes after the peer has stopped reading this stream."""
        self.unsent = _NOTHING


S = TypeVar("S", bound=SendStream)


class Http2Connection(asyncio.Protocol, Generic[S]):
    """Parses incoming frames for its streams, and sends frames."""

    __slots__ = (
        "_begun",
        "_received",
        "_streams",
        "_transport",
        "_waiting",
        "is_open",
        "is_paused",
        "window_of_streams",
        "window_out",
    )  # fmt: skip

    def __init__(self) -> None:
        self.window_out = frames.WINDOW
        """Bytes that the peer accepts on all streams together."""
        self.window_of_streams = frames.WINDOW
        """Bytes that the peer accepts on a new stream."""
        self.is_paused = False
        """Whether the peer has stopped reading."""
        self.is_open = False
        self._transport: asyncio.Transport | None = None
        self._received = b""
        """The received part of the next frame."""
        self._streams: dict[int, S] = {}
        self._begun: tuple[int, int, bytes] | None = None
        """An unfinished header block: its stream, the flags of its first frame, the part received so far."""
        self._waiting: dict[asyncio.Future[None], None] = {}

    # -- implemented by each end ---------------------------------------------------------------------------

    @abstractmethod
    def known(self, stream_id: int) -> S | None:
        """Return the stream, or None if it has ended.  Raises: Violation: the stream was never opened."""

    @abstractmethod
    def take_data(self, frame: Frame) -> None:
        """Handle a DATA frame.  Raises: Violation."""

    @abstractmethod
    def take_block(self, stream_id: int, block: bytes, *, is_last: bool) -> None:
        """Handle a complete header block.  ``is_last`` means that it ends its stream.  Raises: Violation."""

    @abstractmethod
    def take_goaway(self) -> None:
        """Handle GOAWAY: the peer ends the connection."""

    @abstractmethod
    def fail(self, fault: Violation) -> None:
        """End the connection after a protocol violation of the peer."""

    def hold_response(self) -> None:
        """Count an acknowledgement that is queued while the peer does not read.  Raises: Violation: too many are
        queued.
        """

    # -- called by the transport --------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Handle complete frames and keep the rest."""
        if not self.is_open:
            return
        try:
            for frame in self._frames(self._received + data):
                self._take(frame)
        except Violation as fault:
            self.fail(fault)

    def pause_writing(self) -> None:
        """Stop sending while the peer does not read."""
        self.is_paused = True

    def resume_writing(self) -> None:
        """Send queued data after the peer reads again."""
        self.is_paused = False
        self._send_on()

    # -- sending ----------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send frames.  After the end of the connection they are discarded."""
        if data and self.is_open and self._transport is not None:
            self._transport.write(data)

    def sendable(self, stream: SendStream) -> bytes:
        """Return the frames that ``stream`` may send now."""
        ready = []
        while stream.unsent and not self.is_paused:
            size = min(len(stream.unsent), self.window_out, stream.window_out, frames.FRAME_BYTES)
            if size <= 0:
                break
            part, stream.unsent = stream.unsent[:size], stream.unsent[size:]
            self.window_out -= size
            stream.window_out -= size
            flags = frames.END_STREAM if stream.ends_after_unsent and not stream.unsent else 0
            ready.append(frames.frame(frames.DATA, flags, stream.id, part))
        return b"".join(ready)

    async def wait_change(self) -> None:
        """Wait until a window has grown, the peer reads again, or the connection has ended."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting[waiter] = None
        try:
            await waiter
        finally:
            self._waiting.pop(waiter, None)

    def wake(self) -> None:
        """Wake every task that waits for a change of state."""
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    def _send_on(self) -> None:
        """Send data that waited for a window, oldest call first."""
        for stream in self._streams.values():
            if stream.unsent:
                self.write(self.sendable(stream))
        self.wake()

    # -- frames -----------------------------------------------------------------------------------------------------

    def _frames(self, data: bytes) -> list[Frame]:
        """Return the complete frames in ``data`` and keep the rest.  Raises: Violation."""
        whole, self._received = frames.split(data)
        return whole

    def _take(self, frame: Frame) -> None:
        """Handle a frame.  Raises: Violation."""
        if not self.is_open:
            return  # an earlier frame has ended the stream
        kind = frame.kind
        if self._begun is not None and kind != frames.CONTINUATION:
            raise Violation("a header block is interrupted by another frame")
        if kind == frames.DATA:
            self.take_data(frame)
        elif kind == frames.HEADERS:
            self._take_part(frame.stream_id, frame.flags, frames.content(frame), frame.flags)
        elif kind == frames.CONTINUATION:
            self._take_continuation(frame)
        elif kind == frames.WINDOW_UPDATE:
            self._take_window(frame.stream_id, frames.number(frame.payload))
        elif kind == frames.RST_STREAM:
            code = frames.number(frame.payload)
            if stream := self.known(frame.stream_id):
                stream.reset(code)
        elif frame.stream_id and kind in (frames.SETTINGS, frames.PING, frames.GOAWAY):
            raise Violation("a frame of the connection on a stream")
        elif kind == frames.SETTINGS:
            self._take_settings(frame)
        elif kind == frames.PING:
            self._take_ping(frame)
        elif kind == frames.GOAWAY:
            self.take_goaway()
        elif kind == frames.PUSH_PROMISE:
            raise Violation("a push, which was not enabled")

    def _take_continuation(self, frame: Frame) -> None:
        if self._begun is None or self._begun[0] != frame.stream_id:
            raise Violation("a continuation of nothing")
        stream_id, first_flags, block = self._begun
        self._take_part(stream_id, frame.flags, block + frame.payload, first_flags)

    def _take_part(self, stream_id: int, flags: int, block: bytes, first_flags: int) -> None:
        if len(block) > HEADER_BLOCK_BYTES_MAX:
            raise Violation("too many headers", Code.ENHANCE_YOUR_CALM)
        if flags & frames.END_HEADERS:
            self._begun = None
            self.take_block(stream_id, block, is_last=bool(first_flags & frames.END_STREAM))
            return
        if self._begun is not None and block == self._begun[2]:
            raise Violation("continuations of nothing", Code.ENHANCE_YOUR_CALM)
        self._begun = stream_id, first_flags, block

    def _take_window(self, stream_id: int, size: int) -> None:
        if not stream_id:
            self.window_out += size
            window = self.window_out
        elif stream := self.known(stream_id):
            stream.window_out += size
            window = stream.window_out
        else:
            return
        if not size or window > frames.WINDOW_MAX:
            raise Violation("an invalid window size", Code.FLOW_CONTROL_ERROR)
        self._send_on()

    def _take_settings(self, frame: Frame) -> None:
        if frame.flags & frames.ACK:
            return
        window = frames.settings_of(frame.payload).get(frames.INITIAL_WINDOW_SIZE, self.window_of_streams)
        if window > frames.WINDOW_MAX:
            raise Violation("an invalid window size", Code.FLOW_CONTROL_ERROR)
        for stream in self._streams.values():
            stream.window_out += window - self.window_of_streams
        self.window_of_streams = window
        self._acknowledge(frames.frame(frames.SETTINGS, frames.ACK, 0))
        self._send_on()

    def _take_ping(self, frame: Frame) -> None:
        if len(frame.payload) != 8:
            raise Violation("a ping of the wrong length", Code.FRAME_SIZE_ERROR)
        if not frame.flags & frames.ACK:
            self._acknowledge(frames.frame(frames.PING, frames.ACK, 0, frame.payload))

    def _acknowledge(self, frame: bytes) -> None:
        if self.is_paused:
            self.hold_response()
        self.write(frame)
