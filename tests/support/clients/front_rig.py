"""A front on its own socket, with a simulated manager and engine behind it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from skep.aio.clock import SystemClock
from skep.api.client.client import ApiClient
from skep.api.http.handover_server import HOOKS, TIMES, PassedConnections, RequestTimes, begin_response
from skep.configuration.configuration import Host, TcpHost, UnixHost
from skep.errors import NotFound
from skep.model.permissions.access import Identity
from skep.node.front.application import Application, Ping, no_ping
from skep.node.front.handover import Handover
from skep.node.front.server import OPTIONS, ClientLimits, DockerSocket, Front, FrontOptions
from skep.node.front.task_requests import TaskContainer
from skep.node.front.users import ApiTls, KnownUsers

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
MIB = 1 << 20


class Owned:
    """A node that created the container ``ours``."""

    has_docker_engine = True
    has_volumes = False

    def owns_container(self, word: str) -> bool:
        return word == "ours"

    def owns_image(self, reference: str) -> bool:
        return False

    def owns_exec(self, id: str) -> bool:
        return False

    def container_of(self, identity: Identity, word: str) -> TaskContainer:
        raise NotFound(f"No such container: {word}")

    def container_of_exec(self, identity: Identity, id: str) -> TaskContainer:
        raise NotFound(f"No such exec instance: {id}")


class Member:
    """A node in a swarm, unless configured otherwise."""

    refusal: str | None = None

    def manager_refusal(self) -> str | None:
        return self.refusal


@asynccontextmanager
async def application(answer: Answer, **options: Any) -> AsyncIterator[web.AppRunner]:
    app = web.Application(client_max_size=64 * MIB)
    app.router.add_route("*", "/{tail:.*}", answer)
    app.on_response_prepare.append(begin_response)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.5, **options)
    await runner.setup()
    try:
        yield runner
    finally:
        await runner.cleanup()


class Rig:
    """A front on its own socket, with a manager and an engine behind it."""

    def __init__(
        self,
        directory: Path,
        limits: ClientLimits = OPTIONS.limits,
        times: RequestTimes = TIMES,
        **handover: int,
    ) -> None:
        """``limits`` are the front's, ``times`` the manager's, and ``handover`` those between the two."""
        self._limits, self._times, self._handover = limits, times, handover
        self.socket = directory / "api.sock"
        self.handover_socket = directory / "handover.sock"
        self.engine_socket = directory / "engine.sock"
        self.member = Member()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.connections = 0

    @asynccontextmanager
    async def front(
        self, answer: Answer | None = None, tls: ApiTls | None = None, ping: Ping = no_ping
    ) -> AsyncIterator[None]:
        """Run the front.  ``answer``: the node's own handler.  By default it returns the path and the size of the
        request.
        """

        async def here(request: web.Request) -> web.StreamResponse:
            response = web.json_response({"here": request.path, "bytes": len(await request.read())})
            response.force_close()
            return response

        async with application(answer or here) as runner:
            assert runner.server is not None
            front = Front(
                Application(runner.server, ping),
                Handover(self.handover_socket, SystemClock(), lambda: 0.5, **self._handover),
                ownership=Owned(),
                membership=self.member,
                docker=DockerSocket(self.engine_socket),
                users=KnownUsers(
                    ApiClient.local(self.handover_socket, "no manager"), SystemClock(), lambda: 0.5, tls
                ),
                options=FrontOptions(limits=self._limits),
            )
            hosts: list[Host] = [UnixHost(self.socket), TcpHost("127.0.0.1", self.port)]
            async with front.listening(hosts):
                yield

    @asynccontextmanager
    async def manager(self, answer: Answer) -> AsyncIterator[None]:
        """Run a manager that serves forwarded requests.  ``connections``: number of connections so far."""
        async with application(answer, **HOOKS) as runner:
            assert runner.server is not None
            serve = runner.server

            def counted() -> RequestHandler:
                self.connections += 1
                return serve()

            passed = PassedConnections(counted, self._times)
            async with passed.listening(self.handover_socket):
                yield
            await runner.cleanup()
            passed.close()

    @asynccontextmanager
    async def engine(
        self, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
    ) -> AsyncIterator[None]:
        with closing(await asyncio.start_unix_server(serve, self.engine_socket)):
            yield
        self.engine_socket.unlink(missing_ok=True)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[aiohttp.ClientSession]:
        connector = aiohttp.UnixConnector(str(self.socket))
        async with aiohttp.ClientSession("http://docker", connector=connector) as session:
            yield session


async def echo(request: web.Request) -> web.StreamResponse:
    body = await request.read()
    return web.json_response({"manager": request.path_qs, "bytes": len(body)}, headers={"X-Of": "manager"})
