"""HTTP connection hijacking: ``attach`` and ``exec start`` send raw bytes in both directions.

The client sends ``Upgrade: tcp`` and gets the status 101.  (Old clients do not send it, and get a 200 without an end.)
From then on each direction closes separately: the end of the client's input is a half-close, after which output
continues.  aiohttp cannot half-close, so its transport is given another protocol.

docker-py reads the head through a buffer and the output from the socket below it, so it loses output that it receives
together with the head.  On a Unix socket the kernel reports the bytes that the client has not read yet (SIOCOUTQ), so
the first output waits until the client has read the head.  TCP has no such report.
Source: moby 20.10, api/server/httputils/httputils_write_json.go, api/server/router/container/exec.go.
"""

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from skep.aio.backoff import Backoff
from skep.aio.connections.tls import may_half_close
from skep.api.http.server import ApiVersion, OutputStream, api_version, frame

RAW = "application/vnd.docker.raw-stream"
MULTIPLEXED = "application/vnd.docker.multiplexed-stream"

_NAMES_ITS_FORM = ApiVersion("1.42")
_BUFFER_BYTES = 64 << 10
"""Limit in bytes for input of a client that is buffered."""
DRAIN_S = 60.0
"""Seconds after which a client that reads nothing counts as disconnected."""
_HEAD_UNREAD_S = 5.0
"""Seconds to wait until the client has read the head.

After that, the output is sent anyway, because not every client loses it.
"""


class Duplex:
    """The raw connection.  Output is marked with its stream, except with a terminal."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, tty: bool) -> None:
        self._reader = reader
        self._writer = writer
        self._tty = tty
        self._is_head_read = False

    async def read(self) -> bytes:
        """Return the client's next input, or b"" after its end.  Raises: ConnectionError."""
        return await self._reader.read(_BUFFER_BYTES)

    async def send(self, stream: OutputStream, data: bytes) -> None:
        """Send output.  Raises: ConnectionError: the client has disconnected, or reads nothing."""
        if not self._is_head_read:
            await self._wait_head_read()
        self._writer.write(data if self._tty else frame(stream, data))
        try:
            async with asyncio.timeout(DRAIN_S):
                await self._writer.drain()
        except TimeoutError as error:
            raise ConnectionResetError("the client does not read the output") from error

    async def _wait_head_read(self) -> None:
        connection = self._writer.get_extra_info("socket")
        if connection.family == socket.AF_UNIX:
            backoff = Backoff(0.001, 0.05)
            with suppress(TimeoutError):
                async with asyncio.timeout(_HEAD_UNREAD_S):
                    while not self._writer.is_closing() and _unread_bytes(connection.fileno()):  # noqa: ASYNC110 - the kernel reports no change
                        await asyncio.sleep(backoff.next_delay_s())
        self._is_head_read = True


def _unread_bytes(descriptor: int) -> int:
    """Return how many bytes the other end of a Unix connection has not read, as the kernel counts memory."""
    (count,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)))
    return int(count)


@asynccontextmanager
async def hijack(request: web.Request, *, tty: bool) -> AsyncIterator[Duplex]:
    """Respond to ``request`` with a raw connection, which is closed with the block.

    The caller must have read the request's body.  Afterwards, the handler returns ``Hijacked()``.
    """
    handler = request.protocol
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client has disconnected")
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_BUFFER_BYTES, loop=loop)
    reader.feed_data(_sent_ahead(handler))
    protocol = _Raw(reader, loop, handler)
    transport.set_protocol(protocol)
    protocol.connection_made(transport)
    transport.resume_reading()
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)
    writer.write(_head(request, tty=tty))
    try:
        yield Duplex(reader, writer, tty=tty)
    finally:
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(1):
                await writer.drain()
        writer.close()


async def upgrade(
    request: web.Request, protocol: asyncio.Protocol, begin: Callable[[asyncio.Transport], None]
) -> None:
    """Respond to ``request`` by switching to its requested protocol.  Return when the connection has ended.

    The handler then returns ``Hijacked()``.

    Args:
        begin: Called with the transport once ``protocol`` receives data.
    """
    handler, transport = request.protocol, request.transport
    if transport is None:
        raise ConnectionResetError("the client has disconnected")
    ahead = _sent_ahead(handler)
    reporting = _Reporting(protocol, handler)
    transport.set_protocol(reporting)
    lines = (
        "HTTP/1.1 101 Switching Protocols",
        "Connection: Upgrade",
        f"Upgrade: {request.headers['Upgrade']}",
    )
    transport.write("\r\n".join((*lines, "", "")).encode())
    begin(transport)
    if ahead:
        protocol.data_received(ahead)
    transport.resume_reading()
    try:
        await reporting.wait_closed()
    finally:
        transport.abort()


class _Reporting(asyncio.Protocol):
    """Passes everything on to ``protocol``.  Passes the end also to aiohttp, because aiohttp counts connections."""

    def __init__(self, protocol: asyncio.Protocol, handler: RequestHandler) -> None:
        self._protocol = protocol
        self._handler = handler
        self._closed = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self._protocol.data_received(data)

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received()

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.connection_lost(exc)
        self._handler.connection_lost(exc)
        self._closed.set()

    async def wait_closed(self) -> None:
        await self._closed.wait()


class _Raw(asyncio.StreamReaderProtocol):
    """A stream's protocol that reports the end of the connection to aiohttp, which counts connections."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        loop: asyncio.AbstractEventLoop,
        handler: RequestHandler,
    ) -> None:
        super().__init__(reader, loop=loop)
        self._handler = handler
        self._stays_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._stays_open = may_half_close(transport)

    def eof_received(self) -> bool:
        super().eof_received()
        return self._stays_open  # a client without input half-closes at once, and still reads the output

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._handler.connection_lost(exc)


class _Tap:
    """Collects the bytes that the client sent directly after its request."""

    def __init__(self) -> None:
        self.data = b""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self.data += data
        return False, b""

    def feed_eof(self) -> None:
        pass


def _sent_ahead(handler: RequestHandler) -> bytes:
    tap = _Tap()
    handler.set_parser(tap)  # type: ignore[arg-type]  # documented, and not only for WebSockets
    return tap.data


def _head(request: web.Request, *, tty: bool) -> bytes:
    lines = ["HTTP/1.1 200 OK"]
    if "upgrade" in request.headers:
        lines = ["HTTP/1.1 101 UPGRADED", "Connection: Upgrade", "Upgrade: tcp"]
    names_form = api_version(request) >= _NAMES_ITS_FORM and not tty
    lines.append(f"Content-Type: {MULTIPLEXED if names_form else RAW}")
    return "\r\n".join((*lines, "", "")).encode()
