"""A task's stop is held back until no node sends it new connections; over real mutual TLS on loopback."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
from msgspec.structs import replace

from skep.agent.session.managers import KnownManager
from skep.aio.clock import SystemClock
from skep.dataplane.tables.files import StoredTables
from skep.dataplane.tables.network_tables import NetworkTables
from skep.errors import Unavailable
from skep.manager.discovery.draining import Draining
from skep.manager.discovery.loop import Discovery
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer
from skep.model.networks.tables import NetworkTable
from skep.model.node import ManagerStatus, Node, NodeRole, NodeSpec
from skep.model.service import Service
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.values.ids import NetworkId, NodeId, new_id
from skep.model.values.times import Timestamp
from skep.security.keypair import KeyPair
from skep.security.tls import MANAGER_NAME, ServerTls, client_context
from skep.wire.client import ManagerChannel, open_channel
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
from tests.support.networks.tables import a_member

NET = an_overlay("net1")
SECOND = NodeId("manager0000000000000000m2")
LONG = {"skep.drain": "60s"}


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster().serving() as serving:
        yield serving


class Consumer:
    """A node's data plane: received tables are not applied while the gate is shut."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.serving: set[str] = set()

    async def apply(
        self, node_id: NodeId, tables: Mapping[NetworkId, NetworkTable], changed: frozenset[NetworkId]
    ) -> None:
        await self.gate.wait()
        self.serving = {
            id for table in tables.values() for id, one in table.endpoints.items() if one.is_serving
        }


class Joined:
    """A node with the tables and assignments it receives."""

    def __init__(self, worker: FakeWorker, consumer: Consumer, network_tables: NetworkTables) -> None:
        self.worker = worker
        self.consumer = consumer
        self.network_tables = network_tables

    def desired(self, task: Task) -> TaskState:
        return self.worker.tasks[task.id].task.desired_state

    def is_serving_sent(self, task: Task) -> bool:
        table = self.network_tables.tables.get(NET.id)
        return table is not None and task.id in table.endpoints and table.endpoints[task.id].is_serving


@asynccontextmanager
async def joined(pair: KeyPair, directory: Path, manager: KnownManager) -> AsyncIterator[Joined]:
    clock, worker, consumer = SystemClock(), FakeWorker(), Consumer()
    network_tables = NetworkTables(
        StoredTables(None, clock), (consumer,), a_member(), clock, Random(1).random
    )
    running = asyncio.create_task(network_tables.run())
    directory.mkdir()
    try:
        async with an_agent_of([manager], pair, directory, worker, Random(1), tables=network_tables):
            yield Joined(worker, consumer, network_tables)
    finally:
        running.cancel()
        await asyncio.wait([running])


@asynccontextmanager
async def two_nodes(
    cluster: Cluster, directory: Path, other: KnownManager | None = None
) -> AsyncIterator[tuple[Joined, Joined]]:
    """``n1`` with the cluster's manager, ``n2`` with it or with ``other``."""
    own = KnownManager(MANAGER_ID, cluster.address)
    await put(cluster, NET, Node(id=NodeId("n1")), Node(id=NodeId("n2")))
    async with (
        joined(cluster.pair("n1"), directory / "n1", own) as first,
        joined(cluster.pair("n2"), directory / "n2", other or own) as second,
    ):
        yield first, second


async def a_used_task(cluster: Cluster, first: Joined, second: Joined, labels: Mapping[str, str]) -> Task:
    """A task that runs on n1, and that both nodes send connections to; n2 has a task of its own on the network."""
    web = a_service("web", replicas=2)
    web = replace(web, spec=replace(web.spec, labels=labels))

    def placed(node: str, number: int) -> Task:
        place = NetworkAttachment(network=NET, addresses=(f"10.0.1.{number}/24",))
        return replace(a_task(new_id(), node=node, service=web, slot=number), networks_attachments=(place,))

    task = placed("n1", 2)
    await put(cluster, web, task, placed("n2", 3))
    await until(lambda: task.id in first.consumer.serving and task.id in second.consumer.serving)
    await until(lambda: task.id in first.worker.tasks)
    return task


async def stop(cluster: Cluster, task: Task, desired: TaskState = TaskState.SHUTDOWN) -> None:
    await cluster.store.update(lambda tx: tx.put(replace(tx.get(Task, task.id), desired_state=desired)))


async def test_a_task_is_stopped_after_every_node_has_removed_its_backend(
    cluster: Cluster, tmp_path: Path
) -> None:
    async with two_nodes(cluster, tmp_path) as (first, second):
        task = await a_used_task(cluster, first, second, LONG)
        second.consumer.gate.clear()
        await stop(cluster, task)
        await until(lambda: task.id not in first.consumer.serving)
        await until(lambda: not second.is_serving_sent(task))
        # Other assignments reach the node at once.
        another = a_task(new_id(), node="n1", state=TaskState.ASSIGNED)
        await put(cluster, another)
        await until(lambda: another.id in first.worker.tasks)
        assert task.id in second.consumer.serving
        assert first.desired(task) is TaskState.RUNNING
        second.consumer.gate.set()
        await until(lambda: first.desired(task) is TaskState.SHUTDOWN)
        assert task.id not in second.consumer.serving


