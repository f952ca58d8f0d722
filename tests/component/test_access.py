"""Who may call what, and how much they may send."""

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skep.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from skep.model.node import NodeRole
from skep.model.values.ids import new_id
from skep.security.keypair import KeyPair
from skep.security.tls import client_context, joining_context
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from skep.wire.client import open_channel, split_address
from tests.support.managers.wire_rig import Cluster, a_worker


@pytest.fixture
async def cluster():
    async with Cluster().serving() as serving:
        yield serving


async def test_without_a_certificate_only_joining_is_possible(cluster):
    context = joining_context(cluster.authority.root_pem)
    async with open_channel(cluster.address, context, "swarm-manager") as channel:
        with pytest.raises(PermissionDenied):
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest())


async def test_a_certificate_of_another_cluster_counts_for_nothing(cluster):
    pair = cluster.pair(new_id(), cluster="another-cluster")
    async with open_channel(cluster.address, client_context(pair), "swarm-manager") as channel:
        with pytest.raises(PermissionDenied):
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest())


async def test_a_certificate_of_another_root_ends_the_connection(cluster):
    stranger = Cluster()
    pair = stranger.pair(new_id(), cluster=cluster.id).with_root(cluster.authority.root_pem)
    with pytest.raises(Unavailable):
        async with open_channel(cluster.address, client_context(pair), "swarm-manager") as channel:
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest())


async def test_a_node_does_not_talk_to_a_manager_of_another_root(cluster):
    pair = Cluster().pair(new_id())
    with pytest.raises(Unavailable, match="not trusted"):
        async with open_channel(cluster.address, client_context(pair), "swarm-manager"):
            pass


async def test_a_workers_certificate_does_not_pass_for_a_managers():
    cluster = Cluster()
    async with cluster.serving():
        pair = cluster.pair(new_id(), NodeRole.WORKER)
        async with open_channel(cluster.address, client_context(pair), "swarm-manager") as channel:
            with pytest.raises((PermissionDenied, Unimplemented)):
                await channel.call(methods.GET_UNLOCK_KEY, pb.GetUnlockKeyRequest())


async def test_an_unknown_method_is_unimplemented(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    method = methods.UnaryMethod(
        "/docker.swarmkit.v1.Dispatcher/Tasks", pb.HeartbeatRequest, pb.HeartbeatResponse
    )
    async with open_channel(cluster.address, client_context(pair), "swarm-manager") as channel:
        with pytest.raises(Unimplemented):
            await channel.call(method, pb.HeartbeatRequest())


async def test_an_engine_with_the_manager_token_is_refused_with_the_reason(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    method = methods.UnaryMethod(
        "/docker.swarmkit.v1.RaftMembership/Join", pb.HeartbeatRequest, pb.HeartbeatResponse
    )
    async with open_channel(cluster.address, client_context(pair), "swarm-manager") as channel:
        with pytest.raises(FailedPrecondition, match="workers only"):
            await channel.call(method, pb.HeartbeatRequest())


async def test_a_message_over_four_megabytes_is_refused_and_the_connection_lives(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with open_channel(cluster.address, client_context(pair), "swarm-manager") as channel:
        with pytest.raises(ResourceExhausted, match="larger than max"):
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest(session_id="x" * (5 << 20)))
        with pytest.raises(NotFound, match="node not registered"):
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest(session_id="x"))


async def test_a_stranger_may_send_little(cluster):
    context = joining_context(cluster.authority.root_pem)
    async with open_channel(cluster.address, context, "swarm-ca") as channel:
        with pytest.raises(ResourceExhausted, match="larger than max"):
            await channel.call(
                methods.ISSUE_NODE_CERTIFICATE, pb.IssueNodeCertificateRequest(csr=b"x" * 100_000)
            )


async def say(cluster: Cluster, words: bytes, pair: KeyPair) -> bytes:
    """Say something over TLS that is no gRPC; gives what came back until the end."""
    host, port = split_address(cluster.address)
    reader, writer = await asyncio.open_connection(
        host, port, ssl=client_context(pair), server_hostname="swarm-manager"
    )
    writer.write(words)
    try:
        async with asyncio.timeout(5):
            return await reader.read(65536)
    finally:
        writer.close()


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes(range(256)) * 64,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00" + b"\x00\x00\x04\xfe" * 200,
    ],
    ids=["http1", "noise", "broken frames", "unknown frames"],
)
async def test_what_is_no_grpc_ends_its_own_connection_only(cluster, tmp_path, words):
    pair = await a_worker(cluster, tmp_path)
    async with open_channel(cluster.address, client_context(pair), "swarm-manager") as channel:
        await say(cluster, words, pair)
        with pytest.raises(NotFound, match="node not registered"):
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest(session_id="x"))


@given(noise=st.binary(max_size=200))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_bytes_as_a_message_get_an_answer(noise):
    async def send() -> None:
        cluster = Cluster()
        async with cluster.serving():
            pair = cluster.pair(new_id())
            raw = Raw(noise)
            method = methods.UnaryMethod(methods.UPDATE_TASK_STATUS.path, Raw, pb.UpdateTaskStatusResponse)
            async with open_channel(cluster.address, client_context(pair), "swarm-manager") as channel:
                with pytest.raises((InvalidArgument, NotFound)):
                    await channel.call(method, raw)

    asyncio.run(send())


class Raw:
    """Bytes that pass for a message."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def SerializeToString(self) -> bytes:  # noqa: N802 -- protobuf's name
        return self.content
