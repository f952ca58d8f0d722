"""Sessions between nodes and a manager: registering, heartbeats, silence."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from random import Random
from typing import cast

import msgspec
import pytest
from structlog.testing import capture_logs

from skep.agent.session.managers import KnownManager
from skep.aio.clock import SystemClock
from skep.errors import (
    InvalidArgument,
    PermissionDenied,
    Unavailable,
)
from skep.manager.nodes.heartbeats import AWAY_GRACE_S
from skep.model.node import Node, NodeState
from skep.model.values.ids import NodeId
from skep.security import keypair
from skep.security.authority import Authority
from skep.security.trust import tls_info
from skep.store.interface import Updated
from skep.store.memory import MemoryStore
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.client import ManagerChannel
from tests.support.managers.wire_rig import (
    MANAGER_ID,
    Cluster,
    FakeWorker,
    a_session,
    a_worker,
    an_agent,
    an_agent_of,
    put,
    until,
)


@pytest.fixture
async def cluster():
    async with Cluster().serving() as serving:
        yield serving


async def test_a_node_that_registers_is_ready_and_described(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, _):
        node = cluster.node(agent.node_id)
        assert node.status.state is NodeState.READY
        assert node.status.addr == "127.0.0.1"
        assert node.description.hostname == "worker"
        assert node.description.tls_info.trust_root == cluster.authority.root_pem.decode()
        assert node.session is not None
        assert node.session.manager_id == MANAGER_ID
        assert [peer.addr for peer in agent.managers] == [cluster.address]


async def test_a_node_takes_no_session_from_a_manager_that_is_not_in_its_list(cluster, tmp_path):
    """As from one that was removed, and whose certificate is still valid."""
    pair = await a_worker(cluster, tmp_path)
    away = KnownManager(NodeId("m2"), "127.0.0.1:1")
    worker = FakeWorker()
    managers = [away, KnownManager(NodeId("m3"), cluster.address)]
    with capture_logs() as logs:
        # It registers in the end: none of the list responds, so all managers may have been replaced.
        async with an_agent_of(managers, pair, tmp_path, worker, Random(1)):
            pass
    refused = [one["error"] for one in logs if "which is not among the managers" in one.get("error", "")]
    assert refused == [
        f"{cluster.address} is manager {MANAGER_ID}, which is not among the managers of this cluster, instead of m3"
    ]


async def test_a_node_that_goes_silent_is_down_after_its_grace(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, _):
        await asyncio.sleep(0)
    assert cluster.node(agent.node_id).status.state is NodeState.READY  # a broken session is not a dead node
    await cluster.until(lambda view: view.get(Node, agent.node_id).status.state is NodeState.DOWN)
    assert cluster.node(agent.node_id).status.message == "heartbeat failure"


async def test_a_node_whose_process_ends_without_a_word_is_given_the_time_to_be_back(cluster, tmp_path):
    """The kernel closes the connection: the machine is there, and so are its containers."""
    pair = await a_worker(cluster, tmp_path)
    async with a_session(cluster, pair) as (channel, session_id), channel.stream(methods.HEARTBEATS) as call:
        await call.send(skep.Heartbeat(session_id=session_id))
        await call.receive()
        session = cluster.dispatcher.session(pair.identity.node_id, session_id)
        assert session.deadline - session.last_seen < 1
        killed(channel)
        await until(lambda: session.deadline - session.last_seen >= AWAY_GRACE_S)


async def test_a_process_that_leaves_a_manager_gets_no_more_time_than_any(cluster, tmp_path):
    """It lives, and resets its calls before it closes the connection: a one-way cut ends sessions like this."""
    pair = await a_worker(cluster, tmp_path)
    async with a_session(cluster, pair) as (channel, session_id), channel.stream(methods.HEARTBEATS) as call:
        await call.send(skep.Heartbeat(session_id=session_id))
        await call.receive()
        session = cluster.dispatcher.session(pair.identity.node_id, session_id)
    await until(lambda: not cluster.bound.connections)
    await cluster.until(lambda view: view.get(Node, pair.identity.node_id).status.state is NodeState.DOWN)
    assert session.deadline - session.last_seen < 1


def killed(channel: ManagerChannel) -> None:
    """Close the connection as the kernel does for a process that was killed: nothing more is sent on it."""
    channel._connection.abort()


async def test_a_node_that_returns_is_ready_again(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        pass
    await cluster.until(lambda view: view.get(Node, agent.node_id).status.state is NodeState.DOWN)
    async with an_agent(cluster, pair, tmp_path, worker):
        assert cluster.node(agent.node_id).status.state is NodeState.READY


@asynccontextmanager
async def beating(channel, session_id):
    async def beat() -> None:
        while True:
            await asyncio.sleep(0.1)
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest(session_id=session_id))

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()


async def heard_late(cluster, channel, node_id, session_id, *, rival: bool) -> tuple[str, list[NodeState]]:
    """Let a node's heartbeat come while its fall is being written; its session, and every state the store showed.

    ``rival``: another write comes first, so that the fall is decided on once more.
    """
    states: list[NodeState] = []
    being_written = asyncio.Event()
    other = MemoryStore(SystemClock(), cluster.store.cluster)

    def delay_s() -> float:
        being_written.set()
        return 0.3

    async with cluster.store.watch(Node) as watch:
        cluster.store.faults.delay_s = delay_s
        await being_written.wait()
        await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest(session_id=session_id))
        cluster.store.faults.delay_s = lambda: 0.0
        if rival:
            node = other.view().get(Node, node_id)
            status = msgspec.structs.replace(node.status, message="somebody else's word")
            await other.update(lambda tx: tx.put(msgspec.structs.replace(node, status=status)))
        with suppress(TimeoutError):
            async with beating(channel, session_id), asyncio.timeout(1.2):
                async for commit in watch:
                    states += [
                        cast("Node", cast("Updated", event).new).status.state for event in commit.events
                    ]
    return cluster.node(node_id).session.session_id, states


@pytest.mark.parametrize(("rival", "states"), [(True, []), (False, [NodeState.DOWN])])
async def test_a_heartbeat_while_the_node_is_marked_down_keeps_its_session(cluster, tmp_path, rival, states):
    """A write that comes too late is not repeated; one that is committed all the same is taken back."""
    pair = await a_worker(cluster, tmp_path)
    async with a_session(cluster, pair) as (channel, session_id):
        held, seen = await heard_late(cluster, channel, pair.identity.node_id, session_id, rival=rival)
    assert held == session_id
    assert [state for state in seen if state is NodeState.DOWN] == states
    assert seen[-1] is NodeState.READY


async def test_heartbeats_keep_a_node_ready(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, _):
        session = cluster.node(agent.node_id).session
        await asyncio.sleep(1.5)  # seven periods, twice the grace
        node = cluster.node(agent.node_id)
        assert node.status.state is NodeState.READY
        assert node.session == session


async def test_a_removed_node_gets_no_session(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    await cluster.store.update(lambda tx: tx.delete(Node, pair.identity.node_id))
    with pytest.raises(PermissionDenied, match="is not part of the swarm"):
        async with a_session(cluster, pair):
            pass


async def test_a_second_session_ends_the_first(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with (
        a_session(cluster, pair) as (channel, earlier),
        a_session(cluster, pair) as (_, later),
    ):
        assert earlier != later
        with pytest.raises(InvalidArgument, match="session invalid"):
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest(session_id=earlier))
        await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest(session_id=later))


async def test_a_manager_without_a_quorum_takes_no_session_and_gives_up_those_it_has(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, _):
        cluster.store.partition()
        await until(lambda: not agent.registered.is_set())
        cluster.store.heal()
        async with asyncio.timeout(10):
            await agent.registered.wait()


async def test_a_node_that_does_not_come_back_to_a_restarted_manager_is_down(tmp_path, monkeypatch):
    monkeypatch.setattr("skep.manager.nodes.heartbeats.RECOVERY_GRACE_S", 0.5)
    cluster = Cluster(heartbeat_s=0.1)
    async with AsyncExitStack() as agents, cluster.serving():
        pair = await a_worker(cluster, tmp_path)
        await agents.enter_async_context(an_agent(cluster, pair, tmp_path))
        # It outlived the manager: there was none to miss its heartbeats.
    assert cluster.node(pair.identity.node_id).status.state is NodeState.READY
    async with cluster.serving(cluster.port):
        await cluster.until(lambda view: view.get(Node, pair.identity.node_id).status.state is NodeState.DOWN)


async def test_a_node_that_is_asked_to_renews_its_certificate_and_keeps_its_session(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, _):
        node = cluster.node(agent.node_id)
        asked = msgspec.structs.replace(node.certificate, state="rotate")
        await put(cluster, msgspec.structs.replace(node, certificate=asked))
        await cluster.until(lambda view: view.get(Node, agent.node_id).certificate.state == "issued")
        await until(lambda: keypair.load(tmp_path).certificate_pem != pair.certificate_pem)
        assert cluster.node(agent.node_id).session == node.session


async def test_new_roots_reach_the_node(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path):
        both = cluster.authority.root_pem + Authority.create().root_pem
        await put(cluster, msgspec.structs.replace(cluster.swarm, tls_info=tls_info(both)))
        await until(lambda: keypair.load(tmp_path).root_pem == both)


async def test_a_node_that_stops_as_planned_is_waited_for_longer_than_one_that_falls_silent(
    cluster, tmp_path
):
    planned = await a_worker(cluster, tmp_path / "planned")
    sudden = await a_worker(cluster, tmp_path / "sudden")
    async with (
        an_agent(cluster, planned, tmp_path / "planned") as (leaving, _),
        an_agent(cluster, sudden, tmp_path / "sudden") as (dying, _),
    ):
        await leaving.session_state.announce_stop()
    await cluster.until(lambda view: view.get(Node, dying.node_id).status.state is NodeState.DOWN)
    assert cluster.node(leaving.node_id).status.state is NodeState.READY
    async with an_agent(cluster, planned, tmp_path / "planned") as (back, _):
        assert cluster.node(back.node_id).status.state is NodeState.READY
    await cluster.until(lambda view: view.get(Node, back.node_id).status.state is NodeState.DOWN)


async def test_a_node_that_leaves_its_cluster_has_no_session(cluster, tmp_path):
    """Its agent is cancelled, and the state outlives it."""
    async with an_agent(cluster, await a_worker(cluster, tmp_path), tmp_path) as (agent, _):
        state = agent.session_state
        assert state.has_session
    assert not state.has_session
    assert not agent.registered.is_set()
    with pytest.raises(Unavailable):
        state.channel.address  # noqa: B018
    async with asyncio.timeout(5):
        await state.wait_no_session()


async def test_a_load_goes_with_the_heartbeats_to_the_node_that_the_scheduler_sees(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    reported: list[float | None] = [None]
    async with an_agent(cluster, pair, tmp_path, load=lambda: reported[0]) as (agent, _):
        assert cluster.node(agent.node_id).load is None
        reported[0] = 0.634
        await cluster.until(lambda view: view.get(Node, agent.node_id).load is not None)
        assert cluster.node(agent.node_id).load == 0.6
        described = cluster.node(agent.node_id)
        assert (described.status.state, described.description.hostname) == (NodeState.READY, "worker")


async def test_a_manager_passes_over_what_a_heartbeat_says_in_fields_it_does_not_know(cluster, tmp_path):
    """As an older one does with the load, and SwarmKit's with everything of ours."""
    pair = await a_worker(cluster, tmp_path)
    async with (
        a_session(cluster, pair) as (channel, session_id),
        channel.stream(methods.HEARTBEATS) as call,
    ):
        odd = skep.Heartbeat.FromString(
            skep.Heartbeat(session_id=session_id, load=700).SerializeToString()
            + b"\xf8\x3f\x07"  # field 1023
        )
        async with asyncio.timeout(10):
            while cluster.node(pair.identity.node_id).load is None:
                await call.send(odd)
                reply = await call.receive()
                assert reply is not None
                await asyncio.sleep(reply.period.ToTimedelta().total_seconds())
        assert cluster.node(pair.identity.node_id).load == 0.7


async def test_a_node_that_heartbeats_as_engines_do_has_no_load(cluster, tmp_path):
    engine = await a_worker(cluster, tmp_path / "engine")
    ours = await a_worker(cluster, tmp_path / "ours")
    async with (
        a_session(cluster, engine) as (channel, session_id),
        an_agent(cluster, ours, tmp_path / "ours", load=lambda: 0.5) as (agent, _),
    ):
        await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest(session_id=session_id), timeout_s=5)
        await cluster.until(lambda view: view.get(Node, agent.node_id).load == 0.5)
        assert cluster.node(engine.identity.node_id).load is None
