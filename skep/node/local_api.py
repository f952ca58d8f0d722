"""Questions of the node process to those beside it on this machine: the manager process, the Docker Engine."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
import msgspec

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.api.errors import error_of
from skep.errors import SkepError, Unavailable, reason_of

_TIMEOUT_S = 5.0
_POST_TIMEOUT_S = 60.0


class Answer(msgspec.Struct, frozen=True):
    """A whole answer, whatever its status."""

    status: int
    content_type: str
    body: bytes

    def error(self) -> SkepError:
        """What it says went wrong."""
        return _error(self.status, self.body)


class LocalApi:
    """The Engine API on a unix socket.  Used inside ``open()``.

    Args:
        who: what an error calls it.
    """

    def __init__(self, path: Path, who: str) -> None:
        self._path = path
        self._who = who
        self._session: aiohttp.ClientSession | None = None

    @property
    def has_socket(self) -> bool:
        """Whether there is something to ask: who is only starting has no socket yet."""
        return self._path.exists()

    async def wait_listening(self, clock: Clock, chance: Callable[[], float], within_s: float) -> None:
        """Return once somebody listens: who restarts is back in a moment.  Raises: Unavailable."""
        backoff = Backoff(0.02, 0.5, chance=chance)
        try:
            async with asyncio.timeout(within_s):
                while not await self._listens():
                    await backoff.sleep(clock)
        except TimeoutError as error:
            raise Unavailable(f"{self._who} does not answer") from error

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_unix_connection(str(self._path))
        except OSError:
            return False
        writer.close()
        return True

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        connector = aiohttp.UnixConnector(str(self._path), limit=16)
        async with aiohttp.ClientSession("http://localhost", connector=connector) as session:
            self._session = session
            try:
                yield
            finally:
                self._session = None

    async def get(
        self, path: str, query: Mapping[str, str] | None = None, timeout_s: float = _TIMEOUT_S
    ) -> Any:
        """The decoded answer to ``GET path``.  Raises: Unavailable: it is away; else the error it answers."""
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._required().get(_with(path, query)) as response,
            ):
                body = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(f"{self._who} does not answer: {reason_of(error)}") from error
        if response.status >= 300:
            raise _error(response.status, body)
        return msgspec.json.decode(body)

    async def post(self, path: str, body: bytes | AsyncIterable[bytes], headers: Mapping[str, str]) -> Answer:
        """The answer to ``POST path``, at most a minute after the last byte either way.  Raises: Unavailable."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT_S, sock_read=_POST_TIMEOUT_S)
        try:
            async with self._required().post(path, data=body, headers=headers, timeout=timeout) as response:
                return Answer(
                    response.status,
                    response.headers.get("Content-Type", "application/json"),
                    await response.read(),
                )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(f"{self._who} does not answer: {reason_of(error)}") from error

    async def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """The whole answer to a small request, whatever it says, within a minute.  Raises: Unavailable: it is away."""
        try:
            async with (
                asyncio.timeout(_POST_TIMEOUT_S),
                self._required().request(method, path, data=body or None, headers=headers) as response,
            ):
                kind = response.headers.get("Content-Type", "")
                return Answer(response.status, kind, await response.read())
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(f"{self._who} does not answer: {reason_of(error)}") from error

    @asynccontextmanager
    async def lines(self, path: str, query: Mapping[str, str]) -> AsyncIterator[AsyncIterator[bytes]]:
        """The lines of an endless answer, as they come.  Raises: Unavailable."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT_S)
        try:
            async with self._required().get(_with(path, query), timeout=timeout) as response:
                if response.status >= 300:
                    raise _error(response.status, await response.read())
                yield aiter(response.content)
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"{self._who} does not answer: {reason_of(error)}") from error

    def _required(self) -> aiohttp.ClientSession:
        assert self._session is not None, "used outside of open()"
        return self._session


def _with(path: str, query: Mapping[str, str] | None) -> str:
    return f"{path}?{urlencode(query)}" if query else path


def _error(status: int, body: bytes) -> SkepError:
    try:
        message = str(msgspec.json.decode(body)["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        message = body.decode(errors="replace").strip()
    return error_of(status, message)
