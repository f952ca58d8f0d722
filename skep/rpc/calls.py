"""gRPC calls to one server on a unix socket of this machine, over one connection that is made when it is needed.

What a call costs here is what a small request of the API costs: each makes one or two.  Headers and message leave in
one write; an answer wakes its caller once, whatever it came in.  A connection that breaks, or that the peer gives
notice of (GOAWAY), breaks all its calls; the next one makes another.

The peer is trusted not to fill the memory with one message, and to take any number of calls at once.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from skep.rpc import headers
from skep.rpc.client import Bounds, ClientConnection, ClientStream

BOUNDS = Bounds(stream_window=8 * 1024 * 1024, connection_window=16 * 1024 * 1024, message=512 * 1024 * 1024)
"""etcd answers a read of many keys in one message, and is trusted not to fill the memory with one."""


class Calls:
    """The way to one server.  ``close`` it."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._connection: ClientConnection | None = None
        self._connecting = asyncio.Lock()

    def close(self) -> None:
        """Drop the connection with whatever is under way."""
        if self._connection is not None:
            self._connection.abort()

    async def unary(self, path: str, request: bytes, timeout_s: float) -> bytes:
        """The answer to ``request``.  Raises: CallFailed; TimeoutError; OSError: no connection, or it broke."""
        call = self.begin(path, request, timeout_s)
        if call is None:
            deadline = asyncio.get_running_loop().time() + timeout_s
            async with asyncio.timeout_at(deadline):
                connection = await self._connected()
            left_s = deadline - asyncio.get_running_loop().time()
            call = Call(connection, headers.request_block(path, timeout_s), request, left_s)
        return await call.answer()

    def begin(self, path: str, request: bytes, timeout_s: float) -> "Call | None":
        """Send ``request`` now, and have its answer awaited later.  None: no connection stands."""
        connection = self._connection
        if connection is None or connection.is_lost or connection.is_used_up:
            return None
        return Call(connection, headers.request_block(path, timeout_s), request, timeout_s)

    @asynccontextmanager
    async def stream(
        self,
        path: str,
        request: bytes,
        *,
        timeout_s: float,
        metadata: tuple[tuple[str, str], ...] = (),
        is_last: bool = False,
    ) -> AsyncIterator[ClientStream]:
        """A call of many messages, begun with ``request`` (``is_last``: the only one); it ends with the context.

        ``timeout_s``: to reach the server.  Raises: TimeoutError; OSError: no connection.
        """
        async with asyncio.timeout(timeout_s):
            connection = await self._connected()
        with connection.stream() as stream:
            stream.begin(headers.request_block(path, None, metadata), request, is_last=is_last)
            yield stream

    async def _connected(self) -> ClientConnection:
        if self._connection is None or self._connection.is_lost:
            async with self._connecting:
                if self._connection is None or self._connection.is_lost:
                    loop = asyncio.get_running_loop()
                    _, self._connection = await loop.create_unix_connection(
                        partial(ClientConnection, BOUNDS), str(self._socket)
                    )
        return self._connection


class Call:
    """A request that was sent, whose one answer is to be awaited."""

    def __init__(self, connection: ClientConnection, block: bytes, request: bytes, timeout_s: float) -> None:
        self._connection = connection
        self._stream = connection.open()
        # A timer alone costs half of what asyncio.timeout does, which knows about tasks and cancelling.
        self._expiry = asyncio.get_running_loop().call_later(timeout_s, self._stream.expire)
        self._stream.begin(block, request, is_last=True)

    async def answer(self) -> bytes:
        """Raises: CallFailed; TimeoutError; Lost."""
        try:
            return await self._stream.only_message()
        finally:
            self._expiry.cancel()
            self._connection.release(self._stream)
