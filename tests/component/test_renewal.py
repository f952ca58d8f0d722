"""Certificates are renewed under a running session, over real mutual TLS on loopback."""

import asyncio
import errno
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import pytest
from aiohttp import web
from msgspec.structs import replace

from skep.agent.agent import Agent
from skep.agent.renewal import KeyPairCredentials
from skep.agent.session.managers import KnownManager
from skep.aio.clock import SystemClock
from skep.manager.ca.rotation import Renewal, request_renewal
from skep.model.node import Node, NodeRole
from skep.model.values.ids import NodeId
from skep.model.values.times import SECOND_NS
from skep.security import keypair
from skep.security.authority import Authority
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem
from skep.security.trust import tls_info
from tests.component.test_expired import Earlier
from tests.component.test_external_ca import leader, named, update
from tests.support.file_faults import file_faults
from tests.support.managers.wire_rig import MANAGER_ID, Cluster, a_worker, an_agent, pair_of, put, until
from tests.support.security.external_ca import ExternalAuthority


@pytest.fixture
async def cluster():
    async with Cluster(heartbeat_s=3).serving() as serving:
        yield serving


def aged(cluster: Cluster, pair: KeyPair, *, days: float) -> KeyPair:
    """The same node with a certificate of 90 days that was issued ``days`` ago."""
    then = Authority.load(
        cluster.authority.key_pem, cluster.authority.root_pem, Earlier(timedelta(days=days))
    )
    key = new_private_key()
    return KeyPair(
        certificate_pem=then.issue(key.public_key(), pair.identity),
        key_pem=private_pem(key),
        root_pem=pair.root_pem,
    )


def serial(agent: Agent) -> int:
    return pair_of(agent).certificate.serial_number


async def renewed(cluster: Cluster, agent: Agent, before: int) -> None:
    """Wait for another certificate; the session stays."""
    session = cluster.node(agent.node_id).session
    await until(lambda: serial(agent) != before)
    assert cluster.node(agent.node_id).session == session
    assert agent.registered.is_set()


BROKEN = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


async def test_roots_that_cannot_be_read_are_not_taken(cluster, tmp_path):
    async with an_agent(cluster, await a_worker(cluster, tmp_path), tmp_path) as (agent, _):
        before = pair_of(agent)
        for sent in (b"garbage", BROKEN, before.root_pem + BROKEN, b"\xff" + before.root_pem):
            agent.credentials.take_roots(sent)
            assert pair_of(agent) is before, sent
        agent.renew_certificate()  # by a new connection
        await renewed(cluster, agent, before.certificate.serial_number)


async def test_a_disk_that_refuses_the_certificate_is_no_end_of_the_session(cluster, tmp_path):
    pair = aged(cluster, await a_worker(cluster, tmp_path), days=89)
    async with an_agent(cluster, pair, tmp_path) as (agent, _):
        with file_faults(tmp_path) as disk:
            disk.choose(
                errno.ENOSPC,
                lambda call, path: call == "open" and path.name.startswith(keypair.CERTIFICATE_FILE),
            )
            agent.credentials.take_roots(agent.credentials.pair.root_pem + cluster.authority.root_pem)  # type: ignore[attr-defined]
            agent.renew_certificate()
            await until(lambda: len(disk.hits) >= 2)
            before = serial(agent)
        await renewed(cluster, agent, before)


@pytest.mark.parametrize(("days", "is_due"), [(40, False), (73, True), (89, True)])
async def test_a_certificate_past_its_time_is_renewed_by_itself(cluster, tmp_path, days, is_due):
    """Half of 90 days and an hour has not passed after 40 days, four fifths have after 73."""
    pair = aged(cluster, await a_worker(cluster, tmp_path), days=days)
    async with an_agent(cluster, pair, tmp_path) as (agent, _):
        if is_due:
            await until(lambda: serial(agent) != pair.certificate.serial_number)
            assert keypair.load(tmp_path).certificate.serial_number == serial(agent)
            assert pair_of(agent).key_pem != pair.key_pem
        else:
            assert serial(agent) == pair.certificate.serial_number


