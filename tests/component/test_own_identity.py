"""A node's certificate speaks for that node only: what a second worker tries with its own, valid certificate."""

import asyncio

import msgspec
import pytest

from skep.errors import InvalidArgument, NotFound, PermissionDenied
from skep.model.container import ContainerSpec, FileTarget, SecretReference
from skep.model.logs import LogQuery
from skep.model.node import Node
from skep.model.secret import Secret, SecretSpec
from skep.model.service import NetworkAttachmentSpec, TaskSpec
from skep.model.task import Task, TaskState
from skep.model.values.ids import SecretId, TaskId, new_id
from skep.security.keypair import KeyPair
from skep.security.tls import client_context
from skep.store.kinds import Payload
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.client import open_channel
from tests.support.builders import a_task
from tests.support.managers.wire_calls import GUARDED
from tests.support.managers.wire_rig import Cluster, a_session, a_worker, an_agent, put, service_task, until

IN_A_SESSION = sorted(
    name
    for name, method in GUARDED.items()
    if "session_id" in method.request.DESCRIPTOR.fields_by_name and name != "SESSION"
)
"""Calls that name the session they are made in; ``SESSION`` begins one."""


@pytest.fixture
async def cluster():
    async with Cluster(heartbeat_s=3).serving() as serving:
        yield serving


@pytest.fixture
async def victim(cluster, tmp_path) -> KeyPair:
    return await a_worker(cluster, tmp_path / "victim")


@pytest.fixture
async def thief(cluster, tmp_path) -> KeyPair:
    return await a_worker(cluster, tmp_path / "thief")


def secret_task(node_id: str) -> tuple[Secret, Payload, msgspec.Struct, Task]:
    """A task on ``node_id`` with a secret."""
    secret = Secret(id=SecretId("s1"), spec=SecretSpec(name="password"))
    service, task = service_task(node_id)
    reference = SecretReference(file=FileTarget(name="p"), secret_id=secret.id, secret_name="password")
    template = TaskSpec(container_spec=ContainerSpec(image="busybox:1", secrets=(reference,)))
    service = msgspec.structs.replace(
        service, spec=msgspec.structs.replace(service.spec, task_template=template)
    )
    task = msgspec.structs.replace(task, spec=template)
    return secret, Payload(id="secret/s1", data=b"hidden"), service, task


@pytest.mark.parametrize("has_own", [False, True], ids=["without a session", "with one of its own"])
async def test_another_nodes_session_is_of_no_use(cluster, victim, thief, has_own):
    """Whatever the call: the session has to be the caller's."""
    assert {
        "HEARTBEAT",
        "HEARTBEATS",
        "ASSIGNMENTS",
        "REVISED_ASSIGNMENTS",
        "NETWORKS",
        "UPDATE_TASK_STATUS",
        "DESCRIBE",
    } <= set(IN_A_SESSION)
    await put(cluster, *secret_task(victim.identity.node_id))
    async with a_session(cluster, victim) as (_, stolen):
        before = cluster.node(victim.identity.node_id)
        if has_own:
            async with a_session(cluster, thief):
                outcomes = [await attempt(cluster, thief, name, stolen) for name in IN_A_SESSION]
        else:
            outcomes = [await attempt(cluster, thief, name, stolen) for name in IN_A_SESSION]
        expected = InvalidArgument if has_own else NotFound
        assert dict(zip(IN_A_SESSION, map(type, outcomes), strict=True)) == dict.fromkeys(
            IN_A_SESSION, expected
        )
        assert cluster.node(victim.identity.node_id) == before


async def attempt(cluster: Cluster, pair: KeyPair, name: str, session_id: str) -> object:
    """Make a call with a given session id; returns the error or the first response."""
    method = GUARDED[name]
    request = method.request(session_id=session_id)
    try:
        async with open_channel(cluster.address, client_context(pair), "swarm-manager") as channel:
            if isinstance(method, methods.UnaryMethod):
                return await channel.call(method, request)
            async with channel.stream(method) as call:
                await call.send(request, end=isinstance(method, methods.ServerStreaming))
                return await call.receive()
    except (InvalidArgument, NotFound) as error:
        return error


