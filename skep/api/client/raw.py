"""A small client of the Engine API for connections that become streams: exec, attach, archives, ports.

It uses one connection per request, and does not import aiohttp, whose import alone takes longer than an exec.
"""

import asyncio
import ssl
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeAlias
from urllib.parse import urlencode, urlsplit

import msgspec

from skep.api.client.ssh import SshDestination, forward_socket
from skep.api.errors import error_of, unanswered
from skep.errors import InvalidArgument, Unavailable

CONNECT_S = 10.0
"""Seconds to connect.  A lost SYN is sent again after one and three seconds."""
HEAD_S = 30.0
"""Seconds for a response's head.  A manager waits 10 s for a node."""
WRITE_S = 60.0
"""Seconds for the host to read written data."""
READ_BYTES = 64 * 1024
"""Bytes per read of a stream: the usual size of a socket's buffer."""

Body: TypeAlias = bytes | AsyncIterable[bytes]
Opener: TypeAlias = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
NO_QUERY: Mapping[str, str] = MappingProxyType({})


def json(value: Any) -> bytes:
    """Return ``value`` as a body."""
    return msgspec.json.encode(value)


class Exchange:
    """A response and its connection.

    ``headers`` have lower-case names.  ``reader`` and ``writer`` start after the head.
    """

    def __init__(
        self,
        status: int,
        headers: Mapping[str, str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.status = status
        self.headers = headers
        self.reader = reader
        self.writer = writer

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives.  Raises: Unavailable: it is incomplete."""
        try:
            if self.headers.get("transfer-encoding", "").lower() == "chunked":
                async for piece in self._chunks():
                    yield piece
                return
            left = int(self.headers["content-length"]) if "content-length" in self.headers else None
            while left is None or left:
                piece = await self.reader.read(READ_BYTES if left is None else min(left, READ_BYTES))
                if not piece and left:
                    raise Unavailable("the response was interrupted")
                if not piece:
                    return
                left = left - len(piece) if left is not None else None
                yield piece
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise Unavailable("the response was interrupted") from error

    async def _chunks(self) -> AsyncIterator[bytes]:
        while size := int((await self.reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            while size:
                piece = await self.reader.read(min(size, READ_BYTES))
                if not piece:
                    raise Unavailable("the response was interrupted")
                size -= len(piece)
                yield piece
            await self.reader.readexactly(2)

    async def raw_pieces(self) -> AsyncIterator[bytes]:
        """Yield the data of a connection that has become a stream, until its end."""
        with suppress(ConnectionError):
            while piece := await self.reader.read(READ_BYTES):
                yield piece

    async def content(self) -> bytes:
        """Return the whole body.  Raises: Unavailable."""
        return b"".join([piece async for piece in self.pieces()])


class RawClient:
    """Requests to one host, each on a separate connection.  Use it as an async context manager.

    Args:
        host: ``unix:///path``, ``tcp://host:port`` (with ``tls``) or ``ssh://[user@]machine[:port][/path]``.
    """

    def __init__(self, host: str, tls: ssl.SSLContext | None = None) -> None:
        self.host = host
        self._tls = tls
        self._stack = AsyncExitStack()
        self._open: Opener | None = None

    @classmethod
    def over(cls, name: str, open: Opener) -> Self:
        """Return a client on the connections that ``open`` creates, for use without a context.  ``name`` is used in
        errors.
        """
        client = cls(name)
        client._open = open
        return client

    async def __aenter__(self) -> Self:
        """Connect.  Raises: InvalidArgument: the host is invalid; Unavailable: ssh does not reach it."""
        self._open = await self._opener()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def get(self, path: str, query: Mapping[str, str] = NO_QUERY) -> Any:
        """Return the decoded response.  Raises: the error of its status; Unavailable."""
        return await self.request("GET", path, query=query)

    async def post(self, path: str, body: Any = None, query: Mapping[str, str] = NO_QUERY) -> Any:
        """Send ``body`` as JSON and return the decoded response.  Raises: the errors of ``get``."""
        return await self.request("POST", path, body, query)

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        query: Mapping[str, str] = NO_QUERY,
        headers: Mapping[str, str] = NO_QUERY,
    ) -> Any:
        """Return the decoded response, or None for an empty one.  Raises: the errors of ``get``."""
        content = json(body) if body is not None else b""
        async with self.exchange(method, path, content, query=query, headers=headers) as response:
            answer = await response.content()
        return msgspec.json.decode(answer) if answer.strip() else None

    @asynccontextmanager
    async def exchange(
        self,
        method: str,
        path: str,
        body: Body = b"",
        *,
        query: Mapping[str, str] = NO_QUERY,
        upgrade: bool = False,
        media_type: str = "application/json",
        headers: Mapping[str, str] = NO_QUERY,
    ) -> AsyncIterator[Exchange]:
        """Send a request and yield its response, whose body is read in the block.  Then the connection is closed.

        Args:
            upgrade: Whether the connection becomes a stream in both directions.

        Raises:
            SkepError: The error of the response's status.
            Unavailable: There was no response.
        """
        target = f"{path}?{urlencode(query)}" if query else path
        lines = [f"{method} {target} HTTP/1.1", "Host: engine"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += ["Connection: Upgrade", "Upgrade: tcp"] if upgrade else ["Connection: close"]
        if not isinstance(body, bytes):
            lines += [f"Content-Type: {media_type}", "Transfer-Encoding: chunked"]
        elif body or method in ("POST", "PUT"):
            lines += [f"Content-Type: {media_type}", f"Content-Length: {len(body)}"]
        reader, writer = await self._connect()
        try:
            with suppress(ConnectionError):  # a server that refuses the rest of a body has already responded
                await _write(writer, "\r\n".join((*lines, "", "")).encode())
                await _send_body(writer, body)
            yield await _response(method, reader, writer)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise unanswered(self.host, error) from error
        except ValueError as error:
            raise Unavailable(f"{self.host} does not respond in HTTP") from error
        finally:
            writer.close()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Open a connection for the block, on which nothing was sent.  Raises: Unavailable."""
        reader, writer = await self._connect()
        try:
            yield reader, writer
        finally:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection.  Raises: Unavailable."""
        assert self._open is not None, "used outside of its async with"
        try:
            async with asyncio.timeout(CONNECT_S):
                return await self._open()
        except OSError as error:  # includes timeouts
            raise unanswered(self.host, error) from error

    async def _opener(self) -> Opener:
        """Return a function that opens connections.  Raises: InvalidArgument; Unavailable."""
        try:
            parts = urlsplit(self.host)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidArgument(f"unable to parse docker host `{self.host}`") from error
        if parts.scheme == "ssh":
            path = await self._stack.enter_async_context(forward_socket(SshDestination.of(self.host)))
            return partial(asyncio.open_unix_connection, path)
        if parts.scheme == "unix" and parts.path:
            return partial(asyncio.open_unix_connection, parts.path)
        if parts.scheme in {"tcp", "http", "https"} and host and port:
            return partial(asyncio.open_connection, host, port, ssl=self._tls)
        raise InvalidArgument(f"unable to parse docker host `{self.host}`")


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    async with asyncio.timeout(WRITE_S):
        await writer.drain()


async def _send_body(writer: asyncio.StreamWriter, body: Body) -> None:
    if isinstance(body, bytes):
        await _write(writer, body)
        return
    async for piece in body:
        if piece:
            await _write(writer, b"%x\r\n%b\r\n" % (len(piece), piece))
    await _write(writer, b"0\r\n\r\n")


async def _response(method: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange:
    """Return the response.

    Raises:
        SkepError: The error of its status.
        OSError, IncompleteReadError, ValueError: There was no response.
    """
    async with asyncio.timeout(HEAD_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
    status = int(first.split(" ", 2)[1])
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    response = Exchange(status, headers, reader, writer)
    if status >= 300:
        content = b"" if method == "HEAD" else await response.content()
        raise error_of(status, _message(content) or first.split(" ", 2)[-1])
    return response


def _message(content: bytes) -> str:
    try:
        return str(msgspec.json.decode(content, type=dict[str, Any])["message"])
    except (msgspec.DecodeError, KeyError):
        return content.decode(errors="replace").strip()
