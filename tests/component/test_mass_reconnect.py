"""More nodes than a manager can accept at once: which of them get a retry time, and their cost on the loop."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from sim.initial_state import CLUSTER
from skep.aio.clock import SystemClock
from skep.errors import ResourceExhausted, RetryLater
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.node_sessions import admission
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer
from skep.model.node import Node, NodeRole, NodeState
from skep.model.values.ids import NodeId, new_id
from skep.security.identity import NodeIdentity
from skep.security.tls import client_context
from skep.store.memory import MemoryStore
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from skep.wire.client import open_channel
from tests.support.builders import a_node
from tests.support.managers.counted_calls import calls_of
from tests.support.managers.wire_rig import Cluster, Random, a_worker, an_agent, until

HELD_S_MAX = 0.25


@pytest.fixture
async def cluster():
    async with Cluster().serving() as serving:
        yield serving


@asynccontextmanager
async def full(cluster: Cluster) -> AsyncIterator[AsyncExitStack]:
    """Other nodes register and do not come to an end until the stack is closed."""
    async with AsyncExitStack() as others:
        for _ in range(admission.AT_ONCE_MAX):
            await others.enter_async_context(cluster.dispatcher.registrar.queue.slot())
        yield others


async def test_a_refusal_has_a_retry_time_and_counts_as_a_failure_for_older_nodes(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with (
        full(cluster),
        open_channel(cluster.address, client_context(pair), "swarm-manager") as channel,
        channel.stream(methods.SESSION) as call,
    ):
        await call.send(pb.SessionRequest(), end=True)
        with pytest.raises(ResourceExhausted, match="retry in") as refused:
            await call.receive()
    assert isinstance(refused.value, RetryLater)
    assert admission.SHORTEST_S <= refused.value.after_s <= admission.LONGEST_S


async def test_a_node_that_is_sent_away_retries_on_the_same_connection(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    connect = cluster.bound.server.new_protocol

    async def make_room(others: AsyncExitStack) -> None:
        await until(cluster.dispatcher.registrar.queue.is_overloaded)
        await until(lambda: cluster.dispatcher.registrar.queue.last_retry_at > 0)
        await others.aclose()

    with calls_of(connect) as connections:
        async with full(cluster) as others:
            room = asyncio.create_task(make_room(others))
            async with an_agent(cluster, pair, tmp_path) as (agent, _):
                await room
                assert cluster.node(agent.node_id).status.state is NodeState.READY
                assert len(connections.of(connect)) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_five_thousand_at_once_do_not_hold_the_loop_and_are_all_in():
    """Measured is the processor time between two turns of a task that always wants one."""
    store = MemoryStore(SystemClock())
    names = [NodeId(f"node{number:021d}") for number in range(5000)]
    await store.update_each(lambda tx, name: tx.put(a_node(name)), names)
    gc.collect()
    gc.freeze()  # as a manager does once it has loaded
    own = ManagerPeer(node_id=NodeId("m1"), addr="127.0.0.1:1")
    dispatcher = Dispatcher(store, own, SystemClock(), new_id, Random(1))
    held_s = 0.0

    async def measure() -> None:
        nonlocal held_s
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.001)
            held_s = max(held_s, time.thread_time() - before)

    async def come(id: NodeId) -> None:
        identity = NodeIdentity(node_id=id, cluster_id=CLUSTER, role=NodeRole.WORKER)
        caller = Caller(identity=identity, address="127.0.0.1", disconnect=lambda: None)
        while True:
            try:
                await dispatcher.registrar.register(pb.SessionRequest(), caller)
            except RetryLater as later:
                await asyncio.sleep(later.after_s)
            else:
                return

    async with asyncio.TaskGroup() as group:
        measuring = group.create_task(measure())
        async with asyncio.TaskGroup() as coming:
            for number, id in enumerate(names):
                coming.create_task(come(id))
                if number % 50 == 49:
                    await asyncio.sleep(0)  # as connections come in
        measuring.cancel()
    gc.unfreeze()
    assert all(store.view().get(Node, id).session for id in names)
    assert held_s < HELD_S_MAX
