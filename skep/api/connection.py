"""One end of a connection: bytes in and out with back-pressure; half-closes are passed on."""

import asyncio
import select
import socket
from collections.abc import Callable
from contextlib import suppress

from skep.aio.tls import may_half_close
from skep.api.framing import HEAD_BYTES_MAX, Malformed

_BUFFER_BYTES_MAX = 256 * 1024
CHECK_S = 5.0
"""Between two looks whether a client that has closed its direction is still there."""
LINGER_BYTES_MAX = 256 * 1024 * 1024
LINGER_S = 5.0
"""What is still read, and for how long, of a request whose response was sent: a connection that is closed while its
other end sends is reset, and the response lost with it."""


class Gone(ConnectionError):
    """The other end has closed or broken the connection."""


class Connection(asyncio.Protocol):
    """A connection read and written by one coroutine each.

    What arrives waits in a buffer of at most 256 KiB (and what one read of the socket brings); beyond that the
    sender has to wait.

    Args:
        on_open: called once the connection stands.
    """

    def __init__(self, on_open: "Callable[[Connection], None] | None" = None) -> None:
        self._on_open = on_open
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._ended = False
        self._lost = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._readable = asyncio.Event()
        self._closed = asyncio.Event()

    @classmethod
    async def over(cls, connected: socket.socket, read: bytes = b"") -> "Connection":
        """A connection over ``connected``, of which ``read`` was read already.  Raises: OSError."""
        connected.setblocking(False)
        _, connection = await asyncio.get_running_loop().connect_accepted_socket(cls, connected)
        connection._buffer[:0] = read
        return connection

    # --- called by the event loop -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._on_open is not None:
            self._on_open(self)

    def data_received(self, data: bytes) -> None:
        """Keep what came; reading pauses at ``_BUFFER_BYTES_MAX``."""
        self._buffer += data
        if len(self._buffer) >= _BUFFER_BYTES_MAX:
            self.transport.pause_reading()
        self._readable.set()

    def eof_received(self) -> bool:
        """The client sends no more."""
        self._end()
        return may_half_close(self.transport)  # the other direction stays open

    def pause_writing(self) -> None:
        """The transport's buffer is full."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The transport's buffer has room again."""
        self._writable.set()

    def connection_lost(self, _error: Exception | None) -> None:
        """Wake whatever waits on the connection."""
        self._lost = True
        self._end()
        self._writable.set()
        self._closed.set()

    def _end(self) -> None:
        self._ended = True
        self._readable.set()

    def give_to(self, protocol: asyncio.Protocol) -> None:
        """Let ``protocol`` serve the connection from now on, from the first byte that nobody has taken yet."""
        waiting, ended = self.take(), self.has_ended
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        if waiting:
            protocol.data_received(waiting)
        if ended:
            protocol.eof_received()

    # --- called by coroutines ---------------------------------------------------------------------------------

    @property
    def transport(self) -> asyncio.Transport:
        """Of the connection; there is one as soon as a client has connected."""
        assert self._transport is not None, "used before the connection stood"
        return self._transport

    @property
    def has_ended(self) -> bool:
        """Nothing more will arrive (what has arrived may still wait)."""
        return self._ended

    @property
    def is_lost(self) -> bool:
        """Both directions are closed."""
        return self._lost or self.transport.is_closing()

    def give_back(self, data: bytes) -> None:
        """Put ``data``, which was taken, in front of what waits to be read."""
        self._buffer[:0] = data
        self._readable.set()

    def take(self) -> bytes:
        """Everything that has arrived."""
        data = bytes(self._buffer)
        self._buffer.clear()
        if not self._ended:
            self._readable.clear()
            self.transport.resume_reading()
        return data

    async def read(self) -> bytes:
        """What has arrived, at least one byte; ``b""`` once the other end has closed."""
        await self.wait_begun()
        return self.take()

    async def wait_begun(self) -> None:
        """Return when something waits to be read, or nothing ever will."""
        while not self._buffer and not self._ended:
            self._readable.clear()
            await self._readable.wait()

    async def wait_lost(self) -> None:
        """Return when both directions are closed: by the other end, or because it does not answer any more."""
        while not self._is_hung_up():
            # Once the other end has closed its direction, the event loop does not listen to it any more.
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_S):
                    await self._closed.wait()

    def _is_hung_up(self) -> bool:
        if self.is_lost:
            return True
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket"), 0)  # errors and hang-ups are always reported
        return bool(poll.poll(0))

    def head(self, searched: int = 0) -> bytes | None:
        """Everything up to and with the next empty line, if that has arrived.

        ``searched``: bytes known to hold none.  Raises: Malformed: it is longer than 64 KiB.
        """
        end = self._buffer.find(b"\r\n\r\n", max(searched - 3, 0))
        if end < 0:
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise Malformed("request header fields too large")
            return None
        head = bytes(self._buffer[: end + 4])
        del self._buffer[: end + 4]
        if not self._ended:
            self.transport.resume_reading()
        return head

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

    async def send(self, data: bytes) -> None:
        """Send ``data``; return when there is room for more.  Raises: Gone."""
        if self.is_lost:
            raise Gone("closed by the other end")
        self.transport.write(data)
        await self._writable.wait()
        if self._lost:
            raise Gone("closed by the other end")

    def duplicate(self) -> socket.socket:
        """Another descriptor of this connection, which is not TLS.  Raises: OSError."""
        connected: socket.socket = self.transport.get_extra_info("socket").dup()
        return connected

    def end(self) -> None:
        """Close our direction; the other end may go on sending."""
        if not self.is_lost and self.transport.can_write_eof():
            self.transport.write_eof()

    async def refuse(self, response: bytes) -> None:
        """Send a last response, if the other end may still read it, and close."""
        if not self.is_lost:
            self.transport.write(response)
            await self.linger()

    async def linger(self) -> None:
        """Close, but not while the other end still sends: its data is dropped until it has closed, or sent too much.

        TLS closes with a handshake of its own, and has no half-close that would make the other end stop.
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
