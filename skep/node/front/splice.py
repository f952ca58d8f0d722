"""Connects a client to another process, byte for byte: to the machine's Docker Engine, or to the manager process.

An ordinary request to the engine is sent on with ``Connection: close``.  The connection then carries exactly one
exchange.  So the end of a body need not be found, and the client's next request, on a new connection, is routed again.
A request with ``Upgrade`` is sent unchanged.  Half-closes are passed on, because the end of the standard input of
``docker run -i`` is sent as a half-close.
"""

import asyncio
from pathlib import Path

from skep.api.http.connection import Connection, Gone
from skep.api.http.framing import RequestHead
from skep.errors import Unavailable

_CONNECT_TIMEOUT_S = 10.0
"""Time limit in seconds for connecting to the other process."""


async def splice(client: Connection, request: RequestHead, engine_socket: Path) -> None:
    """Send ``request`` to the engine and copy both directions until they end.  Closes ``client``.

    Raises: Unavailable: no engine answers, and nothing was sent to the client.
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
    """Send ``head`` to ``server``, and copy both directions until they end.  Closes both connections.

    With ``is_one_exchange``, the relay ends with the response, and further data of the client is dropped.
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
    """Watch the client after all of its data was passed on.  Raises: Gone: it has disconnected or vanished."""
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
        # the server no longer reads, but its response may still arrive


async def _copy(source: Connection, sink: Connection) -> None:
    """Copy until ``source`` ends, then half-close ``sink``.  Raises: Gone: ``sink`` is closed."""
    while data := await source.read():
        await sink.send(data)
    sink.end()
