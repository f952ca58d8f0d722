"""Reads cluster data for a worker's API from the manager of its session, if the cluster allows workers to read."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from urllib.parse import urlencode

from skep.agent.session.session_state import SessionState
from skep.api.client.client import ApiClient
from skep.errors import ResourceExhausted, Unavailable
from skep.wire import methods
from skep.wire import skep_pb2 as skep

FIRST_S_MAX = 5.0
"""Seconds until the manager's response must have started."""
BODY_S_MAX = 30.0
"""Seconds until the whole response must have arrived."""
BODY_BYTES_MAX = 64 << 20
"""Longest response of a manager in bytes.  Limited, because the response is read into memory."""
LINE_BYTES_MAX = 1 << 20
"""Longest line in bytes of a stream from a manager."""


class ClusterReads:
    """Reads cluster data over this node's session.  ``own`` is the API of the node's own manager, if it has one."""

    def __init__(self, session: SessionState, own: ApiClient) -> None:
        self._session = session
        self.own = own

    @asynccontextmanager
    async def pieces(self, target: str) -> AsyncGenerator[AsyncIterator[bytes], None]:
        """Yield the body of a manager's response to ``GET target`` as it arrives.

        Raises:
            PermissionDenied: The cluster does not allow it.
            Unavailable: There is no session or no response.
            Unimplemented: The manager is an earlier version, or Docker's.
            SkepError: The manager's own error.
        """
        async with self._session.channel.stream(methods.READ) as call:
            await call.send(skep.ReadRequest(target=target), end=True)
            try:
                async with asyncio.timeout(FIRST_S_MAX):
                    begun = await call.receive()
            except TimeoutError as error:
                raise Unavailable("the manager does not respond") from error
            if begun is None:
                raise Unavailable("the manager sent no response")
            yield (piece.data async for piece in call)

    async def body(self, target: str) -> bytes:
        """Return the whole body of a manager's response to ``GET target``.

        Raises: the errors of ``pieces``; ResourceExhausted: it is too long.
        """
        content = bytearray()
        try:
            async with asyncio.timeout(BODY_S_MAX), self.pieces(target) as pieces:
                async for piece in pieces:
                    content += piece
                    if len(content) > BODY_BYTES_MAX:
                        raise ResourceExhausted("the manager's response is too long")
        except TimeoutError as error:
            raise Unavailable("the manager's response took too long") from error
        return bytes(content)

    @asynccontextmanager
    async def lines(self, path: str, query: Mapping[str, str]) -> AsyncGenerator[AsyncIterator[bytes], None]:
        """Yield the lines of a response that does not end by itself, as ``ApiClient.lines`` does.

        Raises: the errors of ``pieces``.
        """
        target = f"{path}?{urlencode(query)}" if query else path
        async with self.pieces(target) as pieces:
            yield _lines_of(pieces)


async def _lines_of(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Split ``pieces`` into lines.  Raises: ResourceExhausted: a line is too long."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line + b"\n"
        if len(rest) > LINE_BYTES_MAX:
            raise ResourceExhausted("a line of the manager's response is too long")
