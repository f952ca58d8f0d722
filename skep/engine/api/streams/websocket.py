"""``attach`` by WebSocket, for clients that cannot hijack a connection: browsers, web terminals, docker-py.

Output is not marked with its stream.  It is sent in binary messages, and before API 1.28 in text messages even if it is
not text.

Source: moby, api/server/router/container/container_routes.go (wsContainersAttach).
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

from aiohttp import web

from skep.api.http.server import ApiVersion, OutputStream, api_version
from skep.engine.api.streams.hijack import DRAIN_S
from skep.errors import InvalidArgument, PermissionDenied

_BINARY = ApiVersion("1.28")
_MESSAGE_BYTES_MAX = 1 << 20
"""Limit in bytes for one message of a client, because it is in memory until its last byte has arrived.

A keystroke needs one byte.
"""
_CLOSE_S = 1.0
"""Seconds to wait for the closing handshake.  A client that does not answer is disconnected."""


class WebSocketDuplex:
    """Input and output of an open WebSocket (``terminal.Client``)."""

    def __init__(self, connection: web.WebSocketResponse, kind: web.WSMsgType) -> None:
        self._connection = connection
        self._kind = kind

    async def read(self) -> bytes:
        """Return the client's next message with content, or b"" once it has closed the connection."""
        while True:
            message = await self._connection.receive()
            if message.type not in (web.WSMsgType.TEXT, web.WSMsgType.BINARY):
                return b""
            if message.data:
                return bytes(message.data)

    async def send(self, _stream: OutputStream, data: bytes) -> None:
        """Send output.  Raises: ConnectionError: the client has disconnected, or reads nothing."""
        try:
            async with asyncio.timeout(DRAIN_S):
                await self._connection.send_frame(data, self._kind)
        except TimeoutError as error:
            raise ConnectionResetError("the client does not read the output") from error


_CLIENT_OF_A_SOCKET = "localhost"
"""Host name of the origin that clients of a Unix socket send.

In a browser, only pages from port 80 or 443 of the user's own machine have this origin.
"""


def check_handshake(request: web.Request) -> None:
    """Check that ``request`` opens a WebSocket.

    Raises:
        InvalidArgument: It does not.
        PermissionDenied: A page of another host sends it.  A browser would send the user's certificate with it, and for
            a WebSocket, unlike for other requests, browsers do not ask the server whether pages of other hosts are
            allowed.
    """
    if not web.WebSocketResponse().can_prepare(request).ok:
        raise InvalidArgument(
            "not websocket protocol: the request is not a WebSocket handshake of version 13"
        )
    origin = request.headers.get("Origin")
    if origin is None:
        return
    # For every kind of socket: browsers' relayed and forwarded connections end in sockets of the machine.  Clients of
    # a Unix socket have no host to name: Go's websocket package requires an origin, and they send this one.
    place = urlsplit(origin).netloc.lower()
    if place not in (request.headers.get("Host", "").lower(), _CLIENT_OF_A_SOCKET):
        raise PermissionDenied(f"a page of {origin} may not open a WebSocket to this API")


@asynccontextmanager
async def open_websocket(
    request: web.Request,
) -> AsyncIterator[tuple[WebSocketDuplex, web.WebSocketResponse]]:
    """Complete the handshake of ``request``.  The WebSocket is closed with the block.

    Yields the connection, and the response that the handler returns.
    """
    connection = web.WebSocketResponse(
        timeout=_CLOSE_S, compress=False, max_msg_size=_MESSAGE_BYTES_MAX, decode_text=False
    )
    await connection.prepare(request)
    is_binary = api_version(request) >= _BINARY
    try:
        yield (
            WebSocketDuplex(connection, web.WSMsgType.BINARY if is_binary else web.WSMsgType.TEXT),
            connection,
        )
    finally:
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await connection.close()
        if request.transport is not None:
            request.transport.abort()  # otherwise output that the client does not read stays in memory
