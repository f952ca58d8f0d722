"""A node measures the tasks that a manager asks about, and the manager takes its word for these alone."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from msgspec.structs import replace

from skep.manager.telemetry.task_usages import TaskUsages
from skep.model.door.traffic import BUCKETS
from skep.model.measures.readings import QueryAnswer, ServiceRequests
from skep.model.node import NodeRole
from skep.model.options.autoscaling import TaskUsage
from skep.model.staging.updates import TaskRequests
from skep.model.task import TaskState
from skep.model.values.ids import NodeId, ServiceId
from skep.security.tls import client_context
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import open_channel
from tests.support.builders import a_service, a_service_spec, a_task
from tests.support.managers.wire_rig import MANAGER_ID, Cluster, a_session, a_worker, put
from tests.support.store.store_transactions import eventually


@pytest.fixture
async def cluster():
    async with Cluster().serving() as serving:
        yield serving


async def test_the_response_to_a_heartbeat_names_the_tasks_and_the_next_one_is_believed_for_these(
    cluster, tmp_path
):
    pair = await a_worker(cluster, tmp_path)
    node = pair.identity.node_id
    spec = replace(a_service_spec("web"), labels={"skep.autoscale": "1..3"})
    scaled, plain = a_service("web", spec=spec), a_service("plain")
    mine = a_task("mine", service=scaled, node=node, state=TaskState.RUNNING)
    others = a_task("others", service=scaled, slot=2, node="elsewhere", state=TaskState.RUNNING)
    unscaled = a_task("unscaled", service=plain, node=node, state=TaskState.RUNNING)
    await put(cluster, scaled, plain, mine, others, unscaled)
    async with a_session(cluster, pair) as (channel, session_id), channel.stream(methods.HEARTBEATS) as call:
        async with asyncio.timeout(20):
            # The list is renewed every few seconds; a silent node would be down by then.
            measured: list[str] = []
            while not measured:
                await call.send(skep.Heartbeat(session_id=session_id))
                measured = list((await call.receive()).measured)
                await asyncio.sleep(0.02)
        assert measured == ["mine"]
        reported = [
            skep.TaskUsage(task_id=id, nano_cpus=7, memory_bytes=8)
            for id in ("mine", "others", "unscaled", "made-up")
        ]
        await call.send(skep.Heartbeat(session_id=session_id, usages=reported))
        await call.receive()
        assert cluster.dispatcher.measured.present() == {"mine": TaskUsage(nano_cpus=7, memory_bytes=8)}
        absurd = [skep.TaskUsage(task_id="mine", nano_cpus=2**63)]
        await call.send(skep.Heartbeat(session_id=session_id, usages=absurd))
        await call.receive()
        assert cluster.dispatcher.measured.present() == {}
        # A node of an earlier version: no reports, and nothing is measured.
        await call.send(skep.Heartbeat(session_id=session_id))
        await call.receive()
        own = TaskUsages(cluster.store, NodeId(MANAGER_ID), cluster.dispatcher.measured, no_link)
        assert (await own.collect()).usages == {}


async def a_door(cluster, *nodes: str) -> None:
    """Run a task of the front door on ``nodes``."""
    door = a_service("door", spec=replace(a_service_spec("door"), labels={"skep.door": "true"}))
    tasks = [
        a_task(f"door{number}", service=door, slot=number, node=node, state=TaskState.RUNNING)
        for number, node in enumerate(nodes, start=1)
    ]
    await put(cluster, door, *tasks)
    await eventually(lambda: door.id in cluster.dispatcher.measured.doors)


async def test_requests_over_front_doors_of_several_nodes_are_added(cluster, tmp_path):
    here = cluster.dispatcher
    own = TaskUsages(cluster.store, NodeId(MANAGER_ID), here.measured, no_link)
    async with AsyncExitStack() as stack:
        pairs = [await a_worker(cluster, tmp_path / str(number)) for number in (1, 2, 3)]
        await a_door(cluster, *(pair.identity.node_id for pair in pairs[1:]))
        for number, pair in zip((1000, 1, 2), pairs, strict=True):  # the first one has no proxy
            channel, session_id = await stack.enter_async_context(a_session(cluster, pair))
            call = await stack.enter_async_context(channel.stream(methods.HEARTBEATS))
            sent = skep.TaskRequests(task_id="t1", requests=10, errors=number, milliseconds=50)
            await call.send(skep.Heartbeat(session_id=session_id, requests=[sent]))
            await call.receive()
        counted = TaskRequests(requests=20, errors=3, milliseconds=100)
        assert await own.collect_requests() == {"t1": counted}
        await call.send(skep.Heartbeat(session_id=session_id))
        await call.receive()
        assert (await own.collect_requests())["t1"].requests == 10


async def test_requests_by_route_are_added_over_nodes_and_odd_ones_are_left_out(cluster, tmp_path):
    own = TaskUsages(cluster.store, NodeId(MANAGER_ID), cluster.dispatcher.measured, no_link)
    fast, odd = [0, 9, *[0] * (BUCKETS - 2)], [1]
    async with AsyncExitStack() as stack:
        pairs = [await a_worker(cluster, tmp_path / str(number)) for number in (1, 2, 3)]
        await a_door(cluster, *(pair.identity.node_id for pair in pairs[1:]))
        for pair in pairs:  # the first one has no proxy
            channel, session_id = await stack.enter_async_context(a_session(cluster, pair))
            call = await stack.enter_async_context(channel.stream(methods.HEARTBEATS))
            sent = [
                skep.RouteTraffic(
                    service_id="web",
                    route="a.example",
                    milliseconds=60_000,
                    requests=10,
                    errors=1,
                    buckets=fast,
                ),
                skep.RouteTraffic(service_id="web", route="b.example", milliseconds=1, buckets=odd),
                skep.RouteTraffic(service_id="web", route="\x1b[2J", milliseconds=1, buckets=fast),
            ]
            await call.send(skep.Heartbeat(session_id=session_id, routes=sent))
            await call.receive()
        [route] = await own.collect_routes()
        assert (route.route, route.requests, route.errors, route.seconds) == ("a.example", 20, 2, 60.0)
        assert route.buckets[1] == 18
        await call.send(skep.Heartbeat(session_id=session_id))
        await call.receive()
        assert (await own.collect_routes())[0].requests == 10


async def test_requests_of_services_are_known_by_node_and_other_managers_can_collect_everything(
    cluster, tmp_path
):
    pair = await a_worker(cluster, tmp_path)
    node, web = pair.identity.node_id, ServiceId("web")
    answers = {web: {"query": QueryAnswer(problem="timeout")}}
    cluster.dispatcher.measured.publish(answers)
    async with a_session(cluster, pair) as (channel, session_id), channel.stream(methods.HEARTBEATS) as call:
        idle = skep.ServiceRequests(service_id="web")
        most = skep.RouteTraffic(
            service_id="web", route="a", milliseconds=1, requests=2**64 - 1, buckets=[0] * BUCKETS
        )
        counted = [skep.TaskRequests(task_id="t", requests=2**64 - 1, milliseconds=2**64 - 1)] * 2
        sent = skep.Heartbeat(
            session_id=session_id,
            service_requests=[idle],
            routes=[most, most],
            requests=counted,
            idle=[skep.IdleService(service_id="web", milliseconds=2**64 - 1)],
        )
        await call.send(sent)
        await call.receive()
        own = TaskUsages(cluster.store, NodeId(MANAGER_ID), cluster.dispatcher.measured, no_link)
        assert (await own.collect()).requests == {}, "the node has no proxy"
        await a_door(cluster, node)
        collected = await own.collect()
        assert collected.requests == {web: {node: ServiceRequests()}}
        assert collected.answers == answers
        other = client_context(cluster.pair(MANAGER_ID, NodeRole.MANAGER))
        async with (
            open_channel(cluster.address, other, "swarm-manager") as to_manager,
            to_manager.stream(methods.COLLECT_USAGES) as asked,
        ):
            await asked.send(skep.CollectUsagesRequest(), end=True)
            messages = [message async for message in asked]
        assert [one.node_id for message in messages for one in message.service_requests] == [node]
        assert [one.problem for message in messages for one in message.answers] == ["timeout"]
        await call.send(skep.Heartbeat(session_id=session_id))
        await call.receive()
        assert (await own.collect()).requests == {}, "not known, which is not zero"


def no_link(manager: NodeId):
    raise AssertionError(f"there is no other manager: {manager}")
