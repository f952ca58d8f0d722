"""Bodies of requests that are read piece by piece."""

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web

_PIECE_BYTES = 1 << 18
_REST_BYTES_MAX = 64 << 20
"""How much of a refused upload is still read, so that its sender gets the response and not a broken pipe."""
_REST_DEADLINE_S = 10.0


async def pieces_of(request: web.Request) -> AsyncIterator[bytes]:
    """The body as it arrives."""
    async for piece in request.content.iter_chunked(_PIECE_BYTES):
        yield piece


async def drain(request: web.Request) -> None:
    """Read what is left of a body, within bounds of size and time."""
    read = 0
    try:
        async with asyncio.timeout(_REST_DEADLINE_S):
            async for piece in request.content.iter_chunked(_PIECE_BYTES):
                read += len(piece)
                if read > _REST_BYTES_MAX:
                    return
    except (TimeoutError, ConnectionError):
        return
