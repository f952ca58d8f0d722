"""One end of a connection: bytes in both directions with back-pressure, and half-closes."""

import asyncio
import select
import socket
from collections.abc import Callable
from contextlib import suppress

from skep.aio.connections.tls import may_half_close
from skep.api.http.framing import HEAD_BYTES_MAX, Malformed

_BUFFER_BYTES_MAX = 256 * 1024
"""Largest number of received bytes that are buffered for a slow reader."""
CHECK_S = 5.0
"""Seconds between two checks whether a client that has closed its direction is still connected."""
LINGER_BYTES_MAX = 256 * 1024 * 1024
"""Largest number of bytes that are read from the body of a refused request, so that the client gets the response."""
LINGER_S = 5.0
"""Longest time in seconds for reading the rest of a request whose response was sent.

A connection that is closed while the other end still sends is reset, and the response is lost.
"""


class Gone(ConnectionError):
    """The other end has closed the connection, or the connection is broken."""


class Connection(asyncio.Protocol):
    """A connection with one reading and one writing coroutine.

    Received data waits in a buffer of at most 256 KiB plus one read of the socket.  When it is full, the sender has to
    wait.

    Args:
        on_open: Called once the connection is established.
        check_s: Seconds between two checks whether a client that has closed its direction is still connected.
    """

    def __init__(
        self, on_open: "Callable[[Connection], None] | None" = None, check_s: float = CHECK_S
    ) -> None:
        self._on_open = on_open
        self._check_s = check_s
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._ended = False
        self._lost = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._readable = asyncio.Event()
        self._closed = asyncio.Event()

    @classmethod
    async def over(
        cls, connected: socket.socket, read: bytes = b"", check_s: float = CHECK_S
    ) -> "Connection":
        """Return a connection over ``connected``, from which ``read`` was already read.  Raises: OSError."""
        connected.setblocking(False)
        _, connection = await asyncio.get_running_loop().connect_accepted_socket(
            lambda: cls(check_s=check_s), connected
        )
        connection._buffer[:0] = read
        return connection

    # --- called by the event loop -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Record that a client has connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._on_open is not None:
            self._on_open(self)

    def data_received(self, data: bytes) -> None:
        """Buffer received data.  Reading pauses at ``_BUFFER_BYTES_MAX``."""
        self._buffer += data
        if len(self._buffer) >= _BUFFER_BYTES_MAX:
            self.transport.pause_reading()
        self._readable.set()

    def eof_received(self) -> bool:
        """Record that the client sends no more."""
        self._end()
        return may_half_close(self.transport)  # the other direction stays open

    def pause_writing(self) -> None:
        """Pause writers while the transport's buffer is full."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Resume writers when the transport's buffer has space again."""
        self._writable.set()

    def connection_lost(self, _error: Exception | None) -> None:
        """Wake all waiting coroutines."""
        self._lost = True
        self._end()
        self._writable.set()
        self._closed.set()

    def _end(self) -> None:
        self._ended = True
        self._readable.set()

    def give_to(self, protocol: asyncio.Protocol) -> None:
        """Let ``protocol`` serve the connection from now on, from the first byte that was not consumed yet."""
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
        """The transport of the connection, which exists once a client has connected."""
        assert self._transport is not None, "used before the connection stood"
        return self._transport

    @property
    def has_ended(self) -> bool:
        """Whether no more data will arrive.  Received data may still wait."""
        return self._ended

    @property
    def is_lost(self) -> bool:
        """Whether both directions are closed."""
        return self._lost or self.transport.is_closing()

    def give_back(self, data: bytes) -> None:
        """Put consumed ``data`` back in front of the waiting data."""
        self._buffer[:0] = data
        self._readable.set()

    def take(self) -> bytes:
        """Return all received data."""
        data = bytes(self._buffer)
        self._buffer.clear()
        if not self._ended:
            self._readable.clear()
            self.transport.resume_reading()
        return data

    async def read(self) -> bytes:
        """Return received data, at least one byte, or ``b""`` once the other end has closed."""
        await self.wait_begun()
        return self.take()

    async def wait_begun(self) -> None:
        """Wait until there is data to read, or the other end has closed."""
        while not self._buffer and not self._ended:
            self._readable.clear()
            await self._readable.wait()

    async def wait_lost(self) -> None:
        """Wait until both directions are closed by the other end, or because it no longer answers."""
        while not self._is_hung_up():
            # Once the other end has closed its direction, the event loop no longer watches the connection.
            with suppress(TimeoutError):
                async with asyncio.timeout(self._check_s):
                    await self._closed.wait()

    def _is_hung_up(self) -> bool:
        if self.is_lost:
            return True
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket"), 0)  # errors and hang-ups are always reported
        return bool(poll.poll(0))

    def head(self, searched: int = 0) -> bytes | None:
        """Return the data up to and including the next empty line, or None if that has not arrived.

        ``searched``: number of bytes that are known not to contain the empty line.  Raises: Malformed: the head is
        longer than 64 KiB.
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
        """Wait for a head and return it, or ``b""`` if the other end closed before the first byte.

        Raises:
            Malformed: The head is longer than 64 KiB.
            Gone: The other end closed in the middle of it.
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
        """Send ``data``.  Returns when there is space for more.  Raises: Gone."""
        if self.is_lost:
            raise Gone("closed by the other end")
        self.transport.write(data)
        await self._writable.wait()
        if self._lost:
            raise Gone("closed by the other end")

    def duplicate(self) -> socket.socket:
        """Return another descriptor of this connection, which does not use TLS.  Raises: OSError."""
        connected: socket.socket = self.transport.get_extra_info("socket").dup()
        return connected

    def end(self) -> None:
        """Close our direction once all data is sent.  The other end may continue to send.

        Over TLS this closes both directions, because OpenSSL reads nothing after its own close_notify.  Keeping the
        connection open is no alternative, because a client that waits for the end of the output would wait forever.
        """
        if self.is_lost:
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.close()

    async def refuse(self, response: bytes) -> None:
        """Send a last response, if the other end may still read it, and close."""
        if not self.is_lost:
            self.transport.write(response)
            await self.linger()

    async def linger(self) -> None:
        """Close once the other end has stopped sending.  Its data is discarded until it has closed its direction or
        exceeded the limits.

        TLS connections are closed at once, because they have no half-close that would make the other end stop.
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
        """Close both directions once all data is sent."""
        self.transport.close()

    def abort(self) -> None:
        """Drop the connection with all data in transit."""
        self.transport.abort()
