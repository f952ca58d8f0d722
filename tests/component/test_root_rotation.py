"""The cluster's root is rotated under nodes that are connected, over real mutual TLS on loopback."""

import asyncio
from contextlib import AsyncExitStack
from datetime import UTC, datetime

import pytest
from msgspec.structs import replace

from skep.agent.certificates import join
from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition, Unavailable
from skep.manager.cluster import etcds_behind
from skep.manager.control.swarm import Rotations, rotate_root, update_swarm
from skep.manager.eviction.steps import EVICTION_ID, Eviction
from skep.model.node import ManagerStatus, Node, NodeRole, NodeState, NodeStatus, Reachability
from skep.model.swarm import CAConfig
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, new_id
from skep.model.values.meta import TLSInfo
from skep.model.values.times import timestamp
from skep.security.tls import client_context
from skep.security.trust import is_issued_by, root_digest, tls_info_of
from skep.store.kinds import NEXT_ROOT_KEY_ID, ROOT_KEY_ID, Payload
from skep.wire.client import open_channel
from tests.support.managers.wire_calls import call
from tests.support.managers.wire_rig import (
    MANAGER_ID,
    Cluster,
    a_worker,
    an_agent,
    pair_of,
    put,
    service_task,
    until,
)


@pytest.fixture
async def cluster():
    async with Cluster(heartbeat_s=3).serving() as serving, serving.leading():
        yield serving


async def rotate(cluster: Cluster, requested: CAConfig | None = None) -> None:
    """What ``docker swarm ca --rotate`` asks for."""
    swarm = cluster.swarm
    config = swarm.spec.ca_config
    requested = requested or replace(config, force_rotate=config.force_rotate + 1)
    await cluster.store.update(
        update_swarm,
        replace(swarm.spec, ca_config=requested),
        swarm.version.index,
        Rotations(),
        new_id=new_id,
        now=datetime.now(UTC),
    )


async def rotated(cluster: Cluster) -> None:
    await cluster.until(lambda _: not cluster.swarm.root_rotation_in_progress)


async def test_a_rotation_reaches_every_node_and_no_session_is_lost(cluster, tmp_path):
    before = cluster.swarm
    async with AsyncExitStack() as stack:
        agents = []
        for number in range(3):
            directory = tmp_path / str(number)
            pair = await a_worker(cluster, directory)
            agent, worker = await stack.enter_async_context(an_agent(cluster, pair, directory))
            agents.append((agent, worker, pair))
        manager, _ = await stack.enter_async_context(cluster.own_agent(tmp_path / "manager"))
        service, task = service_task(agents[0][0].node_id)
        await put(cluster, service, task)
        await until(lambda: task.id in agents[0][1].tasks)
        sessions = {node.id: node.session for node in cluster.view.find(Node)}

        await rotate(cluster)
        assert cluster.swarm.root_rotation_in_progress
        assert cluster.swarm.tls_info.trust_root == before.tls_info.trust_root
        assert cluster.swarm.tls_info.cert_issuer_public_key != before.tls_info.cert_issuer_public_key
        await rotated(cluster)

        after = cluster.swarm
        assert after.tls_info.trust_root != before.tls_info.trust_root
        assert after.join_tokens.worker != before.join_tokens.worker
        assert after.join_tokens.manager != before.join_tokens.manager
        assert after.rotation is None
        assert cluster.view.lookup(Payload, NEXT_ROOT_KEY_ID) is None
        # What `docker swarm ca --rotate` waits for: every node has the certificate and trusts the root.
        await cluster.until(
            lambda view: all(node.description.tls_info == after.tls_info for node in view.find(Node))
        )
        assert {node.id: node.session for node in cluster.view.find(Node)} == sessions
        for agent, _, pair in agents:
            assert pair_of(agent).root_pem == after.tls_info.trust_root.encode()
            assert pair_of(agent).certificate_pem != pair.certificate_pem
        agents[0][1].report(task.id, TaskState.RUNNING)
        await cluster.until(lambda view: view.get(Task, task.id).status.state is TaskState.RUNNING)
        del manager


async def test_after_a_rotation_old_tokens_and_old_certificates_count_for_nothing(cluster, tmp_path):
    old_token = cluster.swarm.join_tokens.worker
    async with cluster.own_agent(tmp_path / "manager"):
        await rotate(cluster)
        await rotated(cluster)
        await until(lambda: tls_info_of(cluster.tls.pair) == cluster.swarm.tls_info)
    with pytest.raises(FailedPrecondition, match="remote CA does not match fingerprint"):
        await join(cluster.address, old_token, SystemClock())
    pair = await join(cluster.address, cluster.swarm.join_tokens.worker, SystemClock())
    assert pair.root_pem == cluster.swarm.tls_info.trust_root.encode()