async def test_a_session_is_always_the_callers_own_whatever_it_asks_to_resume(cluster, victim, thief):
    async with a_session(cluster, victim) as (_, stolen):
        held = cluster.node(victim.identity.node_id).session
        message = await attempt(cluster, thief, "SESSION", stolen)
        assert isinstance(message, pb.SessionMessage)
        assert message.node.id == thief.identity.node_id
        assert message.session_id != stolen
        assert cluster.node(victim.identity.node_id).session == held


async def test_only_secrets_of_tasks_on_the_node_are_sent_to_it(cluster, victim, thief, tmp_path):
    await put(cluster, *secret_task(victim.identity.node_id))
    own_service, own = service_task(thief.identity.node_id)
    await put(cluster, own_service, own)
    async with (
        an_agent(cluster, victim, tmp_path / "victim") as (_, theirs),
        an_agent(cluster, thief, tmp_path / "thief") as (_, mine),
    ):
        await until(lambda: any(change.secrets for change in theirs.sets))
        await until(lambda: own.id in mine.tasks)
        assert not any(change.secrets for change in mine.sets)
        assert {task.task.node_id for task in mine.tasks.values()} == {thief.identity.node_id}


async def test_statuses_of_others_tasks_are_refused(cluster, victim, thief):
    service, task = service_task(victim.identity.node_id)
    await put(cluster, service, task)
    async with a_session(cluster, thief) as (channel, session_id):
        update = pb.UpdateTaskStatusRequest.TaskStatusUpdate(
            task_id=task.id, status=pb.TaskStatus(state=pb.TaskState.FAILED)
        )
        with pytest.raises(PermissionDenied, match="not assigned this node"):
            await channel.call(
                methods.UPDATE_TASK_STATUS,
                pb.UpdateTaskStatusRequest(session_id=session_id, updates=[update]),
            )
    assert cluster.view.get(Task, task.id).status.state is TaskState.ASSIGNED


async def test_logs_are_taken_from_nodes_that_were_asked_for_them_only(cluster, victim, thief, tmp_path):
    service, task = service_task(victim.identity.node_id)
    await put(cluster, service, task)
    async with an_agent(cluster, victim, tmp_path / "victim") as (agent, worker):
        await until(lambda: agent.node_id in cluster.logs.listeners)
        reading = asyncio.ensure_future(
            anext(cluster.logs.subscribe(LogQuery(services=(service.id,), follow=True)))
        )
        await until(lambda: worker.queries)
        (subscription,) = cluster.logs.subscriptions
        async with (
            open_channel(cluster.address, client_context(thief), "swarm-manager") as channel,
            channel.stream(methods.PUBLISH_LOGS) as call,
        ):
            await call.send(pb.PublishLogsMessage(subscription_id=subscription), end=True)
            with pytest.raises(NotFound, match="log subscription not found"):
                await call.receive()
        reading.cancel()
        await asyncio.wait([reading])


async def test_another_nodes_place_on_a_network_cannot_be_given_up(cluster, victim, thief):
    place = msgspec.structs.replace(
        a_task(new_id(), node=victim.identity.node_id, state=TaskState.RUNNING),
        spec=TaskSpec(network_attachment_spec=NetworkAttachmentSpec(container_id="c")),
    )
    await put(cluster, place)
    async with open_channel(cluster.address, client_context(thief), "swarm-manager") as channel:
        with pytest.raises((PermissionDenied, NotFound)):
            await channel.call(methods.DETACH_NETWORK, pb.DetachNetworkRequest(attachment_id=place.id))
    assert cluster.view.get(Task, TaskId(place.id)).desired_state is TaskState.RUNNING


async def test_a_node_cannot_describe_another(cluster, victim, thief):
    async with a_session(cluster, victim) as (_, stolen), a_session(cluster, thief) as (channel, own):
        before = cluster.node(victim.identity.node_id)
        forged = pb.NodeDescription(hostname="forged")
        with pytest.raises(InvalidArgument):
            await channel.call(methods.DESCRIBE, skep.DescribeRequest(session_id=stolen, description=forged))
        await channel.call(methods.DESCRIBE, skep.DescribeRequest(session_id=own, description=forged))
        assert cluster.node(victim.identity.node_id) == before
        assert cluster.view.get(Node, thief.identity.node_id).description.hostname == "forged"
