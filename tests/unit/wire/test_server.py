"""What a call is answered before and beside its handler."""

import asyncio
import errno

import pytest
from h2.events import ResponseReceived, StreamReset

from skep.errors import PermissionDenied
from skep.model.node import NodeRole
from skep.model.values.ids import ClusterId, NodeId
from skep.security.identity import NodeIdentity
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from skep.wire.methods import MethodAccess
from skep.wire.server import _Connection, _Server
from skep.wire.service import unary
from tests.support.clients.http2_rig import Rig, of

CLUSTER = ClusterId("cluster")
WORKER = NodeIdentity(node_id=NodeId("n1"), cluster_id=CLUSTER, role=NodeRole.WORKER)


async def never(_request: pb.HeartbeatRequest, _caller: Caller) -> pb.HeartbeatResponse:
    await asyncio.Event().wait()
    return pb.HeartbeatResponse()


async def answer_to(
    check_certificate=lambda *_: None, identity: NodeIdentity | None = WORKER, **headers: str
) -> dict[str, str]:
    """The headers that end a call of ``Heartbeat`` with an empty message, whose handler would wait for ever."""
    server = _Server([unary(methods.HEARTBEAT, never)], CLUSTER, check_certificate)
    rig = Rig()
    caller = Caller(identity=identity, address="10.0.0.1", disconnect=rig.connection.close)
    rig.answer = lambda stream: server.handle(stream, caller)
    await rig.turn()
    stream_id = rig.open(**{"path": methods.HEARTBEAT.path} | headers)
    rig.client.send_data(stream_id, bytes(5), end_stream=False)
    received = []
    async with asyncio.timeout(5):
        while not of(ResponseReceived, received):
            received += await rig.turn()
    assert of(StreamReset, received)
    return dict(of(ResponseReceived, received)[0].headers)


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"method": "GET"}, "405"), ({"content_type": "application/json"}, "415")],
    ids=["no POST", "no gRPC"],
)
async def test_a_request_that_is_not_grpc_gets_an_http_error(headers, status):
    assert await answer_to(**headers) == {":status": status}


async def test_an_unknown_method_is_unimplemented_in_words_that_grpc_go_takes_for_that():
    response = await answer_to(path="/x/Y")
    assert response == {
        ":status": "200",
        "content-type": "application/grpc+proto",
        "grpc-status": "12",
        "grpc-message": "unknown method /x/Y",
    }


async def test_an_engine_with_the_manager_token_gets_instructions():
    response = await answer_to(path="/docker.swarmkit.v1.RaftMembership/Join")
    assert response["grpc-status"] == "9"
    assert "join with the worker token" in response["grpc-message"]


async def test_a_call_ends_when_its_client_waits_no_longer():
    assert (await answer_to(grpc_timeout="10m"))["grpc-status"] == "4"


async def test_a_stranger_is_refused():
    assert (await answer_to(identity=None))["grpc-status"] == "7"


async def test_a_caller_with_a_revoked_certificate_is_refused():
    def removed(_identity: NodeIdentity, _access: MethodAccess) -> None:
        raise PermissionDenied("removed")

    assert (await answer_to(check_certificate=removed))["grpc-message"] == "removed"


async def test_a_mistake_of_ours_is_not_explained():
    def broken(_identity: NodeIdentity, _access: MethodAccess) -> None:
        raise ZeroDivisionError("secret")

    response = await answer_to(check_certificate=broken)
    assert (response["grpc-status"], response["grpc-message"]) == ("13", "internal error")


@pytest.mark.parametrize(
    ("error", "has_crashed"),
    [
        (None, True),
        (ConnectionResetError("reset"), True),
        (TimeoutError(errno.ETIMEDOUT, "timed out"), False),
        (OSError(errno.EHOSTUNREACH, "no route to host"), False),
    ],
    ids=["closed", "reset", "timed out", "unreachable"],
)
async def test_a_connection_closed_by_the_other_kernel_means_the_end_of_its_process(error, has_crashed):
    connection = _Connection(_Server([], CLUSTER, lambda *_: None))
    connection.is_open = True
    connection.connection_lost(error)
    assert connection.has_crashed is has_crashed


async def test_a_connection_closed_from_here_means_nothing_about_the_other_end():
    connection = _Connection(_Server([], CLUSTER, lambda *_: None))
    connection.is_open = False
    connection.connection_lost(None)
    assert not connection.has_crashed