async def test_a_node_may_join_while_the_root_is_rotated(cluster, tmp_path):
    await rotate(cluster)  # the manager's own node is not connected, so the rotation waits
    pair = await a_worker(cluster, tmp_path)
    assert pair.root_pem == cluster.swarm.tls_info.trust_root.encode()
    assert len(pair.chain) == 2
    async with an_agent(cluster, pair, tmp_path) as (agent, _):
        await cluster.until(
            lambda view: is_issued_by(
                view.get(Node, agent.node_id).description.tls_info, cluster.swarm.tls_info
            )
        )
    assert cluster.swarm.root_rotation_in_progress


async def test_a_node_that_is_away_holds_the_rotation_up_until_it_returns(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path / "w")
    async with cluster.own_agent(tmp_path / "manager"):
        async with an_agent(cluster, pair, tmp_path / "w"):
            pass
        await rotate(cluster)
        await cluster.until(
            lambda view: is_issued_by(view.get(Node, MANAGER_ID).description.tls_info, cluster.swarm.tls_info)
        )
        assert cluster.swarm.root_rotation_in_progress
        async with an_agent(cluster, pair, tmp_path / "w"):
            await rotated(cluster)


async def test_a_rotation_does_not_begin_before_every_etcd_trusts_the_root_of_the_one_before(cluster):
    """Its peers' certificates are signed by the next root then, which an etcd that is further behind does not know."""
    there = NodeStatus(state=NodeState.READY)
    status = ManagerStatus(reachability=Reachability.REACHABLE, addr="127.0.0.1:1")
    known = replace(cluster.node(MANAGER_ID), status=there, peer_roots="of the root before")
    joining = replace(known, manager_status=ManagerStatus(addr="127.0.0.1:1"))
    await put(cluster, joining)
    assert etcds_behind(cluster.view) == []
    behind = replace(joining, manager_status=status)
    await put(cluster, behind)
    with pytest.raises(Unavailable, match=f"managers are restarting etcd after the last .*: {MANAGER_ID}"):
        await rotate(cluster)
    with pytest.raises(Unavailable, match="managers are restarting etcd"):
        await cluster.store.update(rotate_root, datetime.now(UTC))
    await put(cluster, replace(behind, status=NodeStatus(state=NodeState.DOWN)))
    with pytest.raises(FailedPrecondition, match=f"unavailable nodes .*: {MANAGER_ID}. Start them"):
        await rotate(cluster)
    trusted = root_digest(cluster.swarm.tls_info.trust_root.encode())
    await put(cluster, replace(behind, peer_roots=trusted))
    await rotate(cluster)
    assert cluster.swarm.root_rotation_in_progress


async def test_an_eviction_begins_no_rotation_that_a_node_would_not_survive(cluster):
    """Such a node joined since the root before, and accepts the managers by a certificate of that root."""
    node, former = cluster.node(MANAGER_ID), TLSInfo(trust_root="the root before")
    description = replace(node.description, tls_info=former)
    behind = replace(node, description=description, status=NodeStatus(state=NodeState.READY))
    await put(cluster, behind)
    with pytest.raises(Unavailable, match=f"nodes have not yet taken the root of the last .*: {MANAGER_ID}"):
        await cluster.store.update(rotate_root, datetime.now(UTC))
    await put(cluster, replace(behind, status=NodeStatus(state=NodeState.DOWN)))
    with pytest.raises(FailedPrecondition, match=f"unavailable nodes .*: {MANAGER_ID}. Start them"):
        await cluster.store.update(rotate_root, datetime.now(UTC))
    assert not cluster.swarm.root_rotation_in_progress
    taken = replace(description, tls_info=cluster.swarm.tls_info)
    await put(cluster, replace(behind, description=taken))
    await cluster.store.update(rotate_root, datetime.now(UTC))
    assert cluster.swarm.root_rotation_in_progress


async def test_the_next_leader_goes_on_with_a_rotation_that_its_predecessor_left(tmp_path):
    """Nothing is written between the two, so only the snapshot of its term can tell the next leader."""
    async with Cluster(heartbeat_s=3).serving() as cluster, cluster.own_agent(tmp_path / "manager"):
        before = cluster.swarm.tls_info.trust_root
        await rotate(cluster)
        async with cluster.leading():
            await rotated(cluster)
        assert cluster.swarm.tls_info.trust_root != before


