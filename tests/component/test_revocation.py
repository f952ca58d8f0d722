"""Certificates that are valid and count for nothing any more, at every call, over real mutual TLS on loopback."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest

from skep.agent.certificates import renew
from skep.errors import PermissionDenied, Unavailable
from skep.manager.ca.caller_check import UNKNOWN_S
from skep.manager.control.nodes import remove_node
from skep.manager.dispatcher.node_sessions.registration import Registration, take_session
from skep.manager.nodes.revocation import revoke
from skep.model.node import Node, NodeCertificate, NodeDescription, NodeRole, NodeSpec
from skep.model.values.ids import NodeId, SessionId, new_id
from skep.security.keypair import KeyPair
from skep.security.tls import client_context, joining_context
from skep.store.kinds import Revocation
from skep.wire import server
from skep.wire.client import open_channel
from skep.wire.methods import MethodAccess
from tests.support.managers.wire_calls import GUARDED, call
from tests.support.managers.wire_rig import CLOCK, Cluster, a_session, a_worker, an_agent, put, until

NOW_NS = CLOCK.now_ns()
FOR_MANAGERS = sorted(name for name, method in GUARDED.items() if method.access is not MethodAccess.NODE)
FOR_NODES = sorted(name for name, method in GUARDED.items() if method.access is MethodAccess.NODE)


@pytest.fixture
async def cluster(tmp_path):
    async with Cluster(heartbeat_s=3).serving() as serving, serving.own_agent(tmp_path / "manager"):
        yield serving


async def removed(cluster: Cluster, pair: KeyPair) -> None:
    """What ``docker node rm --force`` does."""
    await cluster.store.update(remove_node, pair.identity.node_id, force=True, now_ns=NOW_NS)


async def a_manager(cluster: Cluster) -> KeyPair:
    """The key pair of a second manager that the store knows."""
    pair = cluster.pair(new_id(), NodeRole.MANAGER)
    certificate = NodeCertificate(role=NodeRole.MANAGER, state="issued")
    spec = NodeSpec(role=NodeRole.MANAGER)
    await put(cluster, Node(id=pair.identity.node_id, spec=spec, certificate=certificate))
    return pair


async def demoted(cluster: Cluster, pair: KeyPair) -> None:
    """What is left of a manager once it was demoted."""

    def body(tx):
        node = tx.get(Node, pair.identity.node_id)
        revoke(tx, node, NOW_NS, is_removed=False)
        tx.put(Node(id=node.id, certificate=NodeCertificate(role=NodeRole.WORKER, state="rotate")))

    await cluster.store.update(body)


async def refused(cluster: Cluster, pair: KeyPair, names: Sequence[str]) -> list[str]:
    """Those of the calls that this certificate may not make."""
    found = []
    for name in names:
        async with open_channel(cluster.address, client_context(pair), "swarm-manager") as channel:
            if isinstance(await call(channel, name), PermissionDenied):
                found.append(name)
    return found


async def test_a_removed_nodes_certificate_is_refused_at_every_call(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    await removed(cluster, pair)
    assert await refused(cluster, pair, FOR_NODES) == FOR_NODES
    async with open_channel(cluster.address, client_context(pair), "swarm-manager") as channel:
        assert "was removed from the swarm" in str(await call(channel, "HEARTBEAT"))


@pytest.mark.parametrize("end", [removed, demoted])
async def test_a_former_managers_certificate_is_refused_at_every_call_of_managers(cluster, end):
    pair = await a_manager(cluster)
    assert await refused(cluster, pair, FOR_MANAGERS) == []
    await end(cluster, pair)
    assert await refused(cluster, pair, FOR_MANAGERS) == FOR_MANAGERS


async def test_a_manager_that_was_minted_is_refused_at_every_call_of_managers(cluster):
    """A former manager has the root's key, and can make certificates for nodes that do not exist."""
    minted = cluster.pair(new_id(), NodeRole.MANAGER)
    async with open_channel(cluster.address, client_context(minted), "swarm-manager") as channel:
        assert isinstance(await call(channel, "GET_UNLOCK_KEY"), Unavailable)
    cluster.ahead_s = 2 * UNKNOWN_S
    assert await refused(cluster, minted, FOR_MANAGERS) == FOR_MANAGERS


