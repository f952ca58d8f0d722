"""One end of a connection: bytes in and out with back-pressure, half-closes passed on."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from skep.node.front.framing import HEAD_BYTES_MAX, Malformed

_BUFFER_BYTES_MAX = 256 * 1024
LINGER_BYTES_MAX = 256 * 1024 * 1024
LINGER_S = 5.0
"""What is still read, and for how long, of a request whose answer was sent: a connection that is closed while its
other end sends is reset, and the answer lost with it."""


class Gone(ConnectionError):
    """The other end has closed or broken the connection."""


class Side(asyncio.Protocol):
    """A connection read and written by one coroutine each.

    What arrives waits in a buffer of at most 256 KiB (and what one read of the socket brings); beyond that the
    sender has to wait.

    Args:
        on_open: called once the connection stands.
    """

    def __init__(self, on_open: "Callable[[Side], None] | None" = None) -> None:
        self._on_open = on_open
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._ended = False
        self._lost = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._readable = asyncio.Event()
        self._on_end: Callable[[], None] | None = None
        self._watcher: Callable[[], None] | None = None

    # --- called by the event loop -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._on_open is not None:
            self._on_open(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= _BUFFER_BYTES_MAX:
            self.transport.pause_reading()
        self._changed()

    def eof_received(self) -> bool:
        self._end()
        # the other direction stays open; TLS has no half-close in asyncio
        return self.transport.get_extra_info("sslcontext") is None

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, _error: Exception | None) -> None:
        self._lost = True
        self._end()
        self._writable.set()

    def _end(self) -> None:
        self._ended = True
        if self._on_end is not None:
            self._on_end()
        self._changed()

    def _changed(self) -> None:
        """Tell who waits: whoever watches, else who reads."""
        if self._watcher is not None:
            self._watcher()
        else:
            self._readable.set()

    # --- called by coroutines ---------------------------------------------------------------------------------

    @property
    def transport(self) -> asyncio.Transport:
        assert self._transport is not None, "used before the connection stood"
        return self._transport

    @property
    def has_ended(self) -> bool:
        """Nothing more will arrive (what has arrived may still wait)."""
        return self._ended

    @property
    def waiting_bytes(self) -> int:
        """How much has arrived and was not yet read."""
        return len(self._buffer)

    @property
    def has_room(self) -> bool:
        """Whether what is sent now leaves at once, as far as can be known."""
        return self._writable.is_set() and not self._lost and not self.transport.is_closing()

    def take(self, size: int | None = None) -> bytes:
        """Everything that has arrived, or the first ``size`` bytes of it."""
        data = bytes(self._buffer if size is None else self._buffer[:size])
        del self._buffer[:size]
        if not self._ended:
            self._readable.clear()
            self.transport.resume_reading()
        return data

    def put_back(self, data: bytes) -> None:
        """Make ``data`` the next thing to read."""
        if data:
            self._buffer[:0] = data
            self._readable.set()

    async def read(self) -> bytes:
        """What has arrived, at least one byte; ``b""`` once the other end has closed."""
        while not self._buffer and not self._ended:
            self._readable.clear()
            await self._readable.wait()
        return self.take()

    def head(self, searched: int = 0) -> bytes | None:
        """Everything up to and with the next empty line, if that has arrived.

        ``searched``: bytes known to hold none.  Raises: Malformed: it is longer than 64 KiB.
        """
        head = self.next_head(searched)
        if head is None:
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise Malformed("request header fields too large")
            return None
        del self._buffer[: len(head)]
        if not self._ended:
            self.transport.resume_reading()
        return head

    def next_head(self, searched: int = 0) -> bytes | None:
        """What ``head`` would give, left where it is."""
        end = self._buffer.find(b"\r\n\r\n", max(searched - 3, 0))
        return bytes(self._buffer[: end + 4]) if end >= 0 else None

    def watch(self, watcher: Callable[[], None] | None) -> None:
        """From now on ``watcher`` is called for whatever arrives, and at the end, in place of those who read."""
        self._watcher = watcher

    @contextmanager
    def watched(self, watcher: Callable[[], None]) -> Iterator[None]:
        """``watch`` within the context."""
        self.watch(watcher)
        try:
            yield
        finally:
            self.watch(None)

    async def read_head(self) -> bytes:
        """``head()`` once it has arrived; ``b""`` if the other end closed before a first byte.

        Raises: Malformed: it is longer than 64 KiB; Gone: the other end closed in the middle.
        """
        searched = 0
        while (head := self.head(searched)) is None:
            searched = len(self._buffer)
            if self._ended and self._buffer:
                raise Gone("closed in the middle of a head")
            if self._ended:
                return b""
            self._readable.clear()
            await self._readable.wait()
        return head

    async def wait_begun(self) -> None:
        """Return when something waits to be read, or nothing ever will."""
        while not self._buffer and not self._ended:
            self._readable.clear()
            await self._readable.wait()

    @contextmanager
    def when_ended(self, react: Callable[[], None]) -> Iterator[None]:
        """Within the context, ``react`` is called once nothing more will arrive; at once if that is so already."""
        self._on_end = react
        try:
            if self._ended:
                react()
            yield
        finally:
            self._on_end = None

    async def send(self, data: bytes) -> None:
        """Send ``data``; return when there is room for more.  Raises: Gone."""
        if self._lost or self.transport.is_closing():
            raise Gone("closed by the other end")
        self.transport.write(data)
        await self._writable.wait()
        if self._lost:
            raise Gone("closed by the other end")

    def end(self) -> None:
        """Close our direction; the other end may go on sending."""
        if not self._lost and not self.transport.is_closing() and self.transport.can_write_eof():
            self.transport.write_eof()

    async def refuse(self, answer: bytes) -> None:
        """Send a last word, if there is still somebody to hear it, and close."""
        if not self._lost and not self.transport.is_closing():
            self.transport.write(answer)
            await self.linger()

    async def linger(self) -> None:
        """Close, but not while the other end still sends: its data is dropped until it has closed, or sent too much.

        TLS closes with a handshake of its own, and has no half-close that would tell the other end to stop.
        """
        if self._lost or not self.transport.can_write_eof():
            self.close()
            return
        self.end()
        dropped = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while dropped < LINGER_BYTES_MAX and (data := await self.read()):
                    dropped += len(data)
        self.close()

    def close(self) -> None:
        """Close both directions once what was sent has left."""
        self.transport.close()

    def abort(self) -> None:
        """Drop the connection with whatever is under way."""
        self.transport.abort()
