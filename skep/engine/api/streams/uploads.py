"""Reads request bodies and sends response bodies piece by piece."""

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web

from skep.errors import Unavailable

_PIECE_BYTES = 1 << 18
"""Bytes that are read at a time."""
_REST_BYTES_MAX = 64 << 20
"""Limit in bytes for the rest of a refused upload that is still read, so that its sender gets the response and not a
broken pipe.
"""
_REST_DEADLINE_S = 10.0
"""Seconds for which the rest of a refused upload is still read."""
TAKEN_S = 300.0
"""Seconds after which a client that downloads an archive is disconnected if it reads no data."""


async def pieces_of(request: web.Request, *, silent_s: float | None = None) -> AsyncIterator[bytes]:
    """Yield the body as it arrives.

    Args:
        silent_s: Longest time in seconds between two pieces, or None for no limit.

    Raises: Unavailable: nothing arrived for that long.
    """
    while True:
        try:
            async with asyncio.timeout(silent_s):
                piece = await request.content.read(_PIECE_BYTES)
        except TimeoutError as error:
            raise Unavailable(f"the client has sent nothing for {silent_s:.0f} s") from error
        if not piece:
            return
        yield piece


async def drain(request: web.Request) -> None:
    """Read the rest of a body, within limits of size and time."""
    read = 0
    try:
        async with asyncio.timeout(_REST_DEADLINE_S):
            async for piece in request.content.iter_chunked(_PIECE_BYTES):
                read += len(piece)
                if read > _REST_BYTES_MAX:
                    return
    except (TimeoutError, ConnectionError):
        return


async def send_piece(
    request: web.Request, response: web.StreamResponse, piece: bytes, taken_s: float = TAKEN_S
) -> None:
    """Send a piece of an archive.

    Raises: ConnectionResetError: the client reads nothing for ``taken_s``, or has disconnected.
    """
    try:
        async with asyncio.timeout(taken_s):
            await response.write(piece)
    except TimeoutError as error:  # otherwise the source would stay on the disk, or mounted
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the client does not read the archive") from error