async def test_a_workers_certificate_is_refused_at_every_call_of_managers(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    assert await refused(cluster, pair, FOR_MANAGERS) == FOR_MANAGERS
    assert {"PINGS", "RELAY_LOGS", "ADD_MEMBER", "PROMOTE_MEMBER", "GET_UNLOCK_KEY"} <= set(FOR_MANAGERS)


async def test_open_connections_of_a_removed_node_end_at_once(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with a_session(cluster, pair) as (channel, _):
        before = cluster.bound.connections
        await removed(cluster, pair)
        await until(lambda: cluster.bound.connections < before, within_s=1)
        assert isinstance(await call(channel, "HEARTBEAT"), Unavailable | PermissionDenied)


async def test_open_connections_of_a_demoted_manager_end_and_those_of_others_stay(cluster, tmp_path):
    pair, worker = await a_manager(cluster), await a_worker(cluster, tmp_path)
    other = await a_manager(cluster)
    async with (
        open_channel(cluster.address, client_context(pair), "swarm-manager"),
        open_channel(cluster.address, client_context(other), "swarm-manager") as managers,
        a_session(cluster, worker) as (channel, _),
    ):
        assert not isinstance(await call(managers, "GET_UNLOCK_KEY"), PermissionDenied | Unavailable)
        before = cluster.bound.connections
        await demoted(cluster, pair)
        await until(lambda: cluster.bound.connections < before, within_s=1)
        assert not isinstance(await call(channel, "LISTEN_SUBSCRIPTIONS"), PermissionDenied)
        assert not isinstance(await call(managers, "GET_UNLOCK_KEY"), PermissionDenied | Unavailable)
        assert cluster.bound.connections == before - 1


async def test_where_all_connections_end_managers_are_first_and_nodes_one_after_another(cluster, tmp_path):
    manager, pairs = await a_manager(cluster), [await a_worker(cluster, tmp_path) for _ in range(3)]
    async with AsyncExitStack() as stack:
        for pair in (manager, *pairs):
            tls = client_context(pair)
            channel = await stack.enter_async_context(open_channel(cluster.address, tls, "swarm-manager"))
            await call(channel, "HEARTBEAT")
        await until(lambda: cluster.bound.connections >= 4)
        cluster.bound.disconnect_all(
            lambda caller: caller.role is NodeRole.MANAGER,
            lambda count: [3600.0 * number for number in range(count)],
        )
        await until(lambda: cluster.bound.connections == 2)
        left = {connection.caller.identity.role for connection in cluster.bound.server.connections}
        assert left == {NodeRole.WORKER}
        cluster.bound.disconnect_all(lambda caller: caller.role is NodeRole.MANAGER)
        await until(lambda: not cluster.bound.connections)


def test_connections_end_in_portions_and_all_within_seconds():
    assert server.closing_times(0) == []
    assert server.closing_times(3) == [0.0, 1 / server.CLOSED_PER_S, 2 / server.CLOSED_PER_S]
    assert max(server.closing_times(100_000)) < server.CLOSING_S_MAX


async def test_a_removed_node_gets_no_other_certificate(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    await removed(cluster, pair)
    with pytest.raises(PermissionDenied):
        await renew(cluster.address, pair, CLOCK)


async def test_a_manager_cut_off_answers_no_node_because_it_may_have_been_removed(
    cluster, tmp_path, monkeypatch
):
    pair = await a_worker(cluster, tmp_path)
    silent = asyncio.Event()
    monkeypatch.setattr(cluster.store, "barrier", silent.wait)
    await until(lambda: not cluster.dispatcher.is_current(), within_s=3)
    for name in FOR_NODES:
        async with open_channel(cluster.address, client_context(pair), "swarm-manager") as channel:
            error = await call(channel, name)
            assert isinstance(error, Unavailable)
            assert "lost contact" in str(error)


async def test_forged_words_about_the_caller_are_not_believed(cluster, tmp_path):
    """SwarmKit's managers forward calls with the caller's identity as metadata, which is ignored here."""
    pair = await a_worker(cluster, tmp_path)
    forged = {
        "forwarded_cert": "true",
        "forwarded_cert_cn": NodeId("manager0000000000000000m1"),
        "forwarded_cert_ou": "swarm-manager",
        "forwarded_cert_org": cluster.id,
        "remote_addr": "127.0.0.1",
        "redirect": "127.0.0.1:2377",
    }
    async with open_channel(cluster.address, client_context(pair), "swarm-manager") as channel:
        for name in FOR_MANAGERS:
            assert isinstance(await call(channel, name, forged), PermissionDenied)
        error = await call(channel, "HEARTBEAT", forged)
        assert "node not registered" in str(error)
    stranger = joining_context(cluster.authority.root_pem)
    async with open_channel(cluster.address, stranger, "swarm-manager") as channel:
        for name in FOR_NODES[:3]:
            assert isinstance(await call(channel, name, forged), PermissionDenied)


async def test_an_agent_of_a_removed_node_goes_on_without_a_session(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path / "w")
    async with an_agent(cluster, pair, tmp_path / "w") as (agent, _):
        await removed(cluster, pair)
        await until(lambda: not agent.registered.is_set())


async def test_the_agent_of_a_removed_node_knows_it_until_it_has_a_session_again(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path / "w")
    node = cluster.store.view().get(Node, pair.identity.node_id)
    async with an_agent(cluster, pair, tmp_path / "w") as (agent, _):
        assert agent.removal == ""
        await removed(cluster, pair)
        await until(lambda: agent.removal)
        assert agent.removal.endswith(": docker swarm leave --force (its containers stop)")
        assert "this node was removed from the cluster at 20" in agent.removal

        def restored(tx):
            """A backup of before, from which the cluster was restored."""
            tx.delete(Revocation, node.id)
            tx.put(Node(id=node.id, certificate=node.certificate))

        await cluster.store.update(restored)
        agent.try_now()
        await until(lambda: not agent.removal)


async def test_a_node_that_the_store_does_not_know_was_not_removed(cluster, tmp_path):
    """A cluster that was restored from a backup lacks the nodes that joined after it."""
    pair = await a_worker(cluster, tmp_path / "w")
    async with an_agent(cluster, pair, tmp_path / "w") as (agent, _):
        await cluster.store.update(lambda tx: tx.delete(Node, pair.identity.node_id))
        with pytest.raises(PermissionDenied, match="is not part of the swarm"):
            await cluster.store.update(take_session, a_registration(pair))
        assert agent.removal == ""


def a_registration(pair: KeyPair) -> Registration:
    return Registration(
        node_id=pair.identity.node_id,
        manager_id=NodeId("m"),
        session_id=SessionId("s"),
        description=NodeDescription(),
        address="127.0.0.1",
    )
