"""Joins a connection of this machine with a tunnel between nodes: both directions are copied, each with its end."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from skep.aio.groups import first_alone
from skep.api.connection import LINGER_S, Connection, Gone
from skep.errors import SkepError, Unavailable
from skep.wire.tunnel import Tunnel

_UPGRADED = b"HTTP/1.1 101 "


async def join_client(
    client: Connection,
    tunnel: Tunnel,
    *,
    body: Coroutine[Any, Any, None] | None = None,
    is_port: bool = False,
) -> None:
    """At a manager: until the container's side has ended, and with a port the client's, too.

    Args:
        body: sends what the client has to say, where that is not all that comes on its connection.
        is_port: the container may end its direction first; else the end of its response is the end, and what comes
            from the client is kept until the response says that the connection is no HTTP any more.

    Raises: Unavailable: either side broke off; the caller drops both.
    """
    upgraded = asyncio.Event()
    with first_alone(SkepError):
        async with asyncio.TaskGroup() as group:
            up = group.create_task(body or _from_client(client, tunnel, upgraded), name="to the container")
            watching = group.create_task(_watch(client, up, is_request=body is not None), name="client lost")
            if is_port:
                upgraded.set()
            begin = b""
            while data := await tunnel.read():
                if not is_port and len(begin) < len(_UPGRADED):
                    begin = (begin + data)[: len(_UPGRADED)]
                    if begin == _UPGRADED:
                        upgraded.set()
                    elif body is None and len(begin) == len(_UPGRADED):
                        up.cancel()  # refused
                await _send(client, data)
            if is_port:
                client.end()
                await asyncio.wait([up])
            else:
                up.cancel()
            watching.cancel()


async def join_container(container: Connection, tunnel: Tunnel) -> None:
    """At a node: until the manager has ended the call.  Raises: Unavailable: that was before the container's end."""
    with first_alone(SkepError):
        async with asyncio.TaskGroup() as group:
            down = group.create_task(_from_container(container, tunnel), name="from the container")
            await _to_container(tunnel, container, down)


async def _watch(client: Connection, up: asyncio.Task[None], *, is_request: bool) -> None:
    """Raise once a client that has sent everything is gone: nothing else would notice before there is output."""
    await asyncio.wait([up])
    if is_request or up.cancelled():
        while await client.read():  # nothing behind a request to a container is answered
            pass
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):  # it may have closed its direction alone
                await client.wait_lost()
    else:
        await client.wait_lost()
    raise Unavailable("the client has gone")


async def _from_client(client: Connection, tunnel: Tunnel, upgraded: asyncio.Event) -> None:
    while data := await client.read():
        # A node of an earlier version keeps the connection of a request that it refused, and answers another one.
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
    """Copy, then wait for the manager: what ``down`` has sent would be lost if this end left the call first."""
    try:
        while data := await tunnel.read():
            # A container that takes nothing more may still have sent something.
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
