"""Places of plain containers on cluster networks: who gets them, and when they are free again."""

import asyncio

import pytest
from msgspec.structs import replace

from skep.agent.executor.attaching import ClusterAttachments
from skep.agent.executor.interface import Rejected
from skep.errors import NotFound, Unavailable
from skep.model.ids import ContainerId, TaskId
from skep.model.sandbox import EndpointRequest
from skep.model.service import NetworkAttachmentSpec, TaskSpec
from skep.model.task import AssignedTask, NetworkAttachment
from tests.support.builders import a_task, an_overlay

BOX = ContainerId("b" * 64)
WISH = EndpointRequest(network="net1", aliases=("box",))


def a_place(id: str) -> AssignedTask:
    place = NetworkAttachment(network=an_overlay("net1", subnet="10.0.1.0/24"), addresses=("10.0.1.5/24",))
    spec = TaskSpec(network_attachment_spec=NetworkAttachmentSpec(container_id=BOX))
    return AssignedTask(task=replace(a_task(id), spec=spec, networks_attachments=(place,)))


class Managers:
    """Give the place ``t1``; its assignment is the test's to send."""

    def __init__(self) -> None:
        self.detached: list[str] = []
        self.asked = asyncio.Event()
        self.error: Unavailable | None = None

    async def attach_network(self, container_id: ContainerId, wish: EndpointRequest) -> TaskId:
        self.asked.set()
        if self.error is not None:
            raise self.error
        return TaskId("t1")

    async def detach_network(self, id: TaskId) -> None:
        self.detached.append(id)


async def test_a_place_is_the_containers_until_it_gives_it_back() -> None:
    attachments, managers = ClusterAttachments(), Managers()
    attachments.ask_through(managers)
    taking = asyncio.ensure_future(attachments.take(BOX, WISH))
    await managers.asked.wait()
    controller = attachments.controller(a_place("t1"))
    await controller.prepare()
    place = await taking
    assert (place.attachment, place.addresses) == ("t1", ("10.0.1.5/24",))
    ended = asyncio.ensure_future(controller.wait())
    await attachments.give_back(TaskId("t1"))
    assert ((await ended).exit_code, managers.detached) == (0, ["t1"])


async def test_a_place_that_nobody_waits_for_is_rejected() -> None:
    attachments, managers = ClusterAttachments(), Managers()
    attachments.ask_through(managers)
    taking = asyncio.ensure_future(attachments.take(BOX, WISH))
    await managers.asked.wait()
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    with pytest.raises(Rejected):
        await attachments.controller(a_place("t1")).prepare()


async def test_without_a_swarm_or_a_manager_there_is_no_place() -> None:
    attachments, managers = ClusterAttachments(), Managers()
    with pytest.raises(NotFound, match="network net1 not found"):
        await attachments.take(BOX, WISH)
    attachments.ask_through(managers)
    managers.error = Unavailable("no manager is reached at present")
    with pytest.raises(Unavailable):
        await attachments.take(BOX, WISH)
    assert managers.detached == []


async def test_places_of_running_containers_outlive_the_process() -> None:
    attachments = ClusterAttachments()
    attachments.restore([(TaskId("t1"), BOX)])
    controller = attachments.controller(a_place("t1"))
    await controller.prepare()
    waiting = asyncio.ensure_future(controller.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    await attachments.give_back(TaskId("t1"))
    await waiting
    gone = attachments.controller(a_place("t2"))
    assert (await gone.wait()).exit_code == 0  # its container did not survive
