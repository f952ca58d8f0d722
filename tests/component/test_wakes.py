"""Nodes with the front door wake services over their session, and report how long services are idle."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
from msgspec.structs import replace

from skep.agent.session.managers import KnownManager
from skep.agent.session.wakes import REPEAT_S, Turns, WakeCalls
from skep.aio.clock import SystemClock
from skep.aio.event import Event
from skep.errors import NotFound, PermissionDenied, SkepError
from skep.manager.control.quotas import set_quota
from skep.manager.dispatcher.usages import IDLE_S_MAX, MeasuredTasks
from skep.manager.queries.node_questions import NodeQuestions
from skep.manager.telemetry.task_usages import TaskUsages
from skep.model.quota import QuotaSpec
from skep.model.service import Service
from skep.model.task import TaskState
from skep.model.values.ids import NodeId, ServiceId, new_id
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import Timestamp
from skep.node.container_access import TaskContainers
from skep.node.events import NodeEvents
from skep.store.level import USERS
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import ManagerChannel
from tests.component.test_one_exchange import OneContainer
from tests.support.builders import a_service, a_service_spec, a_task
from tests.support.managers.fake_worker import FakeWorker
from tests.support.managers.wire_rig import (
    MANAGER_ID,
    Cluster,
    a_session,
    a_worker,
    an_agent_of,
    put,
    until,
)

WEB = ServiceId("web")
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


async def test_a_wake_that_a_quota_refuses_is_not_tried_again_at_once(
    cluster: Cluster, tmp_path: Path
) -> None:
    pair = await a_worker(cluster, tmp_path)
    stack = {STACK_LABEL: "shop"}
    other = a_service("db", spec=replace(a_service_spec("db"), labels=stack))
    await put(cluster, sleeping("web", **stack), other)
    await put_door(cluster, pair.identity.node_id)
    await cluster.store.update(lambda tx: tx.raise_level(USERS))
    quota = QuotaSpec(name="shop", tasks=1)
    await cluster.store.update(set_quota, quota, new_id=new_id, now=Timestamp("2026-01-01T00:00:00Z"))
    async with a_session(cluster, pair) as (channel, session_id):
        await wake(channel, session_id, "web")
        await cluster.store.update(lambda tx: tx.delete(Service, other.id))
        await wake(channel, session_id, "web")
        assert replicas(cluster, "web") == 0


class Held:
    """Requests that are held for the named services."""

    def __init__(self, *names: str) -> None:
        self.changed = Event()
        self.names = [*names]
        self.served = list[ServiceId]()

    def take_served(self) -> list[ServiceId]:
        found, self.served = self.served, []
        return found

    def held(self) -> list[ServiceId]:
        return [ServiceId(name) for name in self.names]

    def hold(self, *names: str) -> None:
        self.names = [*names]
        self.changed.set()


class QuickClock(SystemClock):
    """Pauses are so short that the node, which sends no heartbeats, is not down yet."""

    def monotonic(self) -> float:
        return 50 * super().monotonic()

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


class CountingChannel:
    """A manager that wakes nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.services: list[str] = []
        self.clock = QuickClock()

    async def call(self, _: object, request: skep.WakeRequest, **__: object) -> None:
        self.times.append(self.clock.monotonic())
        self.services += request.service_ids


@pytest.mark.parametrize(("services", "calls_max"), [(1, 5), (1000, 70)])
async def test_clients_that_come_and_go_cause_few_calls(services: int, calls_max: int) -> None:
    channel, held = CountingChannel(), Held()
    calls = WakeCalls(cast("ManagerChannel", channel), held, channel.clock, Random(1).random)
    running = asyncio.create_task(calls.run("s"))
    number, until = 0, channel.clock.monotonic() + 20
    while channel.clock.monotonic() < until:
        number += 1
        held.hold(f"web{number % services}")
        await asyncio.sleep(0.0005)
        held.names = []
    running.cancel()
    assert 1 <= len(channel.times) <= calls_max
    assert channel.services.count("web0") <= 5


async def test_a_node_asks_again_only_after_growing_times() -> None:
    turns, asked = Turns(lambda: 0.5), list[float]()
    for tenth in range(350):
        if turns.due([WEB], tenth / 10):
            asked.append(tenth / 10)
    assert asked == [0.0, 2.0, 6.0, 14.0, 22.0, 30.0]
    assert turns.due([], 34.9) == []
    assert turns.due([WEB], 60.0) == [WEB], "a later request wakes at once"
    assert turns.next_due([WEB], 60.0) == 62.0


async def test_a_service_that_was_served_since_its_last_wake_is_woken_at_once() -> None:
    turns = Turns(lambda: 0.5)
    assert turns.due([WEB, ServiceId("other")], 0.0)
    assert turns.due([WEB], 1.0) == []
    turns.forget([WEB])
    assert turns.due([WEB, ServiceId("other")], 1.0) == [WEB], "the other one has not been served"
    assert turns.next_due([WEB], 1.0) == 3.0, "its interval does not grow"

    channel, held = CountingChannel(), Held("web")
    calls = WakeCalls(cast("ManagerChannel", channel), held, channel.clock, Random(1).random)
    running = asyncio.create_task(calls.run("s"))
    await until(lambda: len(channel.times) == 1)
    held.served = [WEB]
    held.hold("web")
    await until(lambda: len(channel.times) == 2)
    running.cancel()
    assert channel.times[1] - channel.times[0] < REPEAT_S / 2


class LaterClock(SystemClock):
    """A clock that is ahead by more than a report may be old."""

    def monotonic(self) -> float:
        return super().monotonic() + IDLE_S_MAX + 0.1


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
        later = MeasuredTasks(cluster.store, cluster.dispatcher.sessions, LaterClock())
        assert later.idle() == {}, "a request may have come since a report of a while ago"
        await call.send(skep.Heartbeat(session_id=session_id))
        await call.receive()
        assert (await usages.collect()).idle == {}


class Door:
    """A front door whose services have been idle for a minute."""

    def __init__(self) -> None:
        self.readings = 0

    async def read_statistics(self) -> None:
        self.readings += 1

    def idle(self) -> dict[ServiceId, float]:
        return {WEB: 60.0}


async def test_the_leader_asks_the_doors_of_nodes_for_what_they_read_now(
    cluster: Cluster, tmp_path: Path
) -> None:
    door, pair = Door(), await a_worker(cluster, tmp_path)
    access = TaskContainers(cast("Any", OneContainer()), NodeEvents(SystemClock()), cast("Any", door))
    questions = NodeQuestions(cast("Any", cluster).tunnels, cluster.store.view, Random(1), no_right)
    peers = [KnownManager(MANAGER_ID, cluster.address)]
    async with an_agent_of(peers, pair, tmp_path, FakeWorker(), Random(1), containers=access) as agent:
        await until(lambda: agent.node_id in cast("Any", cluster).tunnels.streams)
        asked = {agent.node_id, NodeId("removed")}
        assert await questions.ask_doors(asked) == {agent.node_id: {"web": 60.0}}
        assert door.readings == 1
    assert await questions.ask_doors(asked) == {}, "a node that does not answer is no idle one"


def no_right(*_: object) -> str:
    return ""


def no_link(manager: NodeId) -> ManagerChannel:
    raise NotFound(f"there is no other manager: {manager}")