async def test_a_node_that_was_removed_holds_nothing_up(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path / "w")
    async with cluster.own_agent(tmp_path / "manager"):
        await rotate(cluster)
        assert cluster.swarm.root_rotation_in_progress
        await cluster.store.update(lambda tx: tx.delete(Node, pair.identity.node_id))
        await rotated(cluster)


async def test_another_rotation_replaces_one_under_way(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path / "w")
    old_key = cluster.view.get(Payload, ROOT_KEY_ID).data
    async with an_agent(cluster, pair, tmp_path / "w") as (agent, _):
        await rotate(cluster)  # the manager's own node is away
        first = cluster.swarm.tls_info
        await cluster.until(
            lambda view: is_issued_by(view.get(Node, agent.node_id).description.tls_info, first)
        )
        await rotate(cluster)
        second = cluster.swarm.tls_info
        assert not is_issued_by(first, second)
        assert cluster.view.get(Payload, ROOT_KEY_ID).data == old_key
        async with cluster.own_agent(tmp_path / "manager"):
            await rotated(cluster)
        assert is_issued_by(cluster.swarm.tls_info, second)
        await cluster.until(
            lambda view: view.get(Node, agent.node_id).description.tls_info == cluster.swarm.tls_info
        )


async def test_the_present_root_given_again_ends_a_rotation(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path / "w")
    before = cluster.swarm.tls_info
    async with an_agent(cluster, pair, tmp_path / "w") as (agent, _):
        await rotate(cluster)
        requested = replace(
            cluster.swarm.spec.ca_config,
            signing_ca_cert=cluster.authority.root_pem.decode(),
            signing_ca_key=cluster.authority.key_pem.decode(),
        )
        await rotate(cluster, requested)
        assert cluster.swarm.tls_info == before
        assert not cluster.swarm.root_rotation_in_progress
        assert cluster.swarm.spec.ca_config.signing_ca_key == ""
        async with asyncio.timeout(5):
            await agent.registered.wait()


@pytest.mark.parametrize("is_evicting", [True, False])
async def test_connections_outlive_a_rotation_but_none_that_an_eviction_asked_for(
    cluster, tmp_path, is_evicting
):
    """Who has the old root's key may have made one in the name of a node that stays."""
    forged = cluster.pair(MANAGER_ID, NodeRole.MANAGER)
    if is_evicting:
        eviction = Eviction(
            node_id=NodeId("gone"),
            hostname="gone",
            was_manager=True,
            asked_by="root@desk",
            asked_through=MANAGER_ID,
            asked_at=timestamp(0),
        )
        await put(cluster, Payload(id=EVICTION_ID, data=eviction.encode()))
    async with (
        cluster.own_agent(tmp_path / "manager"),
        open_channel(cluster.address, client_context(forged), "swarm-manager") as channel,
    ):
        await rotate(cluster)
        await rotated(cluster)
        root = cluster.swarm.tls_info.trust_root.encode()
        await until(lambda: cluster.tls.pair.root_pem == root)
        assert isinstance(await call(channel, "HEARTBEAT"), Unavailable) is is_evicting


async def test_no_rotation_begins_that_a_node_which_missed_the_end_of_the_last_one_could_not_survive(
    cluster, tmp_path
):
    missing, late = await a_worker(cluster, tmp_path / "missing"), await a_worker(cluster, tmp_path / "late")
    id = missing.identity.node_id
    async with cluster.own_agent(tmp_path / "manager"):
        async with an_agent(cluster, late, tmp_path / "late"):
            pass
        await rotate(cluster)
        async with an_agent(cluster, missing, tmp_path / "missing") as (agent, _):
            await cluster.until(
                lambda view: is_issued_by(view.get(Node, id).description.tls_info, cluster.swarm.tls_info)
            )
            renewed = pair_of(agent)
        assert renewed.root_pem == missing.root_pem
        async with an_agent(cluster, late, tmp_path / "late"):
            await rotated(cluster)
            await cluster.until(lambda view: view.get(Node, id).status.state is NodeState.DOWN)
            with pytest.raises(FailedPrecondition, match="unavailable nodes still trust the root before"):
                await rotate(cluster)
            async with an_agent(cluster, renewed, tmp_path / "missing") as (agent, _):
                await until(lambda: pair_of(agent).root_pem == cluster.swarm.tls_info.trust_root.encode())
                await cluster.until(
                    lambda view: view.get(Node, id).description.tls_info == cluster.swarm.tls_info
                )
                await rotate(cluster)
                await rotated(cluster)
                await until(lambda: pair_of(agent).root_pem == cluster.swarm.tls_info.trust_root.encode())
