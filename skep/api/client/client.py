"""An async client of the Engine API, over a unix socket, TLS or ssh.  Error responses are raised as this package's
errors.

    async with Client.at("unix:///run/skep/skep.sock") as client:
        services = await client.get("/services", filters={"name": ["web"]})

Requests have the highest version that both ends support, which ``/_ping`` negotiates before the first request.
Requests of the node process to the manager process and to the machine's Docker Engine (``ApiClient.local``) have no
version.
"""

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlencode, urlsplit

import aiohttp
import msgspec

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.api.client.requests import TIMEOUT_S, Filters, Requests, parameters_of
from skep.api.client.ssh import SshDestination, forward_socket
from skep.api.errors import error_of, unanswered
from skep.api.http.responses import OutputStream
from skep.api.http.versions import NEWEST, ApiVersion
from skep.errors import InvalidArgument, SkepError, Unavailable
from skep.model.values.unknown import leniently

T = TypeVar("T")

_LOCAL_TIMEOUT_S = 5.0
"""Timeout of requests to a process on this machine, in seconds."""
_CONNECT_S = 10.0
"""Seconds to connect.  A lost SYN is sent again after one and three seconds."""
_LINE_BYTES_MAX = 4 * 1024 * 1024
"""Longest line of a JSON stream.  An event has the labels of its object, which may be large."""


class Response(msgspec.Struct, frozen=True):
    """A whole response with any status.  ``content_type`` is empty without that header."""

    status: int
    content_type: str
    body: bytes

    def error(self) -> SkepError:
        """Return the error for its status and message."""
        return error_of(self.status, _message(self.body, None))


