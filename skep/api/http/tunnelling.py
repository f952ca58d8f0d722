"""Joins a connection of this machine with a tunnel between nodes.  Both directions are copied, including their ends."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from skep.aio.groups import first_alone
from skep.api.http.connection import LINGER_S, Connection, Gone
from skep.errors import SkepError, Unavailable
from skep.wire.tunnel import Tunnel

_UPGRADED = b"HTTP/1.1 101 "


async def join_client(
    client: Connection,
    tunnel: Tunnel,
    *,
    body: Coroutine[Any, Any, None] | None = None,
    is_port: bool = False,
    linger_s: float = LINGER_S,
) -> None:
    """Join a client with a tunnel at a manager until the container's side has ended.  For a port, wait for the client's
    side as well.

    Args:
        body: Sends the client's data.  By default everything on its connection is sent.
        is_port: Whether it is a connection to a port, where the container may end its direction first.  Otherwise it is
            a request, which ends with its response, and the client's data is held back until the response upgrades the
            connection.
        linger_s: Seconds after a request for which its client may only read.

    Raises:
        Unavailable: Either side was lost.  The caller drops both.
    """
    upgraded = asyncio.Event()
    with first_alone(SkepError):
        async with asyncio.TaskGroup() as group:
            up = group.create_task(body or _from_client(client, tunnel, upgraded), name="to the container")
            watching = group.create_task(
                _watch(client, up, linger_s, is_request=body is not None), name="client lost"
            )
            if is_port:
                upgraded.set()
            begin = b""
            while data := await tunnel.read():
                if not is_port and len(begin) < len(_UPGRADED):
                    begin = (begin + data)[: len(_UPGRADED)]
                    if begin == _UPGRADED:
                        upgraded.set()
                    elif body is None and len(begin) == len(_UPGRADED):
                        up.cancel()  # the node refused the upgrade
                await _send(client, data)
            if is_port:
                client.end()
                await asyncio.wait([up])
            else:
                up.cancel()
            watching.cancel()


async def join_container(container: Connection, tunnel: Tunnel) -> None:
    """Join a container with a tunnel at a node, until the manager has ended the call.

    Raises:
        Unavailable: The call ended before the container did.
    """
    with first_alone(SkepError):
        async with asyncio.TaskGroup() as group:
            down = group.create_task(_from_container(container, tunnel), name="from the container")
            await _to_container(tunnel, container, down)


async def _watch(client: Connection, up: asyncio.Task[None], linger_s: float, *, is_request: bool) -> None:
    """Raise if a client disconnects after it has sent everything.  Without this, it would be noticed only when output
    is sent.
    """
    await asyncio.wait([up])
    if is_request or up.cancelled():
        while await client.read():  # data after a request to a container is ignored
            pass
        with suppress(TimeoutError):
            async with asyncio.timeout(linger_s):  # the client may have closed its direction only
                await client.wait_lost()
    else:
        await client.wait_lost()
    raise Unavailable("the client has gone")


async def _from_client(client: Connection, tunnel: Tunnel, upgraded: asyncio.Event) -> None:
    while data := await client.read():
        # An earlier node version keeps the connection open after it has refused a request, and would serve another
        # request on it.
        await upgraded.wait()
        await tunnel.send(data)
    if client.is_lost:
        raise Unavailable("the client has gone")
    await tunnel.end()


async def _from_container(container: Connection, tunnel: Tunnel) -> None:
    while data := await container.read():
        await tunnel.send(data)
    await tunnel.end()


async def _to_container(tunnel: Tunnel, container: Connection, down: asyncio.Task[None]) -> None:
    """Copy, then wait for the manager.  If this end left the call first, data that ``down`` has sent would be lost."""
    try:
        while data := await tunnel.read():
            # A container that has stopped reading may still have sent something.
            with suppress(Gone):
                await container.send(data)
        container.end()
        await tunnel.wait_left()
    except Unavailable:
        if not down.done():
            raise
    if not down.done():
        raise Unavailable("the client has gone")


async def _send(client: Connection, data: bytes) -> None:
    try:
        await client.send(data)
    except Gone as error:
        raise Unavailable("the client has gone") from error
