"""Places of plain containers on cluster networks: who gets them, and when they are free again."""

import asyncio

import pytest
from msgspec.structs import replace

from skep.agent.executor.attaching import AttachmentController, ClusterAttachments, SessionRequests
from skep.agent.executor.interface import Rejected
from skep.agent.session.session_state import SessionState
from skep.aio.clock import SystemClock
from skep.errors import NotFound, Unavailable
from skep.model.networks.sandbox import EndpointRequest
from skep.model.service import NetworkAttachmentSpec, TaskSpec
from skep.model.task import AssignedTask, NetworkAttachment
from skep.model.values.ids import ContainerId, NetworkId, NodeId, TaskId
from tests.support.builders import a_task, an_overlay

BOX = ContainerId("b" * 64)
REQUEST = EndpointRequest(network="net1", aliases=("box",))


def a_task_for(id: str) -> AssignedTask:
    place = NetworkAttachment(network=an_overlay("net1", subnet="10.0.1.0/24"), addresses=("10.0.1.5/24",))
    spec = TaskSpec(network_attachment_spec=NetworkAttachmentSpec(container_id=BOX))
    return AssignedTask(task=replace(a_task(id), spec=spec, networks_attachments=(place,)))


class Managers:
    """Give the place ``t1``; its assignment is the test's to send."""

    def __init__(self) -> None:
        self.detached: list[str] = []
        self.asked = asyncio.Event()
        self.error: Unavailable | None = None

    async def attach_network(self, container_id: ContainerId, request: EndpointRequest) -> TaskId:
        self.asked.set()
        if self.error is not None:
            raise self.error
        return TaskId("t1")

    async def detach_network(self, id: TaskId) -> None:
        self.detached.append(id)


async def never(container_id: ContainerId, network_id: NetworkId) -> None:
    raise AssertionError(f"{container_id} is not taken from {network_id}")


async def test_an_endpoint_is_the_containers_until_it_is_released() -> None:
    managers = Managers()
    attachments = ClusterAttachments(managers)
    taking = asyncio.ensure_future(attachments.take(BOX, REQUEST))
    await managers.asked.wait()
    controller = AttachmentController(attachments, never, a_task_for("t1"))
    await controller.prepare()
    endpoint = await taking
    assert (endpoint.attachment, endpoint.addresses) == ("t1", ("10.0.1.5/24",))
    ended = asyncio.ensure_future(controller.wait())
    await attachments.give_back(TaskId("t1"))
    assert ((await ended).exit_code, managers.detached) == (0, ["t1"])


async def test_an_endpoint_that_no_container_waits_for_is_rejected() -> None:
    managers = Managers()
    attachments = ClusterAttachments(managers)
    taking = asyncio.ensure_future(attachments.take(BOX, REQUEST))
    await managers.asked.wait()
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    with pytest.raises(Rejected):
        await AttachmentController(attachments, never, a_task_for("t1")).prepare()


async def test_without_a_swarm_or_a_manager_there_is_no_endpoint() -> None:
    session = SessionState(SystemClock())
    attachments = ClusterAttachments(SessionRequests(session))
    with pytest.raises(NotFound, match="network net1 not found"):
        await attachments.take(BOX, REQUEST)
    session.join(NodeId("n1"))
    with pytest.raises(Unavailable, match="no manager can be reached"):
        await attachments.take(BOX, REQUEST)
    session.leave()
    with pytest.raises(NotFound, match="network net1 not found"):
        await attachments.take(BOX, REQUEST)


async def test_an_endpoint_that_no_manager_gave_is_not_released() -> None:
    managers = Managers()
    managers.error = Unavailable("no manager can be reached now")
    with pytest.raises(Unavailable):
        await ClusterAttachments(managers).take(BOX, REQUEST)
    assert managers.detached == []


async def test_endpoints_of_running_containers_outlive_the_process() -> None:
    attachments = ClusterAttachments(Managers())
    attachments.restore([(TaskId("t1"), BOX)])
    controller = AttachmentController(attachments, never, a_task_for("t1"))
    await controller.prepare()
    waiting = asyncio.ensure_future(controller.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    await attachments.give_back(TaskId("t1"))
    await waiting
    gone = AttachmentController(attachments, never, a_task_for("t2"))
    assert (await gone.wait()).exit_code == 0  # its container did not survive


async def test_an_endpoint_that_the_cluster_takes_back_is_left_by_its_container() -> None:
    attachments, left = ClusterAttachments(Managers()), []

    async def evict(container_id: ContainerId, network_id: NetworkId) -> None:
        left.append((container_id, network_id))

    attachments.restore([(TaskId("t1"), BOX)])
    task = a_task_for("t1")
    controller = AttachmentController(attachments, evict, task)
    await controller.shutdown()
    (attachment,) = task.task.networks_attachments
    assert attachment.network is not None
    assert left == [(BOX, attachment.network.id)]
    assert (await controller.wait()).exit_code == 0
    await controller.remove()
    assert len(left) == 1
