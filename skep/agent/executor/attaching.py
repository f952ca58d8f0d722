"""Places of plain containers on cluster networks: asked of the managers, given by an assignment, held by the container.

``docker run --network`` of an attachable network makes a task without a service (``attachment_service``), assigned to
this node.  Its controller starts nothing: the task runs while its container holds the place, and ends with it.  So
what a manager was not told by ``detach`` (none was there, the node process died) it hears as the end of a task.

Source: moby, daemon/cluster/executor/container/attachment.go, daemon/cluster/networks.go (AttachNetwork).
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import msgspec
import structlog

from skep.agent.executor.adapter import endpoint_configs
from skep.agent.executor.interface import Rejected, Running, TaskExit
from skep.errors import NotFound, SkepError, Unavailable
from skep.model.ids import ContainerId, NetworkId, TaskId
from skep.model.sandbox import EndpointConfig, EndpointRequest
from skep.model.task import AssignedTask, ContainerStatus

log = structlog.get_logger()

PLACE_SECONDS_MAX = 20.0
"""From the managers' yes to the address; Docker waits as long."""
_TIMED_OUT = (
    "attaching to network failed, make sure your network options are correct and check manager logs: "
    "context deadline exceeded"
)

Evict = Callable[[ContainerId, NetworkId], Awaitable[None]]
"""Takes a running container from a network."""


class Managers(Protocol):
    """The node's session with a manager (``node.agent.Agent``)."""

    async def attach_network(self, container_id: ContainerId, wish: EndpointRequest) -> TaskId:
        """Ask for a place.  Raises: SkepError, in the manager's words; Unavailable: there is no session."""

    async def detach_network(self, id: TaskId) -> None:
        """Give a place back.  Raises: SkepError."""


class _Held:
    """A place of this node.  It is ``claimed`` once its container has it, and ``gone`` when it has it no more."""

    def __init__(self, container_id: ContainerId, place: EndpointConfig | None) -> None:
        self.container_id = container_id
        self.place = place
        """None: of an earlier process, whose container knows it."""
        self.is_claimed = place is None
        self.gone = asyncio.Event()


class ClusterAttachments:
    """The places of this node's plain containers on cluster networks."""

    def __init__(self) -> None:
        self._managers: Managers | None = None
        self._evict: Evict | None = None
        self._asking: Counter[ContainerId] = Counter()
        self._held: dict[TaskId, _Held] = {}
        self._arrived = asyncio.Event()

    def ask_through(self, managers: Managers | None) -> None:
        """Whom to ask from now on; None: the node is in no swarm."""
        self._managers = managers

    def evict_by(self, evict: Evict) -> None:
        """How a container leaves a network when the cluster wants its place back."""
        self._evict = evict

    def restore(self, held: Iterable[tuple[TaskId, ContainerId]]) -> None:
        """Places that containers of an earlier process of this node still hold."""
        for id, container_id in held:
            self._held[id] = _Held(container_id, None)

    async def take(self, container_id: ContainerId, wish: EndpointRequest) -> EndpointConfig:
        """A place with its address.  ``wish.aliases``: the container's name first.

        Raises: NotFound: the node is in no swarm, so there is no such network; SkepError, in Docker's words.
        """
        managers = self._managers
        if managers is None:
            raise NotFound(f"network {wish.network} not found")
        self._asking[container_id] += 1
        id = TaskId("")
        try:
            id = await managers.attach_network(container_id, wish)
            async with asyncio.timeout(PLACE_SECONDS_MAX):
                return await self._claim(id)
        except TimeoutError as error:
            raise Unavailable(_TIMED_OUT) from error
        finally:
            self._asking[container_id] -= 1
            if not self._asking[container_id]:
                del self._asking[container_id]
                self._drop_unclaimed(container_id)
            if id and id not in self._held:
                await asyncio.shield(self._tell(id))

    async def give_back(self, id: TaskId) -> None:
        """The container has left the network.  Harmless when that is known."""
        held = self._held.pop(id, None)
        if held is not None:
            held.gone.set()
            await self._tell(id)

    async def _claim(self, id: TaskId) -> EndpointConfig:
        """Return when the assignment is here."""
        while (held := self._held.get(id)) is None:
            self._arrived.clear()
            await self._arrived.wait()
        assert held.place is not None, "a place of an earlier process is not asked for"
        held.is_claimed = True
        return held.place

    def _drop_unclaimed(self, container_id: ContainerId) -> None:
        """What was given to a container after it had stopped waiting."""
        for id, held in tuple(self._held.items()):
            if held.container_id == container_id and not held.is_claimed:
                del self._held[id]
                held.gone.set()

    async def _tell(self, id: TaskId) -> None:
        """Best effort: the end of the task tells the same as soon as a manager listens."""
        if self._managers is None:
            return
        try:
            await self._managers.detach_network(id)
        except SkepError as error:
            log.info("place given back by the end of its task", task=id, reason=str(error))

    # --- as tasks -----------------------------------------------------------------------------------------------

    def controller(self, task: AssignedTask) -> "AttachmentController":
        return AttachmentController(self, task)

    def arrive(self, task: AssignedTask) -> None:
        """The managers have given a place.  Raises: Rejected: nobody waits for it."""
        id, container_id = task.task.id, container_of(task)
        if id in self._held:
            return
        if not self._asking[container_id]:
            raise Rejected("the container that asked for this place does not want it any more")
        (place, *_) = endpoint_configs(task.task) or (None,)
        if place is None:
            raise Rejected("this place is on no overlay network")
        self._held[id] = _Held(container_id, msgspec.structs.replace(place, attachment=id))
        self._arrived.set()

    async def wait_gone(self, id: TaskId) -> None:
        """Return when nobody here holds the place."""
        held = self._held.get(id)
        if held is not None:
            await held.gone.wait()

    async def evict(self, task: AssignedTask) -> None:
        """The cluster wants the place back: its container leaves the network and runs on."""
        id = task.task.id
        held = self._held.get(id)
        if held is not None and held.is_claimed and self._evict is not None:
            for attachment in task.task.networks_attachments:
                if attachment.network is not None:
                    await self._evict(held.container_id, attachment.network.id)
        held = self._held.pop(id, None)
        if held is not None:
            held.gone.set()


class AttachmentController:
    """The seven verbs of a task that is a place."""

    def __init__(self, attachments: ClusterAttachments, task: AssignedTask) -> None:
        self._attachments = attachments
        self._task = task

    def observed(self) -> Running | None:
        return Running(container=ContainerStatus(container_id=container_of(self._task)))

    async def prepare(self) -> None:
        self._attachments.arrive(self._task)

    async def start(self) -> Running:
        return Running(container=ContainerStatus(container_id=container_of(self._task)))

    async def wait(self) -> TaskExit:
        await self._attachments.wait_gone(self._task.task.id)
        return TaskExit(exit_code=0)

    async def shutdown(self, drain_s: float = 0.0) -> None:
        await self._attachments.evict(self._task)

    async def terminate(self) -> None:
        await self._attachments.evict(self._task)

    async def update(self, task: AssignedTask) -> None:
        self._task = task

    async def remove(self) -> None:
        await self._attachments.evict(self._task)


def is_attachment(task: AssignedTask) -> bool:
    """Whether the task is a plain container's place instead of a container."""
    return task.task.spec.network_attachment_spec is not None


def container_of(task: AssignedTask) -> ContainerId:
    """Whose place it is."""
    attachment = task.task.spec.network_attachment_spec
    return ContainerId(attachment.container_id if attachment is not None else "")