class ApiClient(Requests):
    """A connection pool to one API endpoint.  Use it as an async context manager.

    Args:
        version: API version of requests, empty to send no version, or None for the highest that both ends support.
        name: Name of the endpoint in errors.  If it is empty, errors show the address.
        timeout_s: Timeout of requests without their own.
    """

    def __init__(
        self,
        url: str,
        *,
        socket: str | None = None,
        tunnel: SshDestination | None = None,
        tls: ssl.SSLContext | None = None,
        version: str | None = None,
        name: str = "",
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._url = url
        self._socket = socket
        self._tunnel = tunnel
        self._stack = AsyncExitStack()
        self._tls = tls
        self._version = version
        self._session: aiohttp.ClientSession | None = None
        self._negotiating = asyncio.Lock()

    @classmethod
    def at(cls, host: str, *, tls: ssl.SSLContext | None = None, version: str | None = None) -> "ApiClient":
        """Return a client of ``unix:///path``, ``tcp://host:port`` (with ``tls``) or
        ``ssh://[user@]machine[:port][/path]``.

        Args:
            version: API version to use instead of a negotiated one.

        Raises:
            InvalidArgument: ``host`` has another form.
        """
        try:
            parts = urlsplit(host)
            _ = parts.port
        except ValueError as error:
            raise InvalidArgument(f"unable to parse docker host `{host}`: {str(error).lower()}") from error
        if parts.scheme == "unix" and parts.path:
            return cls("http://engine", socket=parts.path, version=version)
        if parts.scheme in {"tcp", "http", "https"} and parts.hostname:
            scheme = "https" if tls is not None or parts.scheme == "https" else "http"
            return cls(f"{scheme}://{parts.netloc}", tls=tls, version=version)
        if parts.scheme == "ssh":
            return cls("http://engine", tunnel=SshDestination.of(host), version=version)
        raise InvalidArgument(f"unable to parse docker host `{host}`")

    @classmethod
    def local(cls, socket: Path, name: str) -> "ApiClient":
        """Return a client of another process on this machine.  Its requests have no version and a timeout of 5 s.

        ``name`` is the process's name in errors.
        """
        return cls("http://localhost", socket=str(socket), version="", name=name, timeout_s=_LOCAL_TIMEOUT_S)

    @property
    def has_socket(self) -> bool:
        """Whether the Unix socket exists.  It is missing while the process starts."""
        return self._socket is not None and Path(self._socket).exists()

    async def wait_listening(self, clock: Clock, rng: Callable[[], float], within_s: float) -> None:
        """Wait until a process listens at the Unix socket.  Raises: Unavailable: no process does so ``within_s``."""
        backoff = Backoff(0.02, 0.5, rng=rng)
        try:
            async with asyncio.timeout(within_s):
                while not await self._listens():
                    await backoff.sleep(clock)
        except TimeoutError as error:
            raise Unavailable(f"{self._endpoint} does not answer") from error

    async def _listens(self) -> bool:
        assert self._socket is not None, "only a unix socket can be waited for"
        try:
            _, writer = await asyncio.open_unix_connection(self._socket)
        except OSError:
            return False
        writer.close()
        return True

    async def __aenter__(self) -> Self:
        connector: aiohttp.BaseConnector
        if self._tunnel is not None:
            self._socket = await self._stack.enter_async_context(forward_socket(self._tunnel))
        if self._socket is not None:
            connector = aiohttp.UnixConnector(self._socket)
        else:
            connector = aiohttp.TCPConnector(ssl=self._tls or True)
        self._session = aiohttp.ClientSession(
            self._url,
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, connect=_CONNECT_S),
            read_bufsize=_LINE_BYTES_MAX,
            auto_decompress=False,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None
        await self._stack.aclose()

    async def read(self, type_: type[T], path: str, *, filters: Filters | None = None, **query: str) -> T:
        """Return the response to ``GET path`` as ``type_``.  Raises: the errors of ``get``."""
        return _as(type_, await self.request("GET", path, filters=filters, query=query))

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        filters: Filters | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._exchange(method, path, body, query, filters, headers) as response,
            ):
                content = await response.read()
        except TimeoutError:
            raise Unavailable(f"no response from {self._endpoint} within {timeout_s:g} s") from None
        return _decoded(content)

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | AsyncIterable[bytes] = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Send a request for ``path`` as it is, with or without a version, and return the response with any status.

        Raises:
            Unavailable: There was no response, or no data for a minute.
        """
        timeout = aiohttp.ClientTimeout(total=None, connect=_CONNECT_S, sock_read=TIMEOUT_S)
        try:
            async with self._open_session.request(
                method, path, data=body or None, headers=headers, timeout=timeout
            ) as response:
                content_type = response.headers.get("Content-Type", "")
                return Response(response.status, content_type, await response.read())
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._unanswered(error) from error

    @asynccontextmanager
    async def lines(self, path: str, query: Mapping[str, str]) -> AsyncGenerator[AsyncIterator[bytes], None]:
        """Yield the lines of an endless response as they arrive.  Raises: the errors of ``get``, before the
        first one.
        """
        async with self._exchange("GET", path, None, query, None, None) as response:
            yield aiter(response.content)

    async def upload(
        self,
        type_: type[T],
        path: str,
        content: AsyncIterable[bytes],
        *,
        headers: Mapping[str, str],
        timeout_s: float,
        **query: str,
    ) -> T:
        """Send ``POST path`` with a body that is read while it is sent, and return the response as ``type_``.

        Raises:
            SkepError: See ``get``.
        """
        response = await self.request(
            "POST", path, body=content, query=query, headers=headers, timeout_s=timeout_s
        )
        return _as(type_, response)

    @asynccontextmanager
    async def stream(
        self,
        path: str,
        *,
        method: str = "GET",
        body: Any = None,
        filters: Filters | None = None,
        headers: Mapping[str, str] | None = None,
        buffer_bytes: int = _LINE_BYTES_MAX,
        **query: str,
    ) -> AsyncGenerator["ResponseStream", None]:
        """Open a response that is read while it arrives.  Raises: the errors of ``get``, before the first byte.

        Up to twice ``buffer_bytes`` are buffered for a slow reader.  No line may be longer than ``buffer_bytes``.
        """
        async with self._exchange(
            method, path, body, query, filters, headers, buffer_bytes=buffer_bytes
        ) as response:
            yield ResponseStream(response)

    @asynccontextmanager
    async def _exchange(
        self,
        method: str,
        path: str,
        body: Any,
        query: Mapping[str, str] | None,
        filters: Filters | None,
        headers: Mapping[str, str] | None,
        *,
        buffer_bytes: int = _LINE_BYTES_MAX,
    ) -> AsyncGenerator["aiohttp.ClientResponse", None]:
        session = self._open_session
        version = await self._agreed_version()
        parameters = {**(query or {}), **parameters_of(filters)}
        target = (f"/v{version}{path}" if version else path) + (
            f"?{urlencode(parameters)}" if parameters else ""
        )
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes | AsyncIterable):
            body = msgspec.json.encode(body)
            sent.setdefault("Content-Type", "application/json")
        try:
            async with session.request(
                method, target, data=body, headers=sent, read_bufsize=buffer_bytes
            ) as response:
                if response.status >= 300:
                    raise error_of(response.status, _message(await response.read(), response.reason))
                yield response
        except (aiohttp.ClientError, OSError) as error:
            raise self._unanswered(error) from error

    async def _agreed_version(self) -> str:
        """Return the highest version that both ends support.  It is negotiated once."""
        async with self._negotiating:
            if self._version is None:
                self._version = await self._negotiate()
            return self._version

    async def _negotiate(self) -> str:
        try:
            async with asyncio.timeout(_CONNECT_S), self._open_session.get("/_ping") as response:
                theirs = ApiVersion(response.headers.get("Api-Version", str(NEWEST)))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._unanswered(error) from error
        return str(min(theirs, NEWEST))

    @property
    def _open_session(self) -> "aiohttp.ClientSession":
        assert self._session is not None, "used outside of its async with"
        return self._session

    def _unanswered(self, error: BaseException) -> Unavailable:
        if self._name and isinstance(getattr(error, "os_error", error), FileNotFoundError):
            return Unavailable(f"{self._name} does not answer: it is starting, or does not run")
        return unanswered(self._endpoint, error)

    @property
    def _endpoint(self) -> str:
        if self._name:
            return self._name
        if self._tunnel is not None:
            return str(self._tunnel)
        return f"unix://{self._socket}" if self._socket is not None else self._url


class ResponseStream:
    """A response that is read while it arrives."""

    def __init__(self, response: "aiohttp.ClientResponse") -> None:
        self._response = response

    async def objects(self) -> AsyncGenerator[Any, None]:
        """Yield the objects of a stream of JSON lines."""
        async for line in self._response.content:
            if line.strip():
                yield msgspec.json.decode(line)

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the bytes as they arrive."""
        async for piece in self._response.content.iter_any():
            yield piece

    async def frames(self) -> AsyncGenerator[tuple[OutputStream, bytes], None]:
        """Yield the messages of a multiplexed stream.  Raises: Unavailable: it ended in the middle of a message."""
        content = self._response.content
        while True:
            try:
                head = await content.readexactly(8)
            except asyncio.IncompleteReadError as error:
                if error.partial:
                    raise Unavailable("the stream was interrupted") from error
                return
            try:
                data = await content.readexactly(int.from_bytes(head[4:], "big"))
            except asyncio.IncompleteReadError as error:
                raise Unavailable("the stream was interrupted") from error
            yield OutputStream(head[0]), data


def _as(type_: type[T], response: Any) -> T:
    """Return a decoded response as ``type_``.  Unknown fields from a server of another version are ignored."""
    return leniently(msgspec.json.encode(response), type_)


def _decoded(content: bytes) -> Any:
    if not content.strip():
        return None
    try:
        return msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise SkepError(f"the response is not JSON: {error}") from error


def _message(content: bytes, reason: str | None) -> str:
    """Return the message in an error's body, JSON or not."""
    try:
        message = msgspec.json.decode(content, type=dict[str, Any])["message"]
    except (msgspec.DecodeError, KeyError):
        message = content.decode(errors="replace").strip()
    return str(message or reason or "unknown error")
