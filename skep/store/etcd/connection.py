"""One HTTP/2 connection to a gRPC server that is trusted, and the calls on it (``calls``)."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from struct import Struct
from urllib.parse import unquote

from skep.aio import http2
from skep.aio.http2 import Frame, Violation
from skep.store.etcd import headers

STREAM_WINDOW = 8 * 1024 * 1024
"""How far a stream may be ahead of its reader, who has not yet taken what is whole."""

CONNECTION_WINDOW = 16 * 1024 * 1024

_MESSAGE_HEAD = Struct(">BI")
"""Whether the message is compressed, and how long it is."""


class Lost(ConnectionError):
    """The connection, or the call on it, ended without an answer."""


class CallFailed(Exception):
    """The peer answered that the call failed; ``str``: its message."""


class Stream:
    """One call: messages out, messages in.  For one reader."""

    def __init__(self, connection: "Connection", id: int, send_window: int) -> None:
        self.id = id
        self.send_window = send_window
        self.unsent = memoryview(b"")
        self.ends_after_unsent = False
        self._connection = connection
        self._partial = bytearray()
        self._messages: deque[bytes] = deque()
        self._unread_bytes = 0
        """Of the peer's window, taken while a whole message was waiting to be read."""
        self._spent_bytes = 0
        """Of the peer's window, to be given back."""
        self._trailers: Mapping[str, str] | None = None
        self._error: Exception | None = None
        self._is_expired = False
        self._waiter: asyncio.Future[None] | None = None
        self._taker: Callable[[bytes], bool] | None = None

    @property
    def has_ended(self) -> bool:
        """Nothing more will come."""
        return self._trailers is not None or self._error is not None

    @property
    def has_said_all(self) -> bool:
        """Our direction has ended."""
        return self.ends_after_unsent and not self.unsent

    def begin(self, block: bytes, message: bytes, *, is_last: bool) -> None:
        """Send the headers and the first message."""
        head = http2.frame(http2.HEADERS, http2.END_HEADERS, self.id, block)
        self._send(head, message, is_last=is_last)

    def send(self, message: bytes) -> None:
        """Send one more message; never waits: what the peer does not take yet is kept.  Raises: Lost."""
        if self._error is not None:
            raise self._error
        self._send(b"", message, is_last=False)

    async def receive(self) -> bytes | None:
        """The next message; None when there are no more.  Raises: CallFailed, Lost."""
        while not self._messages:
            if self._error is not None:
                raise self._error
            if self._trailers is not None:
                _check_status(self._trailers)
                return None
            await self._changed()
        message = self._messages.popleft()
        if not self._messages and not self.has_ended:
            unread, self._unread_bytes = self._unread_bytes, 0
            self._give_back(unread)
        return message

    async def only_message(self) -> bytes:
        """The answer of a call that has one.  Raises: CallFailed, Lost."""
        while not self.has_ended:
            if self._is_expired:
                raise TimeoutError
            await self._changed()
        if self._error is not None:
            raise self._error
        if self._trailers is not None:
            _check_status(self._trailers)
        if len(self._messages) != 1:
            raise Lost("not one message in answer")
        return self._messages.popleft()

    def expire(self) -> None:
        """Who waits for the only message does so no longer."""
        self._is_expired = True
        self._wake()

    def offer_to(self, taker: Callable[[bytes], bool]) -> None:
        """Messages that come while the reader waits are shown to ``taker`` first, and are done with if it says so.

        What it raises, the reader gets.
        """
        self._taker = taker

    async def _changed(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _send(self, head: bytes, message: bytes, *, is_last: bool) -> None:
        self.unsent = memoryview(bytes(self.unsent) + _MESSAGE_HEAD.pack(0, len(message)) + message)
        self.ends_after_unsent = is_last
        self._connection.write(head + self._connection.sendable(self))

    def _give_back(self, size: int) -> None:
        self._spent_bytes += size
        if self._spent_bytes >= STREAM_WINDOW // 2:
            self._connection.write(http2.window_update(self.id, self._spent_bytes))
            self._spent_bytes = 0

    # --- called by the connection -----------------------------------------------------------------------------

    def take_data(self, data: bytes, window_bytes: int) -> None:
        """Bytes of messages; ``window_bytes``: what they took of the window.  Raises: Violation."""
        self._partial += data
        start = 0
        with memoryview(self._partial) as received:
            while len(received) - start >= _MESSAGE_HEAD.size:
                is_compressed, size = _MESSAGE_HEAD.unpack_from(received, start)
                if is_compressed:
                    raise Violation("a compressed message")
                begin = start + _MESSAGE_HEAD.size
                if begin + size > len(received):
                    break
                start = begin + size
                message = bytes(received[begin:start])
                if not self._is_taken(message):
                    self._messages.append(message)
        del self._partial[:start]
        if self._messages:
            self._unread_bytes += window_bytes
            self._wake()
        else:
            self._give_back(window_bytes)  # a message may be longer than the window

    def _is_taken(self, message: bytes) -> bool:
        if self._taker is None or self._messages or self._waiter is None or self._waiter.done():
            return False
        try:
            return self._taker(message)
        except Exception as error:  # the reader's business: it climbs there
            self._error = error
            self._wake()
            return True

    def take_headers(self, headers: Mapping[str, str], *, is_last: bool) -> None:
        """Headers, or with ``is_last`` the trailers, which may come alone."""
        if headers.get(":status", "200") != "200":
            self.end(Lost(f"HTTP status {headers[':status']}"))
        elif is_last:
            self._trailers = headers
            self._wake()

    def end(self, error: Lost) -> None:
        """No answer will come, or no more of it; nothing that is still unsent matters."""
        if not self.has_ended:
            self._error = error
            self.unsent, self.ends_after_unsent = memoryview(b""), True
            self._wake()


class Connection(asyncio.Protocol):
    """Frames in and out, and whose they are."""

    def __init__(self) -> None:
        self.is_lost = False
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._streams: dict[int, Stream] = {}
        self._next_id = 1
        self._send_window = http2.WINDOW
        self._stream_send_window = http2.WINDOW
        self._frame_bytes = http2.FRAME_BYTES
        self._spent_bytes = 0
        self._begun: tuple[Frame, bytes] | None = None
        """A HEADERS frame that goes on in CONTINUATION frames, and its block so far."""

    @property
    def is_used_up(self) -> bool:
        """Whether there is no id left for another call."""
        return self._next_id > http2.STREAM_ID_MAX

    @contextmanager
    def stream(self) -> Iterator[Stream]:
        """A call of the next id, until the end of the context.  Raises: as ``open``."""
        stream = self.open()
        try:
            yield stream
        finally:
            self.close(stream)

    def open(self) -> Stream:
        """A call of the next id; ``close`` it.  Raises: Lost: there are no more; a new connection begins anew."""
        if self.is_used_up:
            self.abort()
            raise Lost("all streams of the connection are used up")
        stream = Stream(self, self._next_id, self._stream_send_window)
        self._next_id += 2
        self._streams[stream.id] = stream
        return stream

    def close(self, stream: Stream) -> None:
        """Be done with a call, whether it has ended or not."""
        del self._streams[stream.id]
        if not (stream.has_ended and stream.has_said_all):
            self.write(http2.reset(stream.id, http2.Code.CANCEL))

    def write(self, data: bytes) -> None:
        """Send ``data``; what is sent after the connection was lost is lost, too."""
        if data and not self.is_lost and self._transport is not None:
            self._transport.write(data)

    def sendable(self, stream: Stream) -> bytes:
        """The frames of what the windows let ``stream`` send now."""
        frames = []
        while stream.unsent:
            size = min(len(stream.unsent), self._send_window, stream.send_window, self._frame_bytes)
            if size <= 0:
                break
            part, stream.unsent = stream.unsent[:size], stream.unsent[size:]
            self._send_window -= size
            stream.send_window -= size
            flags = http2.END_STREAM if stream.has_said_all else 0
            frames.append(http2.frame(http2.DATA, flags, stream.id, part))
        return b"".join(frames)

    def abort(self) -> None:
        """Drop the connection now."""
        if self._transport is not None:
            self._transport.abort()
        self._lose(Lost("the connection was closed"))

    # --- called by the event loop -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(headers.greeting(STREAM_WINDOW, CONNECTION_WINDOW))

    def data_received(self, data: bytes) -> None:
        try:
            frames, self._received = http2.split(self._received + data)
            for frame in frames:
                self._take(frame)
        except Violation as error:
            if self._transport is not None:
                self._transport.abort()
            self._lose(Lost(f"not HTTP/2 as agreed: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._lose(Lost(f"the connection broke: {error or 'closed by the other end'}"))

    def _lose(self, error: Lost) -> None:
        self.is_lost = True
        for stream in self._streams.values():
            stream.end(error)

    # --- frames -----------------------------------------------------------------------------------------------

    def _take(self, frame: Frame) -> None:
        """Raises: Violation."""
        match frame.kind:
            case http2.DATA:
                self._take_data(frame)
            case http2.HEADERS | http2.CONTINUATION:
                self._take_headers(frame)
            case http2.WINDOW_UPDATE:
                self._widen(frame.stream_id, http2.number(frame.payload))
            case http2.RST_STREAM:
                if stream := self._streams.get(frame.stream_id):
                    stream.end(Lost(f"the call was reset, code {http2.number(frame.payload)}"))
            case http2.SETTINGS if not frame.flags & http2.ACK:
                self._settle(http2.settings_of(frame.payload))
            case http2.PING if not frame.flags & http2.ACK:
                self.write(http2.frame(http2.PING, http2.ACK, 0, frame.payload))
            case http2.GOAWAY:
                if self._transport is not None:
                    self._transport.close()
                self._lose(Lost("the server goes away"))

    def _take_data(self, frame: Frame) -> None:
        # The connection's window is given back at once, so that a slow reader holds up nobody but itself.
        self._spent_bytes += len(frame.payload)
        if self._spent_bytes >= CONNECTION_WINDOW // 2:
            self.write(http2.window_update(0, self._spent_bytes))
            self._spent_bytes = 0
        if stream := self._streams.get(frame.stream_id):
            stream.take_data(http2.content(frame), len(frame.payload))
            if frame.flags & http2.END_STREAM:
                stream.end(Lost("the answer ended without a status"))

    def _take_headers(self, frame: Frame) -> None:
        begun, block = self._begun or (frame, b"")
        block += http2.content(frame)
        if not frame.flags & http2.END_HEADERS:
            self._begun = begun, block
            return
        self._begun = None
        if stream := self._streams.get(begun.stream_id):
            stream.take_headers(headers.headers_of(block), is_last=bool(begun.flags & http2.END_STREAM))

    def _widen(self, stream_id: int, increment: int) -> None:
        if not stream_id:
            self._send_window += increment
        elif stream := self._streams.get(stream_id):
            stream.send_window += increment
        self._send_on()

    def _settle(self, settings: Mapping[int, int]) -> None:
        window = settings.get(http2.INITIAL_WINDOW_SIZE, self._stream_send_window)
        for stream in self._streams.values():
            stream.send_window += window - self._stream_send_window
        self._stream_send_window = window
        self._frame_bytes = settings.get(http2.MAX_FRAME_SIZE, self._frame_bytes)
        self.write(http2.frame(http2.SETTINGS, http2.ACK, 0))
        self._send_on()

    def _send_on(self) -> None:
        """Send what waited for windows, the oldest call first."""
        for stream in self._streams.values():
            if stream.unsent:
                self.write(self.sendable(stream))


def _check_status(trailers: Mapping[str, str]) -> None:
    status = trailers.get("grpc-status")
    if status is None:
        raise Lost("the answer ended without a status")
    if status != "0":
        raise CallFailed(unquote(trailers.get("grpc-message", "")))
