"""The client end of an HTTP/2 connection to a gRPC server, and its calls.

A call's headers and first message leave in one write.  A response wakes its caller once, in however many pieces it
arrives.  The server has a verified certificate or runs on this machine.  The client nevertheless limits the memory that
a server can make it use, by the windows of unread data, the message size, and the limits in ``core``.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from skep.errors import reason_of
from skep.rpc import frames, headers
from skep.rpc.coalescing import CoalescingTransport
from skep.rpc.core import MESSAGE_HEAD, Http2Connection, SendStream, framed
from skep.rpc.frames import Code, Frame, Violation
from skep.rpc.status import PUSHBACK, CallFailed, Lost, StatusCode, decode_message, parse_pushback, status_of

RESPONSES_WHILE_PAUSED_MAX = 1000
"""Largest number of acknowledgements of pings and settings that are queued for a server that does not read."""


class Bounds(msgspec.Struct, frozen=True):
    """Receive limits of a client, in bytes."""

    stream_window: int
    """Received bytes that a stream may buffer for its reader."""
    connection_window: int
    """Received bytes that all streams may buffer; larger than the HTTP/2 default."""
    message: int
    """Size of the largest message."""

    def greeting(self) -> bytes:
        """Return the preface and the settings, which disable the header table and server push."""
        greeting = frames.settings(
            {
                frames.HEADER_TABLE_SIZE: 0,
                frames.ENABLE_PUSH: 0,
                frames.INITIAL_WINDOW_SIZE: self.stream_window,
            }
        )
        return frames.PREFACE + greeting + frames.window_update(0, self.connection_window - frames.WINDOW)


class ClientStream(SendStream):
    """One call with messages in both directions.  It supports one reader."""

    __slots__ = (
        "_bounds", "_error", "_is_expired", "_messages", "_partial", "_spent_bytes", "_taker", "_trailers",
        "_unread_bytes", "_waiter",
    )  # fmt: skip

    def __init__(self, connection: "ClientConnection", id: int) -> None:
        super().__init__(connection, id)
        self._bounds = connection.bounds
        self._partial = bytearray()
        self._messages: deque[bytes] = deque()
        self._unread_bytes = 0
        """Received bytes that the peer's window does not get back before the reader takes the waiting message."""
        self._spent_bytes = 0
        """Bytes that the next window update returns to the peer."""
        self._trailers: Mapping[str, str] | None = None
        self._error: Exception | None = None
        self._is_expired = False
        self._waiter: asyncio.Future[None] | None = None
        self._taker: Callable[[bytes], bool] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the call has ended, with trailers or with an error."""
        return self._trailers is not None or self._error is not None

    @property
    def is_gone(self) -> bool:
        """Whether the server has stopped reading this call."""
        return self.has_ended

    @property
    def has_message(self) -> bool:
        """Whether ``receive`` returns a message without waiting."""
        return bool(self._messages)

    @property
    def has_said_all(self) -> bool:
        """Whether everything has been sent, including the end of the stream."""
        return self.ends_after_unsent and not self.unsent

    def begin(self, block: bytes, message: bytes | None, *, is_last: bool) -> None:
        """Send the headers and the first message, or only the headers if ``message`` is None."""
        head = frames.frame(frames.HEADERS, frames.END_HEADERS, self.id, block)
        if message is None:
            self._connection.write(head)
        else:
            self.send_data(head, framed(message), ends=is_last)

    def end_sending(self) -> None:
        """End the sending direction.  Call it once ``drain`` has returned."""
        self.ends_after_unsent = True
        self._connection.write(frames.frame(frames.DATA, frames.END_STREAM, self.id))

    def send(self, message: bytes, *, is_last: bool = False) -> None:
        """Send another message without waiting.  Bytes beyond the peer's window are queued until ``drain``.

        Raises: CallFailed, Lost: the call has ended.
        """
        if self.has_ended:
            self._raise_end()
        self.send_data(b"", framed(message), ends=is_last)

    async def receive(self) -> bytes | None:
        """Return the next message, or None after the last one.  Raises: CallFailed, Lost."""
        while not self._messages:
            if self._error is not None:
                raise self._error
            if self._trailers is not None:
                _check_status(self._trailers)
                return None
            await self._wait_change()
        message = self._messages.popleft()
        if not self._messages and not self.has_ended:
            unread, self._unread_bytes = self._unread_bytes, 0
            self._give_back(unread)
        return message

    async def only_message(self) -> bytes:
        """Return the response of a unary call.  Raises: CallFailed, Lost; TimeoutError after ``expire``."""
        while not self.has_ended:
            if self._is_expired:
                raise TimeoutError
            await self._wait_change()
        if self._error is not None:
            raise self._error
        if self._trailers is not None:
            _check_status(self._trailers)
        if len(self._messages) != 1:
            raise Lost("the response has not exactly one message")
        return self._messages.popleft()

    def expire(self) -> None:
        """End the wait for the only message with TimeoutError."""
        self._is_expired = True
        self._wake()

    def offer_to(self, taker: Callable[[bytes], bool]) -> None:
        """Offer each message that arrives while the reader waits to ``taker``, which returns whether it consumed it.

        An exception of ``taker`` reaches the reader.
        """
        self._taker = taker

    async def drain(self) -> None:
        """Call ``SendStream.drain``.  Raises: CallFailed if the peer sent a status, else Lost."""
        try:
            await super().drain()
        except Lost:
            self._raise_end()

    # -- called by the connection ---------------------------------------------------------------------------------

    def take_data(self, data: bytes, window_bytes: int) -> None:
        """Receive message bytes, which used ``window_bytes`` of the window.  Raises: Violation."""
        self._partial += data
        start = 0
        with memoryview(self._partial) as received:
            while len(received) - start >= MESSAGE_HEAD.size:
                is_compressed, size = MESSAGE_HEAD.unpack_from(received, start)
                if is_compressed:
                    raise Violation("a compressed message")
                if size > self._bounds.message:
                    raise Violation(f"a message of {size} bytes", Code.ENHANCE_YOUR_CALM)
                begin = start + MESSAGE_HEAD.size
                if begin + size > len(received):
                    break
                start = begin + size
                message = bytes(received[begin:start])
                if not self._is_taken(message):
                    self._messages.append(message)
        del self._partial[:start]
        if self._messages:
            self._unread_bytes += window_bytes
            if self._unread_bytes > self._bounds.stream_window:
                raise Violation("more than the stream's window", Code.FLOW_CONTROL_ERROR)
            self._wake()
        else:
            self._give_back(window_bytes)  # a message may be longer than the window

    def take_headers(self, received: Mapping[str, str], *, is_last: bool) -> None:
        """Receive the headers, or the trailers if ``is_last``.  Trailers may arrive without headers."""
        if received.get(":status", "200") != "200":
            self.end(Lost(f"HTTP status {received[':status']}"))
        elif is_last:
            self._trailers = received
            self._finish()

    def reset(self, code: int) -> None:
        """End the call after the server has reset the stream."""
        self.end(Lost(f"the call was reset, code {code}"))

    def end(self, error: Lost) -> None:
        """End the stream with ``error`` and drop unsent bytes."""
        if not self.has_ended:
            self._error = error
            self._finish()

    # -- internal ---------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        self.drop_unsent()
        self._wake()
        self._connection.wake()  # tasks that wait for its windows

    def _raise_end(self) -> None:
        """Raise the error that ended the call."""
        if self._error is not None:
            raise self._error
        if self._trailers is not None:
            _check_status(self._trailers)
        raise Lost("the call has ended")

    def _is_taken(self, message: bytes) -> bool:
        if self._taker is None or self._messages or self._waiter is None or self._waiter.done():
            return False
        try:
            return self._taker(message)
        except Exception as error:  # the reader raises it
            self._error = error
            self._wake()
            return True

    async def _wait_change(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _give_back(self, size: int) -> None:
        self._spent_bytes += size
        if self._spent_bytes >= self._bounds.stream_window // 2:
            self._connection.write(frames.window_update(self.id, self._spent_bytes))
            self._spent_bytes = 0


class ClientConnection(Http2Connection[ClientStream]):
    """One connection and its calls."""

    __slots__ = ("_coalesces", "_next_id", "_responses_owed", "_spent_bytes", "bounds")

    def __init__(self, bounds: Bounds, *, coalesces: bool = False) -> None:
        """
        Args:
            coalesces: Whether to join all writes of one event loop iteration, because each TLS record is expensive.
        """
        super().__init__()
        self.bounds = bounds
        self._coalesces = coalesces
        self._next_id = 1
        self._spent_bytes = 0
        self._responses_owed = 0

    @property
    def is_lost(self) -> bool:
        """Whether the connection accepts no further calls."""
        return not self.is_open

    @property
    def peer_certificate(self) -> Mapping[str, Any]:
        """The peer's certificate as returned by ``SSLSocket.getpeercert()``, or empty if it was not verified."""
        return (self._transport and self._transport.get_extra_info("peercert")) or {}

    @property
    def is_used_up(self) -> bool:
        """Whether all stream ids of the connection are used."""
        return self._next_id > frames.STREAM_ID_MAX

    @contextmanager
    def stream(self) -> Iterator[ClientStream]:
        """Open a call and release it at the end of the context.  Raises: Lost."""
        stream = self.open()
        try:
            yield stream
        finally:
            self.release(stream)

    def open(self) -> ClientStream:
        """Open a call.  Call its ``begin`` before you open another one, and ``release`` it at its end.

        Raises: Lost: the connection is closed or has used all its ids.
        """
        if self.is_used_up:
            self.abort()
        if not self.is_open:
            raise Lost("the connection is closed")
        stream = ClientStream(self, self._next_id)
        self._next_id += 2
        self._streams[stream.id] = stream
        return stream

    def release(self, stream: ClientStream) -> None:
        """Forget a call, and cancel it if it has not ended."""
        del self._streams[stream.id]
        if not (stream.has_ended and stream.has_said_all):
            self.write(frames.reset(stream.id, Code.CANCEL))

    def close(self) -> None:
        """Close the connection once queued bytes are written."""
        if self._transport is not None:
            self._transport.close()
        self._lose(Lost("the connection was closed"))

    def abort(self) -> None:
        """Drop the connection now."""
        if self._transport is not None:
            self._transport.abort()
        self._lose(Lost("the connection was closed"))

    # -- called by the transport --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the preface and the settings."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = CoalescingTransport(transport) if self._coalesces else transport
        self.is_open = True
        self.write(self.bounds.greeting())

    def connection_lost(self, exc: Exception | None) -> None:
        """End all streams."""
        reason = reason_of(exc) if exc is not None else "closed by the other end"
        self._lose(Lost(f"the connection broke: {reason}"))
        self._transport = None

    def resume_writing(self) -> None:
        """Resume sending after the server reads again."""
        self._responses_owed = 0
        super().resume_writing()

    # -- frames -----------------------------------------------------------------------------------------------------

    def known(self, stream_id: int) -> ClientStream | None:
        """Implement ``Http2Connection.known``."""
        if not stream_id % 2 or stream_id >= self._next_id:
            raise Violation("a stream that was never opened")
        return self._streams.get(stream_id)

    def take_data(self, frame: Frame) -> None:
        """Implement ``Http2Connection.take_data``."""
        # The connection's window is returned at once, so that a slow reader blocks only its own stream.
        self._spent_bytes += len(frame.payload)
        if self._spent_bytes >= self.bounds.connection_window // 2:
            self.write(frames.window_update(0, self._spent_bytes))
            self._spent_bytes = 0
        if stream := self.known(frame.stream_id):
            if not stream.has_ended:
                stream.take_data(frames.content(frame), len(frame.payload))
            if frame.flags & frames.END_STREAM:
                stream.end(Lost("the response ended without a status"))

    def take_block(self, stream_id: int, block: bytes, *, is_last: bool) -> None:
        """Implement ``Http2Connection.take_block``."""
        received = headers.response_headers(block)
        if stream := self.known(stream_id):
            stream.take_headers(received, is_last=is_last)

    def take_goaway(self) -> None:
        """Close the connection and end all streams."""
        if self._transport is not None:
            self._transport.close()
        self._lose(Lost("the server goes away"))

    def fail(self, fault: Violation) -> None:
        """Abort the connection and end all streams."""
        if self._transport is not None:
            self._transport.abort()
        self._lose(Lost(f"not HTTP/2 as agreed: {fault}"))

    def hold_response(self) -> None:
        """Implement ``Http2Connection.hold_response``."""
        # Unlike a server, a client continues to read while its peer does not.  Otherwise both could wait forever.
        self._responses_owed += 1
        if self._responses_owed > RESPONSES_WHILE_PAUSED_MAX:
            raise Violation("a server that sends pings and does not read", Code.ENHANCE_YOUR_CALM)

    def _lose(self, error: Lost) -> None:
        self.is_open = False
        for stream in self._streams.values():
            stream.end(error)
        self.wake()


def _check_status(trailers: Mapping[str, str]) -> None:
    """Raise unless the status is OK.  Raises: CallFailed; Lost if the trailers have no status."""
    number = trailers.get("grpc-status")
    if number is None:
        raise Lost("the response ended without a status")
    status = status_of(number)
    if status is not StatusCode.OK:
        message = decode_message(trailers.get("grpc-message", ""))
        raise CallFailed(status, message, parse_pushback(trailers.get(PUSHBACK)))
