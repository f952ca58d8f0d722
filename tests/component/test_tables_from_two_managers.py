"""A node that changes its manager, whatever happens meanwhile: its tables never go back and miss nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from random import Random

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from skep.agent.session.managers import KnownManager
from skep.aio.clock import SystemClock
from skep.dataplane.tables.files import StoredTables
from skep.dataplane.tables.network_tables import NetworkTables
from skep.errors import Unavailable
from skep.manager.discovery.loop import Discovery
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer
from skep.model.networks.tables import TableSet
from skep.model.node import ManagerStatus, Node, NodeRole, NodeSpec
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.values.ids import NodeId, new_id
from skep.security.tls import ServerTls
from skep.store.memory import MemoryStore
from skep.wire.server import serve
from tests.support.builders import a_service, a_task, an_overlay
from tests.support.managers.wire_rig import (
    MANAGER_ID,
    Cluster,
    FakeWorker,
    an_agent_of,
    put,
    until,
    with_all_methods,
)
from tests.support.networks.derived_tables import table_of
from tests.support.networks.tables import a_member

NET = an_overlay("net1", subnet="10.0.0.0/16")
SECOND = NodeId("manager0000000000000000m2")
MOVES = 6


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster().serving() as serving:
        yield serving


@asynccontextmanager
async def another_manager(cluster: Cluster) -> AsyncIterator[tuple[Dispatcher, str]]:
    """With a replica of its own of the same cluster; gives its address."""
    clock = SystemClock()
    store = MemoryStore(clock, cluster=cluster.store.cluster)
    dispatcher: Dispatcher
    discovery = Discovery(store, SECOND, lambda node, session: dispatcher.session(node, session), clock)
    dispatcher = Dispatcher(store, ManagerPeer(node_id=SECOND, addr=""), clock, new_id, Random(1))
    tls = ServerTls(cluster.pair(SECOND, NodeRole.MANAGER))
    handlers = with_all_methods([*dispatcher.services(), *discovery.services()])
    async with (
        serve(handlers, host="127.0.0.1", port=0, tls=tls.front, cluster_id=cluster.id) as bound,
        asyncio.TaskGroup() as group,
    ):
        address = f"127.0.0.1:{bound.port}"
        dispatcher.state.own = ManagerPeer(node_id=SECOND, addr=address)
        status = ManagerStatus(addr=address)
        await put(cluster, Node(id=SECOND, spec=NodeSpec(role=NodeRole.MANAGER), manager_status=status))
        running = [group.create_task(dispatcher.run()), group.create_task(discovery.run())]
        yield dispatcher, address
        for task in running:
            task.cancel()


class Recording(NetworkTables):
    """Records the tables it receives."""

    def __init__(self) -> None:
        clock = SystemClock()
        super().__init__(StoredTables(None, clock), (), a_member(), clock, Random(1).random)
        self.sets: list[TableSet] = []

    def update(self, changed: TableSet, incarnation: int) -> None:
        self.sets.append(changed)
        super().update(changed, incarnation)


async def test_tables_continue_at_another_manager(cluster: Cluster, tmp_path: Path) -> None:
    web = a_service("web", replicas=100)
    numbers = count()

    def placed(node: str) -> Task:
        number = next(numbers)
        address = f"10.0.{number // 250}.{number % 250 + 2}/16"
        place = NetworkAttachment(network=NET, addresses=(address,))
        task = a_task(new_id(), node=node, service=web, state=TaskState.RUNNING)
        return replace(task, networks_attachments=(place,))

    await put(cluster, NET, web, Node(id=NodeId("n1")), Node(id=NodeId("n2")), placed("n1"))
    network_tables = Recording()
    keeping = asyncio.create_task(network_tables.run())
    stop = asyncio.Event()

    async def disturb() -> None:
        """Something changes all the time."""
        while not stop.is_set():
            task = placed("n2")
            await put(cluster, task)
            await put(cluster, replace(task, desired_state=TaskState.SHUTDOWN))
            await asyncio.sleep(0.01)

    with capture_logs() as logs:
        async with another_manager(cluster) as (second, address), asyncio.TaskGroup() as group:
            managers = [KnownManager(MANAGER_ID, cluster.address), KnownManager(SECOND, address)]
            dispatchers = {MANAGER_ID: cluster.dispatcher, SECOND: second}
            pair = cluster.pair("n1")
            async with an_agent_of(managers, pair, tmp_path, FakeWorker(), Random(1), tables=network_tables):
                disturbing = group.create_task(disturb())
                owners = []
                for _ in range(MOVES):
                    session = cluster.node(NodeId("n1")).session
                    assert session is not None
                    owners.append(session.manager_id)
                    sets = sum(one.is_complete for one in network_tables.sets)
                    dispatchers[session.manager_id].sessions.redirect(
                        NodeId("n1"), Unavailable("go on"), now=0.0, grace_s=1e9
                    )
                    await until(lambda sets=sets: sum(one.is_complete for one in network_tables.sets) > sets)
                stop.set()
                await disturbing
                await until(
                    lambda: (
                        replace(network_tables.tables[NET.id], revision=0)
                        == replace(table_of(cluster.view, NET), revision=0)
                    )
                )
    keeping.cancel()
    await asyncio.wait([keeping])
    revisions = [one.revision for one in network_tables.sets]
    assert revisions == sorted(revisions)
    assert len(set(owners)) == 2
    assert not [entry for entry in logs if "behind" in str(entry.get("error", ""))]
