"""Who may call what, and how much they may send."""

import pytest

from skep.errors import (
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from skep.model.ids import new_id
from skep.model.node import NodeRole
from skep.security.tls import client_context, joining_context
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from skep.wire.client import connected
from tests.wire_rig import (
    Cluster,
    a_worker,
)


@pytest.fixture
async def cluster():
    async with Cluster().serving() as serving:
        yield serving


async def test_without_a_certificate_only_joining_is_possible(cluster):
    context = joining_context(cluster.authority.root_pem)
    async with connected(cluster.address, context, "swarm-manager") as channel:
        with pytest.raises(PermissionDenied):
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest())


async def test_a_certificate_of_another_cluster_counts_for_nothing(cluster):
    pair = cluster.pair(new_id(), cluster="another-cluster")
    async with connected(cluster.address, client_context(pair), "swarm-manager") as channel:
        with pytest.raises(PermissionDenied):
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest())


async def test_a_certificate_of_another_root_ends_the_connection(cluster):
    stranger = Cluster()
    pair = stranger.pair(new_id(), cluster=cluster.id).with_root(cluster.authority.root_pem)
    with pytest.raises(Unavailable):
        async with connected(cluster.address, client_context(pair), "swarm-manager") as channel:
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest())


async def test_a_node_does_not_talk_to_a_manager_of_another_root(cluster):
    pair = Cluster().pair(new_id())
    with pytest.raises(Unavailable, match="not trusted"):
        async with connected(cluster.address, client_context(pair), "swarm-manager"):
            pass


async def test_a_workers_certificate_does_not_pass_for_a_managers():
    cluster = Cluster()
    async with cluster.serving():
        pair = cluster.pair(new_id(), NodeRole.WORKER)
        async with connected(cluster.address, client_context(pair), "swarm-manager") as channel:
            with pytest.raises((PermissionDenied, Unimplemented)):
                await channel.call(methods.GET_UNLOCK_KEY, pb.GetUnlockKeyRequest())


async def test_an_unknown_method_is_unimplemented(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    method = methods.Unary("/docker.swarmkit.v1.Dispatcher/Tasks", pb.HeartbeatRequest, pb.HeartbeatResponse)
    async with connected(cluster.address, client_context(pair), "swarm-manager") as channel:
        with pytest.raises(Unimplemented):
            await channel.call(method, pb.HeartbeatRequest())


async def test_an_engine_with_the_manager_token_hears_why_it_cannot_be_one(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    method = methods.Unary(
        "/docker.swarmkit.v1.RaftMembership/Join", pb.HeartbeatRequest, pb.HeartbeatResponse
    )
    async with connected(cluster.address, client_context(pair), "swarm-manager") as channel:
        with pytest.raises(FailedPrecondition, match="workers only"):
            await channel.call(method, pb.HeartbeatRequest())


async def test_a_message_over_four_megabytes_is_refused_and_the_connection_lives(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with connected(cluster.address, client_context(pair), "swarm-manager") as channel:
        with pytest.raises(ResourceExhausted, match="larger than max"):
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest(session_id="x" * (5 << 20)))
        with pytest.raises(NotFound, match="node not registered"):
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest(session_id="x"))


async def test_a_stranger_may_send_little(cluster):
    context = joining_context(cluster.authority.root_pem)
    async with connected(cluster.address, context, "swarm-ca") as channel:
        with pytest.raises(ResourceExhausted, match="larger than max"):
            await channel.call(
                methods.ISSUE_NODE_CERTIFICATE, pb.IssueNodeCertificateRequest(csr=b"x" * 100_000)
            )
