"""Paths between nodes, from what nodes find to who takes tasks, over real mutual TLS on loopback."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random

import pytest
from msgspec.structs import replace

from skep.agent.agent import Agent
from skep.aio.clock import SystemClock
from skep.errors import InvalidArgument, RetryLater, SkepError, Unavailable
from skep.manager.probes.diagnostics import Diagnostics
from skep.manager.probes.loop import OverlayAvoidance
from skep.manager.probes.streams import REPORTS_MAX
from skep.model.networks.paths import DiagnosticsResult, PathCheck
from skep.model.node import FailingPath, Node, NodeRole, NodeState, NodeStatus
from skep.model.values.ids import NodeId
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import ManagerChannel
from tests.support.builders import a_docker_node
from tests.support.managers.wire_rig import MANAGER_ID, Cluster, a_session, a_worker, an_agent, put, until
from tests.support.networks.path_rig import ScriptedProbes, a_finding, a_report


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster().serving() as serving:
        yield serving


@asynccontextmanager
async def probing(
    cluster: Cluster, directory: Path, count: int
) -> AsyncIterator[list[tuple[Agent, ScriptedProbes]]]:
    """So many nodes that probe each other."""
    async with AsyncExitStack() as stack:
        nodes = []
        for number in range(count):
            home = directory / f"n{number}"
            home.mkdir()
            probes = ScriptedProbes()
            pair = await a_worker(cluster, home)
            agent, _ = await stack.enter_async_context(an_agent(cluster, pair, home, paths=probes))
            nodes.append((agent, probes))
        ids = {agent.node_id for agent, _ in nodes}
        await until(lambda: all(probes.peers == ids - {agent.node_id} for agent, probes in nodes))
        yield nodes


@asynccontextmanager
async def judging(cluster: Cluster) -> AsyncIterator[None]:
    running = asyncio.create_task(OverlayAvoidance(cluster.store, SystemClock(), Random(1)).run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.wait([running])


def failing(cluster: Cluster, id: NodeId) -> set[tuple[str, str]]:
    return {(path.peer, path.port) for path in cluster.node(id).failing_paths}


async def test_probe_targets_follow_nodes_that_come_and_go(cluster: Cluster, tmp_path: Path) -> None:
    async with probing(cluster, tmp_path, 2) as nodes:
        (one, probes), (other, _) = nodes
        requested = probes.requests[-1]
        assert requested is not None
        assert requested.node.node_id == one.node_id
        (peer,) = requested.peers
        assert (peer.node_id, peer.hostname, peer.data_path) == (other.node_id, "worker", "127.0.0.1")
        assert (peer.vxlan_port, peer.control, peer.gossip, peer.encrypted) == (4789, "", "", False)
        down = replace(cluster.node(other.node_id), status=NodeStatus(state=NodeState.DOWN))
        await put(cluster, down)
        await until(lambda: probes.peers == set())


async def test_a_pair_that_fails_is_written_and_the_later_node_is_cut_off_until_it_is_well(
    cluster: Cluster, tmp_path: Path
) -> None:
    async with probing(cluster, tmp_path, 3) as nodes, judging(cluster):
        (one, of_one), (other, of_other), (third, _) = nodes
        a, b = one.node_id, other.node_id
        of_one.say(a_report(b, a_finding(fails=True), rounds=1), a_report(third.node_id))
        of_other.say(a_report(a, a_finding(fails=True)))
        await until(lambda: failing(cluster, b) == {(a, "4789/udp")})
        # One end alone excludes no node, and the first round does not count.
        assert failing(cluster, a) == set()
        of_one.say(a_report(b, a_finding(fails=True)))
        await until(lambda: failing(cluster, a) == {(b, "4789/udp")})
        later = max(a, b, key=lambda one: (cluster.node(one).created_at, one))
        await until(lambda: cluster.node(later).cut_off)
        (cut_off,) = cluster.node(later).cut_off
        assert cut_off.summary == "4789/udp fails between this node and worker"
        assert [node.id for node in cluster.view.find(Node) if node.cut_off] == [later]
        of_one.say(a_report(b))
        await until(lambda: not any(node.cut_off for node in cluster.view.find(Node)))
        of_other.say(a_report(a))
        await until(lambda: not any(node.failing_paths for node in cluster.view.find(Node)))


async def test_what_is_well_writes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    async with probing(cluster, tmp_path, 2) as nodes, judging(cluster):
        (one, of_one), (other, of_other) = nodes
        of_other.say(a_report(one.node_id, a_finding(PathCheck.CONTROL, "2377/tcp", fails=True)))
        await until(lambda: failing(cluster, other.node_id))
        before = cluster.view.revision
        of_one.say(*(a_report(other.node_id, rounds=rounds) for rounds in range(2, 50)))
        of_other.say(a_report(one.node_id, a_finding(PathCheck.CONTROL, "2377/tcp", fails=True)))
        # Later messages of the stream have been received after it.
        async with asyncio.timeout(10):
            await cluster.paths.run_diagnostics(one.node_id, throughput=False)
            await cluster.paths.run_diagnostics(other.node_id, throughput=False)
        await until(lambda: not any(stream.is_dirty for stream in cluster.paths.streams.values()))
        assert cluster.view.revision == before


async def test_what_was_written_outlives_the_manager_until_the_node_says_otherwise(
    cluster: Cluster, tmp_path: Path
) -> None:
    async with probing(cluster, tmp_path, 2) as nodes:
        (one, of_one), (other, _) = nodes
        of_one.say(a_report(other.node_id, a_finding(fails=True)))
        await until(lambda: failing(cluster, one.node_id))
        of_one._reports.clear()  # as of a node process that was started anew
        session, requests = cluster.node(one.node_id).session, len(of_one.requests)
        cluster.dispatcher.sessions.redirect(one.node_id, Unavailable("move on"), now=0.0, grace_s=60.0)
        await until(lambda: cluster.node(one.node_id).session != session)
        await until(lambda: len(of_one.requests) > requests)
        assert failing(cluster, one.node_id) == {(other.node_id, "4789/udp")}
        of_one.say(a_report(other.node_id))
        await until(lambda: not failing(cluster, one.node_id))


async def test_a_node_of_an_older_version_is_no_peer_and_what_was_said_of_it_is_forgotten(
    cluster: Cluster, tmp_path: Path
) -> None:
    async with probing(cluster, tmp_path, 2):
        (tmp_path / "old").mkdir()
        pair = await a_worker(cluster, tmp_path / "old")
        async with an_agent(cluster, pair, tmp_path / "old") as (older, _):
            reported = FailingPath(peer=NodeId("gone"), check="overlay", port="4789/udp")
            await put(cluster, replace(cluster.node(older.node_id), failing_paths=(reported,)))
            # Looked at when the nodes change next.
            await put(cluster, replace(a_docker_node("d1"), status=NodeStatus(state=NodeState.DOWN)))
            await until(lambda: not failing(cluster, older.node_id))
            assert older.node_id not in cluster.paths.directory.peers


async def test_a_manager_of_an_older_version_asks_for_no_paths(tmp_path: Path) -> None:
    older = Cluster()
    older.knows_paths = False
    probes = ScriptedProbes()
    async with older.serving():
        pair = await a_worker(older, tmp_path)
        async with an_agent(older, pair, tmp_path, paths=probes) as (agent, _):
            session = older.node(agent.node_id).session
            received = older.dispatcher.session(agent.node_id, session.session_id if session else "")
            before = received.last_seen
            await until(lambda: received.last_seen > before + 0.5)  # it goes on with what it knows
            assert older.node(agent.node_id).session == session
    assert probes.requests == []


async def test_managers_ask_docker_nodes_for_gossip(cluster: Cluster, tmp_path: Path) -> None:
    docker = replace(a_docker_node("d1"), status=NodeStatus(state=NodeState.READY, addr="192.0.2.7"))
    await put(cluster, docker)
    probes = ScriptedProbes()
    async with an_agent(cluster, cluster.pair(MANAGER_ID), tmp_path, paths=probes):
        await until(lambda: probes.peers == {"d1"})
        requested = probes.requests[-1]
        assert requested is not None
        assert requested.peers[0].gossip == "192.0.2.7:7946"
        assert requested.peers[0].data_path == ""
        assert requested.node.control == cluster.address


# -- diagnostics ----------------------------------------------------------------------------------------------------


async def diagnosed(
    diagnostics: Diagnostics, within_s: float = 5.0, *, throughput: bool = False
) -> dict[str, DiagnosticsResult]:
    found: dict[str, DiagnosticsResult] = {}

    async def tell(one: DiagnosticsResult) -> None:
        assert one.node_id not in found
        found[one.node_id] = one

    await diagnostics.run_all(tell, throughput=throughput, within_s=within_s)
    return found


async def test_all_nodes_are_diagnosed_and_silent_ones_are_named(cluster: Cluster, tmp_path: Path) -> None:
    async with probing(cluster, tmp_path, 3) as nodes:
        (one, of_one), (other, of_other), (third, of_third) = nodes
        of_one.answers = (a_report(other.node_id, a_finding(fails=True)),)
        of_other.answers = (a_report(one.node_id), a_report(third.node_id))
        of_third.may_answer.clear()
        found = await diagnosed(cluster.diagnostics, within_s=1.0)
        assert found[one.node_id].reports == of_one.answers
        assert found[other.node_id].reports == of_other.answers
        assert found[third.node_id].error == "no response within 1 s"
        assert found[MANAGER_ID].error == "it is unknown"  # it has no node process in this rig
        assert {peer.node_id for peer in of_one.diagnosed[0].peers} == {other.node_id, third.node_id}
        # The next one finds nothing of the earlier one in its way.
        of_third.may_answer.set()
        assert (await diagnosed(cluster.diagnostics))[third.node_id].error == ""


async def test_another_manager_asks_over_the_link(cluster: Cluster, tmp_path: Path) -> None:
    """The one that is asked has no nodes; those of the other one are relayed."""
    async with (
        probing(cluster, tmp_path, 2) as nodes,
        a_session(cluster, cluster.pair(MANAGER_ID, NodeRole.MANAGER)) as (channel, _),
    ):
        nodes[0][1].answers = (a_report(nodes[1][0].node_id, a_finding(fails=True)),)
        asked: list[NodeId] = []

        def link(manager: NodeId) -> ManagerChannel:
            asked.append(manager)
            return channel

        without_nodes = Diagnostics(cluster.store, NodeId("m2"), _NoStreams(), link, SystemClock())  # type: ignore[arg-type]
        found = await diagnosed(without_nodes)
        assert asked == [MANAGER_ID]
        assert found[nodes[0][0].node_id].reports == nodes[0][1].answers
        assert found[nodes[1][0].node_id].error == ""


async def test_a_manager_that_cannot_be_asked_is_the_reason_for_its_nodes(
    cluster: Cluster, tmp_path: Path
) -> None:
    async with probing(cluster, tmp_path, 1) as nodes:
        without_link = Diagnostics(cluster.store, NodeId("m2"), _NoStreams(), cluster.channel, SystemClock())  # type: ignore[arg-type]
        found = await diagnosed(without_link)
        why = f"its manager is not reachable: manager {MANAGER_ID} cannot be reached"
        assert found[nodes[0][0].node_id].error == why


async def test_one_throughput_test_runs_at_a_time_with_a_pause_after_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    clock = _SetClock()
    diagnostics = Diagnostics(cluster.store, MANAGER_ID, cluster.paths, cluster.channel, clock)
    async with probing(cluster, tmp_path, 2) as nodes:
        (node, probes), _ = nodes
        probes.may_answer.clear()
        running = asyncio.create_task(diagnosed(diagnostics, throughput=True))
        await until(lambda: bool(probes.diagnosed))
        with pytest.raises(RetryLater, match="a throughput test is running"):
            diagnostics.require_throughput()
        # Another manager does not know of the test: the nodes here take part in no second one.
        refused = await diagnosed(diagnostics, throughput=True)
        assert "a throughput test is running" in refused[node.node_id].error
        assert len(probes.diagnosed) == 1
        clock.now += 20.0
        probes.may_answer.set()
        assert (await running)[node.node_id].error == ""
        with pytest.raises(RetryLater, match="has just ended, and each fills every link: try again in 20 s"):
            diagnostics.require_throughput()
        assert (await diagnosed(diagnostics))[node.node_id].error == "", "without throughput at any time"
        clock.now += 20.0
        diagnostics.require_throughput()


class _SetClock(SystemClock):
    now = 0.0

    def monotonic(self) -> float:
        return self.now


class _NoStreams:
    """A manager without nodes."""

    def nodes(self) -> tuple[NodeId, ...]:
        return ()


# -- hostile nodes ----------------------------------------------------------------------------------------------------


async def test_a_stream_without_a_session_or_with_too_much_to_say_ends(
    cluster: Cluster, tmp_path: Path
) -> None:
    pair = await a_worker(cluster, tmp_path)
    async with a_session(cluster, pair) as (channel, session_id):
        with pytest.raises(SkepError):
            await _say(channel, skep.ProbeUpdate(session_id="another"))
        too_many = [skep.PathReport(peer=f"n{number}") for number in range(REPORTS_MAX + 1)]
        with pytest.raises(InvalidArgument):
            await _say(channel, skep.ProbeUpdate(session_id=session_id), skep.ProbeUpdate(reports=too_many))


async def _say(channel: ManagerChannel, *changed: skep.ProbeUpdate) -> None:
    """Send all messages, and receive until the stream ends."""
    async with channel.stream(methods.PATHS) as call:
        for one in changed:
            await call.send(one)
        async for _ in call:
            pass
