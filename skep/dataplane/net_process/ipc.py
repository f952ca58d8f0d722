"""Requests to another process of this node, over a Unix socket: one request, one response.

Each message is preceded by its length (4 bytes, big-endian).  The two processes may be of consecutive versions, so
fields of messages are only ever added.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import Unavailable
from skep.linux.unix_sockets import private_socket

LENGTH_BYTES = 4
"""Size of the length before each message."""
DEADLINE_S = 10.0
"""Time limit in seconds for one request."""
_FIRST_RETRY_S = 0.02
"""Seconds before a request is first repeated.  The other process takes a tenth of a second to start."""
_RETRY_S_MAX = 0.5
"""Longest pause in seconds between attempts.  Short, so that containers wait little once the process is back."""

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Handles one connection."""


def framed(body: bytes) -> bytes:
    """Return ``body`` preceded by its length."""
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


async def read_frame(reader: asyncio.StreamReader, bytes_max: int) -> bytes | None:
    """Return the next message, or None after the other end has closed.

    Raises: Unavailable: the message is too long.
    """
    try:
        length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
        if length > bytes_max:
            raise Unavailable(f"message of {length} bytes exceeds the limit of {bytes_max}")
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


async def serve(converse: Serve, path: Path) -> asyncio.Server:
    """Listen at ``path``, replacing the server there, for processes of this user only.  Raises: OSError."""
    listener = private_socket(path)
    try:
        return await asyncio.start_unix_server(converse, sock=listener)
    except BaseException:
        listener.close()
        raise


class IpcClient:
    """A client with one kept connection, which it reopens when the other process was replaced.

    A request waits for up to 10 s while that process restarts.
    """

    def __init__(
        self, path: Path, clock: Clock, rng: Callable[[], float], *, server: str, bytes_max: int
    ) -> None:
        """``server`` is the other process's name in errors.  A response has at most ``bytes_max`` bytes."""
        self._path = path
        self._clock = clock
        self._rng = rng
        self._server = server
        self._bytes_max = bytes_max
        self._turn = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes) -> bytes:
        """Send a request and return its response.  If the connection breaks, the request is sent again over a new one.

        Raises: Unavailable: no response within 10 s.
        """
        message = framed(body)
        backoff = Backoff(_FIRST_RETRY_S, _RETRY_S_MAX, rng=self._rng)
        try:
            async with asyncio.timeout(DEADLINE_S), self._turn:
                while True:
                    try:
                        return await self._exchange(message)
                    except OSError:
                        self.close()
                        await backoff.sleep(self._clock)
                    except BaseException:
                        self.close()  # a late response may still arrive on this connection
                        raise
        except TimeoutError as error:
            raise Unavailable(f"{self._server} does not answer on {self._path}") from error

    def close(self) -> None:
        """Close the connection.  The next request opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _exchange(self, message: bytes) -> bytes:
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(self._path)
        reader, writer = self._streams
        writer.write(message)
        await writer.drain()
        body = await read_frame(reader, self._bytes_max)
        if body is None:
            raise ConnectionResetError("closed before it answered")
        return body
