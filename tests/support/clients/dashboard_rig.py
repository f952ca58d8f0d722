"""The dashboard: ``skep ui``, and its own listener before an application that stands for the node's API."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

from aiohttp import web

from skep.aio.clock import SystemClock
from skep.api.access.identity import identify, identity_of
from skep.api.http.connection import Connection
from skep.dashboard.passing import LIMITS, BrowserLimits
from skep.dashboard.server import DashboardServer, Tls
from skep.errors import Unauthenticated, Unavailable
from skep.model.permissions.access import Credential, Identity, Origin, parse_binding
from tests.support.machines.playground_rig import SKEP
from tests.support.security.api_authority import Authority

ROLES = {"ann-token": "viewer", "bob-token": "operator:shop", "eve-token": "admin"}


class People:
    """Users by their tokens, and their connections."""

    def __init__(self) -> None:
        self.by_credential = {Credential.of_token(word.encode(), is_login=True): word for word in ROLES}
        self.open: dict[asyncio.Transport, Credential] = {}
        self.are_known = True

    def identify(self, credential: Credential) -> Identity:
        if not self.are_known:
            raise Unavailable("users are not known at present")
        if (token := self.by_credential.get(credential)) is None:
            raise Unauthenticated("the token is unknown or was revoked")
        name = token.partition("-")[0]
        return Identity(name=name, origin=Origin.TOKEN, bindings=(parse_binding(ROLES[token]),))

    def remember(self, transport: asyncio.Transport, credential: Credential, identity: Identity) -> None:
        self.open[transport] = credential

    def revoke(self, token: str) -> None:
        credential = Credential.of_token(token.encode(), is_login=True)
        del self.by_credential[credential]
        for transport, of in self.open.items():
            if of == credential:
                transport.abort()


class Clock(SystemClock):
    def __init__(self) -> None:
        super().__init__()
        self.ahead = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead


def user_of(request: web.Request) -> str:
    """Return the user in whose name the dashboard sends a request."""
    return identity_of(request).name


@asynccontextmanager
async def a_dashboard_server(
    app: web.Application,
    authority: Authority,
    clock: Clock,
    *,
    allows_public: bool = False,
    limits: BrowserLimits = LIMITS,
) -> AsyncIterator[tuple[int, People]]:
    """Serve the dashboard.  Yield its loopback port and its users.  ``app``: the API."""
    people, numbers, tasks = People(), count(1), set[asyncio.Task[Any]]()
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    new_handler = runner.server
    assert new_handler is not None

    async def connect(connected: socket.socket, identity: Identity) -> None:
        client = await Connection.over(connected)
        transport, handler = client.transport, new_handler()
        identify(transport, identity)
        transport.set_protocol(handler)
        handler.connection_made(transport)
        if waiting := client.take():
            handler.data_received(waiting)

    def serve(connected: socket.socket, identity: Identity) -> None:
        tasks.add(asyncio.get_running_loop().create_task(connect(connected, identity)))

    server = DashboardServer(
        Tls.of(*authority.pair("server")),
        people,
        serve,
        allows_public=allows_public,
        clock=clock,
        new_secret=lambda: f"{next(numbers):032}",
        limits=limits,
    )
    try:
        async with server.listening("127.0.0.1", 0) as (port,):
            yield port, people
    finally:
        await runner.cleanup()


@asynccontextmanager
async def skep_ui(host: str) -> AsyncIterator[str]:
    """Run ``skep ui``, and yield the address that it prints."""
    words = (SKEP, "--host", host, "ui", "--no-browser")
    process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()
    finally:
        process.terminate()
        await process.wait()
