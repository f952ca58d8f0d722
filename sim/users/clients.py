"""Clients of the API in a simulated cluster: production commands on the production routes of simulated managers.

A client can be killed or suspended between any two requests, and a response can be lost.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from random import Random
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlencode

import msgspec
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from sim.cluster import SimulatedCluster
from sim.world.manager import SimulatedManager
from skep.api.access.identity import identify
from skep.api.client.requests import Filters, Requests, parameters_of
from skep.api.errors import error_of
from skep.errors import Unavailable
from skep.manager.ca.external import ExternalAuthorities
from skep.manager.routes import ManagerApi, application
from skep.manager.routes.access import MANAGER
from skep.manager.telemetry.events import ClusterEvents
from skep.model.permissions.access import ALL, Identity, Origin
from skep.model.values.name_generator import names_from
from skep.store.interface import Store

ADMIN = Identity(name="root", origin=Origin.SOCKET, bindings=ALL)
LATENCY_S = 0.02
"""Longest latency of a request to a manager in seconds."""
RETRY_S = 0.2
"""Interval at which a client looks for a manager that serves."""


class Apis:
    """The API of each manager, created when a client first uses it."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self.cluster = cluster
        self._made: dict[Store, web.Application] = {}

    def any_manager(self) -> web.Application:
        """Return the API of a random manager that serves.  Raises: Unavailable: no manager serves."""
        running = self.cluster.running_managers.values()
        serving = [one for one in running if one.store is not None]
        if not serving:
            raise Unavailable("no manager serves")
        return self._of(self.cluster.random.choice(serving))

    def _of(self, manager: SimulatedManager) -> web.Application:
        store = manager.store
        assert store is not None
        if store not in self._made:
            cluster, clock = self.cluster, self.cluster.clocks[manager._id]
            made = application(
                ManagerApi(
                    store=store,
                    logs=cast("Any", None),
                    backups=cast("Any", None),
                    diagnostics=cast("Any", None),
                    external=ExternalAuthorities(lambda: cast("Any", None), clock, cluster.random),
                    tunnels=cast("Any", None),
                    events=ClusterEvents(store, clock),
                    all_events=cast("Any", None),
                    clock=clock,
                    new_id=cluster.new_id,
                    new_name=names_from(Random(1)),
                )
            )
            made.freeze()
            self._made[store] = made
        return self._made[store]


class Commands:
    """The commands of one kind of user that run now."""

    def __init__(
        self, cluster: SimulatedCluster, random: Random, note: Callable[[Iterable[str]], None]
    ) -> None:
        """``note`` records violated rules."""
        self._cluster = cluster
        self._random = random
        self._note = note
        self._apis = Apis(cluster)
        self._running: set[asyncio.Task[None]] = set()

    def _start(self, command: Coroutine[Any, Any, None], name: str) -> None:
        """Run a command until it ends or is killed."""
        task = self._cluster.loop.create_task(command, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _end_all(self) -> None:
        """End the commands that run, also those whose clients were killed."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)


class ApiClient(Requests):
    """Sends the requests of one command, with injected faults."""

    def __init__(self, apis: Apis, name: str, identity: Identity = ADMIN) -> None:
        self._apis = apis
        self._name = name
        self._identity = identity
        self._random = apis.cluster.random
        self.is_killed = False
        self._is_gone = False
        """Whether the simulation has ended the killed command, so that it can send no requests to clean up."""
        self.requests = 0
        """Number of requests that the command has begun."""
        self.killed_at: int | None = None
        """Number of the request before or after which the command is killed, or None to let it live."""
        self.pauses: dict[int, float] = {}
        """Seconds for which the command is suspended, by the number of the request that follows."""
        self.loses = 0.0
        """Probability that a response is lost."""

    def disturb(self, random: Random, last: int, pause_s: float) -> None:
        """Kill the command or suspend it at a request up to number ``last``, or lose some of its responses.

        Args:
            pause_s: Longest time for which the command is suspended.
        """
        match random.randrange(4):
            case 0:
                self.killed_at = random.randint(1, last)
            case 1:
                self.pauses[random.randint(1, last)] = random.uniform(0.5, pause_s)
            case 2:
                self.loses = 0.1
            case _:
                pass

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        filters: Filters | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """See ``Requests``."""
        self.requests += 1
        await self._pass()
        target = path
        if parameters := {**(query or {}), **parameters_of(filters)}:
            target = f"{path}?{urlencode(parameters)}"
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(self._random.uniform(0, LATENCY_S))
                status, answer = await self._exchange(method, target, body, headers or {})
                await asyncio.sleep(self._random.uniform(0, LATENCY_S))
        except TimeoutError:
            raise Unavailable(f"no response within {timeout_s} s") from None
        await self._pass()
        if method != "GET" and self._random.random() < self.loses:
            raise Unavailable("the response was lost")
        found = msgspec.json.decode(answer) if answer.strip() else None
        if status >= 400:
            raise error_of(status, str((found or {}).get("message", status)))
        return found

    async def _pass(self) -> None:
        if self.killed_at is not None and self.requests >= self.killed_at:
            # The command is killed before the request, or after it without reading the response.
            self.is_killed = self.is_killed or self.requests > self.killed_at or self._random.random() < 0.5
        if self._is_gone:
            raise asyncio.CancelledError
        if self.is_killed:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                self._is_gone = True
        await asyncio.sleep(self.pauses.pop(self.requests, 0.0))

    async def _exchange(
        self, method: str, target: str, body: Any, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        data = b"" if body is None else msgspec.json.encode(body)
        sent = {**headers, "Content-Type": "application/json", "Content-Length": str(len(data))}
        connection = _Connection()
        identify(connection, self._identity)
        app = self._apis.any_manager()
        if target == "/info":  # The node process serves this route, and has the clock of its manager.
            return 200, msgspec.json.encode({"SystemTime": app[MANAGER].now()})
        request = make_mocked_request(
            method,
            target,
            sent,
            app=app,
            writer=None,
            protocol=_protocol_of(connection),
            transport=connection,
        )
        request._read_bytes = data
        response = await app._handle(request)
        assert isinstance(response, web.Response), target
        content = response.body
        return response.status, bytes(content) if isinstance(content, bytes | bytearray) else b""


class Host:
    """Provides a command with its client, as ``HostOptions`` does."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    @asynccontextmanager
    async def client(self) -> AsyncIterator[ApiClient]:
        yield self._client


def _protocol_of(connection: "_Connection") -> SimpleNamespace:
    """Return what a request reads of its protocol.  aiohttp's own mocks cost more than the whole request."""
    return SimpleNamespace(transport=connection, peername=None, sockname=None, ssl_context=None)


class _Connection(asyncio.Transport):
    """Represents a connection.  Only its identity matters."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return False
