"""A node's ``/networks`` and ``/volumes`` with a real manager behind it.

Tasks, containers and the gateway bridge are stubs.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import IPv4Network
from pathlib import Path
from random import Random
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from skep.agent.session.session_state import SessionState
from skep.aio.clock import SystemClock
from skep.api.client.client import ApiClient
from skep.api.http.server import application
from skep.dataplane.local.networks import LocalNetworks
from skep.engine.api.volumes import volume_routes
from skep.engine.containers.container import Container
from skep.engine.events import Events
from skep.engine.volumes.volumes import Volumes
from skep.errors import FailedPrecondition, NotFound
from skep.manager.routes import ManagerApi
from skep.manager.routes import application as manager_application
from skep.model.networks.tables import NetworkTable
from skep.model.task import AssignedTask, TaskStatus
from skep.model.values.ids import NetworkId, TaskId, new_container_id
from skep.node.cluster.cluster_reads import ClusterReads
from skep.node.cluster.swarm_info import NOT_A_MANAGER, NOT_IN_A_SWARM
from skep.node.routes.cluster_networks import ClusterNetworks
from skep.node.routes.cluster_volumes import with_cluster_volumes
from skep.node.routes.networks import NetworkSources, network_routes
from tests.conformance.manager import a_manager_api


class AMember(msgspec.Struct):
    is_manager: bool = True
    is_in_swarm: bool = True

    def manager_refusal(self) -> str | None:
        if self.is_manager:
            return None
        return NOT_A_MANAGER if self.is_in_swarm else NOT_IN_A_SWARM


class AWorkload(msgspec.Struct):
    """Tasks and containers, and their known networks."""

    assigned: dict[TaskId, AssignedTask] = {}
    states: dict[TaskId, TaskStatus] = {}
    containers: tuple[Container, ...] = ()
    tables: dict[NetworkId, NetworkTable] = {}
    events: Events = msgspec.field(default_factory=lambda: Events(SystemClock()))

    def tasks(self) -> dict[TaskId, AssignedTask]:
        return self.assigned

    def statuses(self) -> dict[TaskId, TaskStatus]:
        return self.states

    def list(self) -> tuple[Container, ...]:
        return self.containers

    def get(self, word: str) -> Container:
        for one in self.containers:
            if word in (one.id, one.name):
                return one
        raise NotFound(f"No such container: {word}")


class AGateway:
    """The gateway bridge without a kernel.  The real bridge is tested in namespaces."""

    bridge = "skep-gw"

    def __init__(self) -> None:
        self.subnet: IPv4Network | None = IPv4Network("172.18.0.0/16")
        self.on_it: tuple[str, ...] = ()

    def users(self) -> tuple[str, ...]:
        return self.on_it

    async def move(self, subnet: IPv4Network | None) -> None:
        if self.on_it:
            raise FailedPrecondition("containers are on the node's gateway bridge")
        self.subnet = subnet or IPv4Network("172.18.0.0/16")


class Rig(msgspec.Struct):
    """A node and its requests."""

    client: TestClient[Any, Any]
    manager: ManagerApi
    member: AMember
    work: AWorkload
    gateway: AGateway
    local: LocalNetworks

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        async with self.client.request(method, path, json=body) as response:
            raw = await response.read()
            return response.status, msgspec.json.decode(raw) if raw else None

    async def message(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        status, response = await self.ask(method, path, body)
        return status, response["message"]

    async def names(self, **filters: str) -> set[str]:
        wanted = msgspec.json.encode({key: [value] for key, value in filters.items()}).decode()
        async with self.client.get("/networks", params={"filters": wanted}) as response:
            assert response.status == 200, await response.text()
            return {one["Name"] for one in await response.json()}


@asynccontextmanager
async def a_rig(folder: Path, *, has_engine: bool = True) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        manager = await stack.enter_async_context(a_manager_api())
        runner = web.AppRunner(manager_application(manager))
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.UnixSite(runner, str(folder / "m.sock")).start()
        api = ApiClient.local(folder / "m.sock", "the manager")
        await stack.enter_async_context(api)
        member, work, gateway = AMember(), AWorkload(), AGateway()
        local = LocalNetworks(folder / "local", gateway, clock=SystemClock(), new_id=new_container_id)
        local.open()
        cluster = ClusterNetworks(
            member=member,
            reads=ClusterReads(SessionState(SystemClock()), api),
            tasks=work,
            tables=work,
            containers=work.list,
            clock=SystemClock(),
            rng=Random(1).random,
        )
        parts = NetworkSources(
            cluster=cluster,
            local=local,
            engine=work if has_engine else None,
            docker=None,
        )
        volumes = with_cluster_volumes(cluster, tuple(volume_routes(Volumes(folder / "volumes"), work.list)))
        app = application(network_routes(parts), volumes, is_private=lambda _: True)
        client = await stack.enter_async_context(TestClient(TestServer(app)))
        yield Rig(client, manager, member, work, gateway, local)
