"""Hands a connection to the machine's Docker Engine, byte for byte.

An ordinary request is sent on with ``Connection: close``: the connection carries exactly one exchange, nobody has to
know where a body ends, and the client's next request is routed anew.  A request with ``Upgrade`` goes unchanged.
Half-closes are passed on: that is what ends the standard input of ``docker run -i``.
"""

import asyncio
from pathlib import Path

from skep.errors import Unavailable
from skep.node.front.framing import Request
from skep.node.front.side import Gone, Side

_CONNECT_TIMEOUT_S = 10.0


async def splice(client: Side, request: Request, engine_socket: Path) -> None:
    """Send ``request`` to the engine and copy both directions until they end; ``client`` is closed then.

    Raises: Unavailable: no engine answers; nothing was sent to the client.
    """
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            loop = asyncio.get_running_loop()
            _, engine = await loop.create_unix_connection(Side, str(engine_socket))
    except (OSError, TimeoutError) as error:
        raise Unavailable(f"the Docker Engine at {engine_socket} does not answer: {error}") from error
    head = (
        request.head.with_headers()
        if request.upgrades
        else request.head.with_headers((b"Connection", b"close"), without=(b"keep-alive",))
    )
    try:
        async with asyncio.TaskGroup() as group:
            up = group.create_task(_upwards(head, client, engine), name="to the engine")
            await _copy(engine, client)
            if not request.upgrades:
                up.cancel()  # the answer is complete
                engine.abort()
                await client.linger()
    except ExceptionGroup as ended:
        if ended.split(Gone)[1] is not None:
            raise
    finally:
        engine.abort()
        client.close()


async def _upwards(head: bytes, client: Side, engine: Side) -> None:
    try:
        await engine.send(head)
        await _copy(client, engine)
    except Gone:
        if client.has_ended:
            raise
        # the engine reads no more, but what it answered may still be on its way


async def _copy(source: Side, sink: Side) -> None:
    """Copy until ``source`` ends, then end ``sink``'s direction.  Raises: Gone: ``sink`` is closed."""
    while data := await source.read():
        await sink.send(data)
    sink.end()
