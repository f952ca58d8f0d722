"""What a worker's API shows of the cluster: read from the manager of its session, where the cluster allows it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from urllib.parse import urlencode

from skep.agent.session_state import SessionState
from skep.api.client import Client
from skep.errors import ResourceExhausted, Unavailable
from skep.wire import methods
from skep.wire import skep_pb2 as skep

FIRST_S_MAX = 5.0
"""Until the manager's response begins."""
BODY_S_MAX = 30.0
BODY_BYTES_MAX = 64 << 20
LINE_BYTES_MAX = 1 << 20


class ClusterReads:
    """Reads by the connection of this node's session.  ``own``: the API of its own manager, where it has one."""

    def __init__(self, session: SessionState, own: Client) -> None:
        self._session = session
        self.own = own

    @asynccontextmanager
    async def pieces(self, target: str) -> AsyncGenerator[AsyncIterator[bytes], None]:
        """The body of a manager's response to ``GET target`` as it arrives.

        Raises: PermissionDenied: the cluster does not allow it; Unavailable: there is no session, or no response;
        Unimplemented: an earlier version, or a Docker manager; SkepError: the manager's own.
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
        """The whole body.  Raises: as ``pieces``; ResourceExhausted: it is too long."""
        content = bytearray()
        try:
            async with asyncio.timeout(BODY_S_MAX), self.pieces(target) as pieces:
                async for piece in pieces:
                    content += piece
                    if len(content) > BODY_BYTES_MAX:
                        raise ResourceExhausted("the manager's response is too long")
        except TimeoutError as error:
            raise Unavailable("the manager's response is too slow") from error
        return bytes(content)

    @asynccontextmanager
    async def lines(self, path: str, query: Mapping[str, str]) -> AsyncGenerator[AsyncIterator[bytes], None]:
        """The lines of an endless response, as ``Client.lines``.  Raises: as ``pieces``."""
        target = f"{path}?{urlencode(query)}" if query else path
        async with self.pieces(target) as pieces:
            yield _lines_of(pieces)


async def _lines_of(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Raises: ResourceExhausted: one is too long."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line + b"\n"
        if len(rest) > LINE_BYTES_MAX:
            raise ResourceExhausted("a line of the manager's response is too long")