async def test_a_stop_is_held_back_for_no_longer_than_the_service_says(
    cluster: Cluster, tmp_path: Path
) -> None:
    async with two_nodes(cluster, tmp_path) as (first, second):
        task = await a_used_task(cluster, first, second, {"skep.drain": "300ms"})
        second.consumer.gate.clear()
        began = asyncio.get_running_loop().time()
        await stop(cluster, task)
        await until(lambda: first.desired(task) is TaskState.SHUTDOWN)
        assert asyncio.get_running_loop().time() - began >= 0.3
        assert task.id in second.consumer.serving


async def test_a_drain_that_fails_unexpectedly_delays_one_stop_and_ends_nothing(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise KeyError("net1")

    async with two_nodes(cluster, tmp_path) as (first, second):
        task = await a_used_task(cluster, first, second, LONG)
        second.consumer.gate.clear()
        with monkeypatch.context() as patch:
            patch.setattr(cluster.discovery, "wait_not_serving", broken)
            await stop(cluster, task)
            await until(lambda: first.desired(task) is TaskState.SHUTDOWN)
        another = a_task(new_id(), node="n1", state=TaskState.ASSIGNED)
        await put(cluster, another)
        await until(lambda: another.id in first.worker.tasks)


@pytest.mark.parametrize(
    "why", ["the service goes", "no draining", "it ended", "its record goes", "the user is gone"]
)
async def test_a_stop_is_not_delayed_when_that_helps_no_client(
    cluster: Cluster, tmp_path: Path, why: str
) -> None:
    labels = {"skep.drain": "0s"} if why == "no draining" else LONG
    async with two_nodes(cluster, tmp_path) as (first, second):
        task = await a_used_task(cluster, first, second, labels)
        second.consumer.gate.clear()
        if why == "the service goes":
            removed_at = Timestamp("2026-01-01T00:00:00Z")
            await cluster.store.update(
                lambda tx: tx.put(replace(tx.get(Service, "web"), removed_at=removed_at))
            )
        await stop(cluster, task)
        if why == "it ended":
            await until(lambda: not second.is_serving_sent(task))
            first.worker.report(task.id, TaskState.FAILED)
        if why == "its record goes":
            await cluster.store.update(lambda tx: tx.delete(Task, task.id))
            await until(lambda: task.id not in first.worker.tasks)
            return
        if why == "the user is gone":
            await until(lambda: not second.is_serving_sent(task))
            await cluster.store.update(lambda tx: tx.delete(Node, "n2"))
        await until(lambda: first.desired(task) is TaskState.SHUTDOWN)
        assert task.id in second.consumer.serving


@asynccontextmanager
async def a_second_manager(cluster: Cluster) -> AsyncIterator[str]:
    """Another manager on the same store; gives its address."""
    clock = SystemClock()

    def unreachable(manager: NodeId) -> ManagerChannel:
        raise Unavailable(f"manager {manager} cannot be reached")

    dispatcher: Dispatcher
    discovery = Discovery(
        cluster.store, SECOND, lambda node, session: dispatcher.session(node, session), clock
    )
    draining = Draining(cluster.store, SECOND, discovery, unreachable, clock, Random(1))
    own = ManagerPeer(node_id=SECOND, addr="127.0.0.1:1")
    dispatcher = Dispatcher(cluster.store, own, clock, new_id, Random(1), wait_unused=draining.wait_unused)
    tls = ServerTls(cluster.pair(SECOND, NodeRole.MANAGER))
    handlers = [*dispatcher.services(), *discovery.services(), *draining.services()]
    status = ManagerStatus(addr="127.0.0.1:1")
    await put(cluster, Node(id=SECOND, spec=NodeSpec(role=NodeRole.MANAGER), manager_status=status))
    async with (
        serve(
            with_all_methods(handlers), host="127.0.0.1", port=0, tls=tls.front, cluster_id=cluster.id
        ) as bound,
        asyncio.TaskGroup() as group,
    ):
        running = [group.create_task(dispatcher.run()), group.create_task(discovery.run())]
        yield f"127.0.0.1:{bound.port}"
        for task in running:
            task.cancel()


async def test_nodes_of_other_managers_are_waited_for_too(cluster: Cluster, tmp_path: Path) -> None:
    channels: dict[NodeId, ManagerChannel] = {}

    def channel(manager: NodeId) -> ManagerChannel:
        if manager not in channels:
            raise Unavailable(f"manager {manager} cannot be reached")
        return channels[manager]

    cluster.draining.channel = channel
    own = client_context(cluster.pair(MANAGER_ID, NodeRole.MANAGER))
    async with (
        a_second_manager(cluster) as address,
        open_channel(address, own, MANAGER_NAME) as link,
        two_nodes(cluster, tmp_path, KnownManager(SECOND, address)) as (first, second),
    ):
        task = await a_used_task(cluster, first, second, LONG)
        second.consumer.gate.clear()
        await stop(cluster, task)
        await until(lambda: task.id not in first.consumer.serving)
        await until(lambda: not second.is_serving_sent(task))
        assert first.desired(task) is TaskState.RUNNING  # the link is away
        channels[SECOND] = link
        await until(
            lambda: (
                cluster.draining.acknowledged
                and next(iter(cluster.draining.acknowledged.values())).one_at_a_time.locked()
            )
        )
        assert first.desired(task) is TaskState.RUNNING  # it is there, and the other's node is not ready
        second.consumer.gate.set()
        await until(lambda: first.desired(task) is TaskState.SHUTDOWN)
        assert task.id not in second.consumer.serving