async def test_a_manager_asks_for_a_renewal_and_the_session_stays(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, _):
        await cluster.store.update(request_renewal, Renewal(agent.node_id))
        assert state(cluster, agent) == "rotate"
        await renewed(cluster, agent, pair.certificate.serial_number)
        assert state(cluster, agent) == "issued"


def state(cluster: Cluster, agent: Agent) -> str:
    certificate = cluster.node(agent.node_id).certificate
    assert certificate is not None
    return certificate.state


async def test_a_change_of_role_brings_a_certificate_of_that_role(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, _):
        for role in (NodeRole.MANAGER, NodeRole.WORKER):
            before = serial(agent)
            await put(cluster, with_role(cluster.node(agent.node_id), role))
            await renewed(cluster, agent, before)
            assert keypair.load(tmp_path).identity.role is role


def with_role(node: Node, role: NodeRole) -> Node:
    """As the leader writes it when a node is promoted or demoted."""
    assert node.certificate is not None
    return replace(
        node,
        spec=replace(node.spec, role=role),
        certificate=replace(node.certificate, role=role, state="rotate"),
    )


async def test_the_next_certificate_lives_as_long_as_the_cluster_says(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    swarm = cluster.swarm
    config = replace(swarm.spec.ca_config, node_cert_expiry=2 * 3600 * SECOND_NS)
    await put(cluster, replace(swarm, spec=replace(swarm.spec, ca_config=config)))
    async with an_agent(cluster, pair, tmp_path) as (agent, _):
        await cluster.store.update(request_renewal, Renewal(agent.node_id))
        await renewed(cluster, agent, pair.certificate.serial_number)
        left = pair_of(agent).not_after - datetime.now(UTC)
        assert timedelta(hours=1, minutes=59) < left <= timedelta(hours=2)


async def test_the_managers_server_shows_the_renewed_certificate_at_the_next_handshake(
    cluster, tmp_path: Path
):
    async with cluster.own_agent(tmp_path) as (agent, _):
        before = serial(agent)
        await cluster.store.update(request_renewal, Renewal(agent.node_id))
        await renewed(cluster, agent, before)
        await until(lambda: cluster.tls.pair.certificate.serial_number == serial(agent))


async def test_roots_that_a_full_disk_refused_are_written_later(cluster, tmp_path):
    """The manager sends them again only with its next message, which may take days."""
    async with an_agent(cluster, await a_worker(cluster, tmp_path), tmp_path) as (agent, _):
        both = cluster.authority.root_pem + Authority.create().root_pem
        with file_faults(tmp_path) as disk:
            disk.choose(
                errno.ENOSPC, lambda call, path: call == "open" and path.name.startswith(keypair.ROOT_FILE)
            )
            await put(cluster, replace(cluster.swarm, tls_info=tls_info(both)))
            await until(lambda: disk.hits)
        await until(lambda: keypair.load(tmp_path).root_pem == both)
        assert pair_of(agent).root_pem == both


async def test_roots_that_arrive_during_a_renewal_are_kept(tmp_path):
    """The renewal was requested with the roots before them."""
    made = Cluster(heartbeat_s=3)
    signing, answers = asyncio.Event(), asyncio.Event()
    async with (
        made.serving() as cluster,
        cluster.leading(),
        leader(cluster.store),
        ExternalAuthority(cluster.authority).serving() as authority,
    ):
        await update(cluster, named(authority))
        pair = await a_worker(cluster, tmp_path)

        async def late(request: web.Request) -> web.StreamResponse:
            signing.set()
            await answers.wait()
            authority.respond = None
            return await authority.sign(request)

        authority.respond = late
        roots = pair.root_pem + Authority.create().root_pem
        keypair.save(pair, tmp_path)
        credentials = KeyPairCredentials(tmp_path, SystemClock(), Random(1))
        manager = KnownManager(NodeId(MANAGER_ID), cluster.address)
        credentials.want_renewal()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(credentials.run(lambda: manager))
            await signing.wait()
            credentials.take_roots(roots)
            answers.set()
            await until(lambda: credentials.pair.key_pem != pair.key_pem)
            running.cancel()
        assert credentials.pair.root_pem == roots
        assert keypair.load(tmp_path).root_pem == roots
