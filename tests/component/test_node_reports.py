"""The size and the rate of what a node reports about its tasks and itself, over real mutual TLS on loopback."""

import pytest

from skep.errors import Unavailable
from skep.manager.dispatcher.node_sessions.registration import RATE_MAX
from skep.manager.dispatcher.repeated_reports import AT_ONCE
from skep.manager.dispatcher.statuses import STATUS_BYTES_MAX
from skep.model.node_reports.description_size import DESCRIPTION_BYTES_MAX
from skep.model.task import Task, TaskState
from skep.model.values.encoding import to_json
from skep.model.values.ids import TaskId
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.client import ManagerChannel
from tests.support.managers.wire_rig import Cluster, a_session, a_worker, put, service_task


@pytest.fixture
async def cluster():
    async with Cluster(heartbeat_s=3).serving() as serving:
        yield serving


async def report(
    channel: ManagerChannel, session_id: str, task_id: TaskId, message: str, *, ports: int = 0
) -> None:
    """Report that the task runs, with so many published ports."""
    status = pb.TaskStatus(state=pb.TaskState.ValueType(TaskState.RUNNING.number), message=message)
    status.port_status.ports.extend(
        pb.PortConfig(name="x" * 100, target_port=80, published_port=30_000 + number)
        for number in range(ports)
    )
    update = pb.UpdateTaskStatusRequest.TaskStatusUpdate(task_id=task_id, status=status)
    request = pb.UpdateTaskStatusRequest(session_id=session_id, updates=[update])
    await channel.call(methods.UPDATE_TASK_STATUS, request)


async def test_a_status_is_cut_before_it_is_stored(cluster: Cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    service, task = service_task(pair.identity.node_id)
    await put(cluster, service, task)
    async with a_session(cluster, pair) as (channel, session_id):
        await report(channel, session_id, task.id, "x" * 100_000, ports=1000)
    status = cluster.view.get(Task, task.id).status
    assert status.state is TaskState.RUNNING
    assert status.port_status.ports
    assert len(to_json(status)) <= STATUS_BYTES_MAX


async def test_a_node_that_repeats_a_state_is_slowed_down_and_its_last_report_is_kept(
    cluster: Cluster, tmp_path
):
    pair = await a_worker(cluster, tmp_path)
    service, task = service_task(pair.identity.node_id)
    await put(cluster, service, task)
    last = f"{4 * AT_ONCE}"
    async with a_session(cluster, pair) as (channel, session_id):
        for number in range(4 * AT_ONCE + 1):
            await report(channel, session_id, task.id, f"{number}")
        assert cluster.view.get(Task, task.id).status.message != last, "written later"
        await cluster.until(lambda view: view.get(Task, task.id).status.message == last)


async def test_descriptions_are_cut_and_few(cluster: Cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    large = pb.NodeDescription(hostname="w1")
    large.engine.labels["zone"] = "z" * 2 * DESCRIPTION_BYTES_MAX
    async with a_session(cluster, pair) as (channel, session_id):
        request = skep.DescribeRequest(session_id=session_id, description=large)
        for _ in range(RATE_MAX):
            await channel.call(methods.DESCRIBE, request)
        with pytest.raises(Unavailable, match="registers too often"):
            await channel.call(methods.DESCRIBE, request)
    description = cluster.node(pair.identity.node_id).description
    assert description.hostname == "w1"
    assert len(to_json(description)) <= DESCRIPTION_BYTES_MAX
