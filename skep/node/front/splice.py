"""Connects a client to another process, byte for byte: to the machine's Docker Engine, and remote clients to the
manager process.

An ordinary request to the engine is sent on with ``Connection: close``: the connection carries exactly one exchange,
nothing has to find where a body ends, and the client's next request is routed anew.  A request with ``Upgrade`` goes
unchanged. Half-closes are passed on: that is what ends the standard input of ``docker run -i``.
"""

import asyncio
from pathlib import Path

from skep.api.connection import Connection, Gone
from skep.api.framing import Request
from skep.errors import Unavailable

_CONNECT_TIMEOUT_S = 10.0


async def splice(client: Connection, request: Request, engine_socket: Path) -> None:
    """Send ``request`` to the engine and copy both directions until they end; ``client`` is closed then.

    Raises: Unavailable: no engine answers; nothing was sent to the client.
    """
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            loop = asyncio.get_running_loop()
            _, engine = await loop.create_unix_connection(Connection, str(engine_socket))
    except (OSError, TimeoutError) as error:
        raise Unavailable(f"the Docker Engine at {engine_socket} does not answer: {error}") from error
    head = (
        request.head.with_headers()
        if request.upgrades
        else request.head.with_headers((b"Connection", b"close"), without=(b"keep-alive",))
    )
    await relay(client, engine, head, is_one_exchange=not request.upgrades)


async def relay(client: Connection, server: Connection, head: bytes, *, is_one_exchange: bool) -> None:
    """Send ``head`` and copy both directions until they end; both are closed then.

    ``is_one_exchange``: the end of the response is the end; what the client still sends is dropped.
    """
    try:
        async with asyncio.TaskGroup() as group:
            up = group.create_task(_upwards(head, client, server), name="to the server")
            watching = group.create_task(_watch(client, up), name="client lost")
            await _copy(server, client)
            if is_one_exchange:
                up.cancel()  # the response is complete
                server.abort()
                watching.cancel()
                await client.linger()
            else:
                await asyncio.wait([up])
                watching.cancel()
    except ExceptionGroup as ended:
        if ended.split(Gone)[1] is not None:
            raise
    finally:
        server.abort()
        client.close()


async def _watch(client: Connection, up: asyncio.Task[None]) -> None:
    """Once all that the client has sent is passed on.  Raises: Gone: it broke the connection, or has vanished."""
    await asyncio.wait([up])
    await client.wait_lost()
    raise Gone("closed by the other end")


async def _upwards(head: bytes, client: Connection, server: Connection) -> None:
    try:
        if head:
            await server.send(head)
        await _copy(client, server)
    except Gone:
        if client.has_ended:
            raise
        # the server reads no more, but what it answered may still be on its way


async def _copy(source: Connection, sink: Connection) -> None:
    """Copy until ``source`` ends, then end ``sink``'s direction.  Raises: Gone: ``sink`` is closed."""
    while data := await source.read():
        await sink.send(data)
    sink.end()
