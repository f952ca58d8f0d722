"""Nodes with the front door wake services over their session, and report how long services are idle."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random

import pytest
from msgspec.structs import replace

from skep.agent.session.wakes import WakeCalls
from skep.aio.clock import SystemClock
from skep.aio.event import Event
from skep.errors import NotFound, PermissionDenied, SkepError
from skep.manager.telemetry.task_usages import TaskUsages
from skep.model.service import Service
from skep.model.task import TaskState
from skep.model.values.ids import NodeId, ServiceId
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import ManagerChannel
from tests.support.builders import a_service, a_service_spec, a_task
from tests.support.managers.wire_rig import MANAGER_ID, Cluster, a_session, a_worker, put

LABELS = {"skep.autoscale": "0..3", "skep.http": "a.example"}


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster().serving() as serving:
        yield serving


def sleeping(name: str, **labels: str) -> Service:
    return a_service(name, spec=replace(a_service_spec(name, replicas=0), labels={**LABELS, **labels}))


def replicas(cluster: Cluster, name: str) -> int:
    return cluster.store.view().get(Service, name).spec.replicas


async def put_door(cluster: Cluster, *nodes: NodeId) -> None:
    door = a_service("door", spec=replace(a_service_spec("door"), labels={"skep.door": "true"}))
    tasks = [
        a_task(f"door{number}", service=door, slot=number, node=node, state=TaskState.RUNNING)
        for number, node in enumerate(nodes, start=1)
    ]
    await put(cluster, door, *tasks)


async def wake(channel: ManagerChannel, session_id: str, *names: str) -> None:
    request = skep.WakeRequest(session_id=session_id, service_ids=names)
    await channel.call(methods.WAKE, request, timeout_s=5.0)


async def test_only_nodes_with_the_front_door_wake_services_and_only_those_at_zero(
    cluster: Cluster, tmp_path: Path
) -> None:
    pair = await a_worker(cluster, tmp_path)
    await put(cluster, sleeping("web"), sleeping("off", **{"skep.stopped": "true"}))
    async with a_session(cluster, pair) as (channel, session_id):
        with pytest.raises(PermissionDenied, match="only nodes with a task of the front door"):
            await wake(channel, session_id, "web")
        await put_door(cluster, pair.identity.node_id)
        with pytest.raises(SkepError):
            await wake(channel, "another", "web")
        assert replicas(cluster, "web") == 0
        await wake(channel, session_id, "off", "gone", "web")
        assert (replicas(cluster, "web"), replicas(cluster, "off")) == (1, 0)
        version = cluster.store.view().get(Service, "web").version
        await wake(channel, session_id, "web")
        assert cluster.store.view().get(Service, "web").version == version


class Held:
    """Requests that are held for the named services."""

    def __init__(self, *names: str) -> None:
        self.changed = Event()
        self.names = [*names]

    def held(self) -> list[ServiceId]:
        return [ServiceId(name) for name in self.names]

    def hold(self, *names: str) -> None:
        self.names = [*names]
        self.changed.set()


class QuickClock(SystemClock):
    """Pauses are so short that the node, which sends no heartbeats, is not down yet."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 50)


async def test_a_held_request_wakes_its_service_at_once_and_again_until_it_is_served(
    cluster: Cluster, tmp_path: Path
) -> None:
    pair = await a_worker(cluster, tmp_path)
    await put(cluster, *(sleeping(f"web{number}") for number in range(150)))
    await put_door(cluster, pair.identity.node_id)
    held = Held()

    async def until(name: str) -> None:
        async with asyncio.timeout(20):
            while replicas(cluster, name) != 1:  # noqa: ASYNC110  # the store is another process's to watch
                await asyncio.sleep(0.005)

    async with a_session(cluster, pair) as (channel, session_id), asyncio.TaskGroup() as group:
        calls = WakeCalls(channel, held, QuickClock(), Random(1).random)
        running = group.create_task(calls.run(session_id))
        held.hold("web0")
        await until("web0")
        await put(cluster, sleeping("web0"))  # it ended again, for example because its number was set to 0
        await until("web0")
        held.hold(*(f"web{number}" for number in range(150)))  # more than a call may have
        await until("web149")
        running.cancel()


async def test_idle_times_are_collected_by_node(cluster: Cluster, tmp_path: Path) -> None:
    usages = TaskUsages(cluster.store, NodeId(MANAGER_ID), cluster.dispatcher.measured, no_link)
    async with AsyncExitStack() as stack:
        nodes = []
        for number in (1, 2):
            pair = await a_worker(cluster, tmp_path / str(number))
            nodes.append(pair.identity.node_id)
            channel, session_id = await stack.enter_async_context(a_session(cluster, pair))
            call = await stack.enter_async_context(channel.stream(methods.HEARTBEATS))
            sent = skep.IdleService(service_id="web", milliseconds=1500 * number, node_id="made-up")
            if number == 2:
                sent.node_id = ""
            await call.send(skep.Heartbeat(session_id=session_id, idle=[sent]))
            await call.receive()
        assert (await usages.collect()).idle == {nodes[1]: {"web": 3.0}}, "a node speaks for itself alone"
        await call.send(skep.Heartbeat(session_id=session_id))
        await call.receive()
        assert (await usages.collect()).idle == {}


def no_link(manager: NodeId) -> ManagerChannel:
    raise NotFound(f"there is no other manager: {manager}")
