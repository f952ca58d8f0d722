"""Becoming a node, over real mutual TLS on loopback."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from skep.agent.certificates import join, renew
from skep.aio.clock import SystemClock
from skep.errors import (
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    Unavailable,
)
from skep.model.networks.data_planes import DOCKER, SKEP
from skep.model.node import Availability, Node, NodeRole
from skep.model.values.ids import NodeId
from skep.security.authority import Authority
from skep.security.keys import new_private_key, signing_request
from skep.security.tls import client_context, joining_context, unverified_context
from skep.security.tokens import join_token
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from skep.wire.client import open_channel
from tests.support.managers.wire_rig import Cluster, a_worker
from tests.support.security.api_authority import an_authority

CLOCK = SystemClock()


@pytest.fixture
async def cluster():
    async with Cluster().serving() as serving:
        yield serving


async def test_a_worker_token_makes_a_worker(cluster):
    pair = await join(cluster.address, cluster.swarm.join_tokens.worker, CLOCK, Availability.DRAIN)
    assert pair.identity.cluster_id == cluster.id
    assert pair.identity.role is NodeRole.WORKER
    node = cluster.node(pair.identity.node_id)
    assert node.spec.availability is Availability.DRAIN
    assert node.certificate is not None
    assert node.certificate.state == "issued"


async def test_a_wrong_token_is_refused_with_dockers_words(cluster):
    wrong = join_token(cluster.authority.root_pem, "0" * 25)
    with pytest.raises(InvalidArgument, match="A valid join token is necessary to join this cluster"):
        await join(cluster.address, wrong, CLOCK)
    assert len(cluster.view.find(Node)) == 1


@asynccontextmanager
async def listening(cluster: Cluster) -> AsyncIterator[tuple[str, bytearray]]:
    """Yield the address of a machine that passes on to the cluster what it decrypts, and what it has seen."""
    seen = bytearray()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, keeps: bool) -> None:
        while received := await reader.read(65536):
            if keeps:
                seen.extend(received)
            writer.write(received)
        writer.close()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        context = unverified_context()
        context.set_alpn_protocols(["h2"])
        there, to_there = await asyncio.open_connection(cluster.host, cluster.port, ssl=context)
        await asyncio.gather(copy(reader, to_there, True), copy(there, writer, False))

    server = await asyncio.start_server(pass_on, "127.0.0.1", 0, ssl=cluster.tls.front)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", seen


async def test_a_token_of_another_cluster_is_noticed_before_the_secret_is_sent(cluster):
    foreign = join_token(Authority.create().root_pem, "0" * 25)
    said = "remote CA does not match fingerprint.*before the certificate authority was rotated: see `docker swarm"
    async with listening(cluster) as (address, seen):
        with pytest.raises(FailedPrecondition, match=said):
            await join(address, foreign, CLOCK)
        assert seen, "it has passed on the request for the root certificate"
        assert b"0" * 25 not in seen
        own = cluster.swarm.join_tokens.worker
        await join(address, own, CLOCK)
        assert own.encode() in seen, "a token whose root matches is sent"


async def test_a_port_that_requires_a_certificate_leads_to_the_managers_port(cluster, tmp_path):
    """Such as the peer port of etcd."""
    authority = an_authority(tmp_path / "authority")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.pair("server"))
    context.load_verify_locations(authority.root)
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])

    def refuse(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.settimeout(20)
        with context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False) as stream:
            with suppress(ssl.SSLError):
                stream.do_handshake()
            stream.shutdown(socket.SHUT_WR)
            while stream.recv(
                65536
            ):  # an unread byte would reset the connection before its client reads the alert
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        refusing = asyncio.create_task(asyncio.to_thread(refuse, listener))
        with pytest.raises(Unavailable) as refused:
            await join(address, cluster.swarm.join_tokens.worker, CLOCK)
        await refusing
    assert str(refused.value) == (
        f"{address}: the connection broke: it requires a client certificate. "
        "Use the port where a manager listens (default: 2377)"
    )


async def test_no_token_at_all_is_an_invalid_argument(cluster):
    with pytest.raises(InvalidArgument, match="invalid join token"):
        await join(cluster.address, "SWMTKN-1-x-y", CLOCK)


async def test_a_manager_token_makes_a_manager_of_a_machine_that_runs_skep(cluster):
    pair = await join(cluster.address, cluster.swarm.join_tokens.manager, CLOCK)
    assert pair.identity.role is NodeRole.MANAGER


async def test_an_engine_with_the_manager_token_is_refused_with_a_sentence(cluster):
    context = joining_context(cluster.authority.root_pem)
    request = pb.IssueNodeCertificateRequest(
        csr=signing_request(new_private_key()), token=cluster.swarm.join_tokens.manager
    )
    async with open_channel(cluster.address, context, "swarm-ca") as channel:
        with pytest.raises(FailedPrecondition, match="Docker engines as workers only"):
            await channel.call(methods.ISSUE_NODE_CERTIFICATE, request)


async def test_which_kind_of_node_it_is_was_decided_when_it_joined(cluster, tmp_path):
    """By the call that it joined with; what it asks or says later changes nothing."""
    ours = await a_worker(cluster, tmp_path)
    request = pb.IssueNodeCertificateRequest(
        csr=signing_request(new_private_key()), token=cluster.swarm.join_tokens.worker
    )
    async with open_channel(
        cluster.address, joining_context(cluster.authority.root_pem), "swarm-ca"
    ) as channel:
        reply = await channel.call(methods.ISSUE_NODE_CERTIFICATE, request)
    async with open_channel(cluster.address, client_context(ours), "swarm-manager") as channel:
        renewal = pb.IssueNodeCertificateRequest(csr=request.csr)
        await channel.call(methods.ISSUE_NODE_CERTIFICATE, renewal)  # as an engine does

    def plane(id: str) -> str:
        certificate = cluster.node(NodeId(id)).certificate
        return certificate.plane if certificate is not None else ""

    assert (plane(ours.identity.node_id), plane(reply.node_id)) == (SKEP, DOCKER)


async def test_a_node_renews_with_its_certificate_alone(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    renewed = await renew(cluster.address, pair, CLOCK)
    assert renewed.identity == pair.identity
    assert renewed.key_pem != pair.key_pem


async def test_a_removed_node_cannot_renew(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    await cluster.store.update(lambda tx: tx.delete(Node, pair.identity.node_id))
    with pytest.raises(PermissionDenied, match="not part of this swarm"):
        await renew(cluster.address, pair, CLOCK)


@pytest.mark.parametrize("csr", [b"", b"nonsense", b"-----BEGIN CERTIFICATE REQUEST-----\nAA==\n"])
async def test_a_request_that_cannot_be_read_gets_no_certificate(cluster, csr):
    token = cluster.swarm.join_tokens.worker
    context = joining_context(cluster.authority.root_pem)
    async with open_channel(cluster.address, context, "swarm-ca") as channel:
        with pytest.raises(InvalidArgument, match="certificate request"):
            await channel.call(
                methods.ISSUE_NODE_CERTIFICATE, pb.IssueNodeCertificateRequest(csr=csr, token=token)
            )
