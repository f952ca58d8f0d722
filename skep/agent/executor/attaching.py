"""Endpoints of plain containers on cluster networks, requested from the managers and received by assignment.

``docker run --network`` of an attachable network creates a task without a service (``attachment_service``), assigned to
this node.  Its controller starts nothing: the task runs while its container has the endpoint.  If a ``detach`` does not
reach a manager, the manager learns from the end of the task that the endpoint is free.

Source: moby, daemon/cluster/executor/container/attachment.go, daemon/cluster/networks.go (AttachNetwork).
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import msgspec
import structlog

from skep.agent.executor.adapter import endpoint_configs
from skep.agent.executor.interface import OnUnhealthy, Rejected, Running, TaskExit, ignored
from skep.agent.session.session_state import SessionState
from skep.api.errors import rpc_words
from skep.errors import NotFound, SkepError, Unavailable
from skep.model.networks.sandbox import EndpointConfig, EndpointRequest
from skep.model.task import AssignedTask, ContainerStatus
from skep.model.task_end import TaskEnd
from skep.model.values.ids import ContainerId, NetworkId, TaskId
from skep.wire import methods
from skep.wire import swarm_pb2 as pb

log = structlog.get_logger()

ATTACH_SECONDS_MAX = 15.0
"""Seconds to wait for a manager.

It responds after it has written the task, which may have to wait for the election of a leader.
"""
DETACH_SECONDS_MAX = 3.0
"""Upper limit in seconds for how long a detach may delay a container's end.

If it fails, the end of the task reports the same to the manager.
"""
ENDPOINT_SECONDS_MAX = 20.0
"""Seconds to wait for the assigned address after the managers' response, as in Docker."""
_TIMED_OUT = (
    "attaching to network failed, make sure your network options are correct and check manager logs: "
    "context deadline exceeded"
)

Evict = Callable[[ContainerId, NetworkId], Awaitable[None]]
"""Disconnects a running container from a network."""


class EndpointRequests(Protocol):
    """Requests endpoints from the managers (implemented by ``SessionRequests``)."""

    async def attach_network(self, container_id: ContainerId, request: EndpointRequest) -> TaskId:
        """Request an endpoint.

        Raises:
            NotFound: The node is not in a swarm, so the network does not exist.
            SkepError: The managers refused, in Docker's words.
            Unavailable: There is no session.
        """

    async def detach_network(self, id: TaskId) -> None:
        """Release an endpoint.  Raises: SkepError."""


class SessionRequests:
    """Requests endpoints from the manager that this node has its session with."""

    def __init__(self, session: SessionState) -> None:
        self._session = session

    async def attach_network(self, container_id: ContainerId, request: EndpointRequest) -> TaskId:
        """Request an endpoint.

        Raises:
            NotFound: The node is not in a swarm, so the network does not exist.
            SkepError: The managers refused, in Docker's words.
            Unavailable: There is no session.
        """
        if not self._session.node_id:
            raise NotFound(f"network {request.network} not found")
        config = pb.NetworkAttachmentConfig(
            target=request.network,
            aliases=request.aliases,
            addresses=[one for one in (request.address, request.address6) if one],
        )
        message = pb.AttachNetworkRequest(config=config, container_id=container_id)
        with rpc_words(f"Could not attach to network {request.network}"):
            response = await self._session.channel.call(
                methods.ATTACH_NETWORK, message, timeout_s=ATTACH_SECONDS_MAX
            )
        return TaskId(response.attachment_id)

    async def detach_network(self, id: TaskId) -> None:
        """Release an endpoint.  Raises: SkepError."""
        message = pb.DetachNetworkRequest(attachment_id=id)
        await self._session.channel.call(methods.DETACH_NETWORK, message, timeout_s=DETACH_SECONDS_MAX)


class _Held:
    """An endpoint of this node.

    ``is_claimed`` is set once the container uses the endpoint, and ``released`` when the container has given it back.
    """

    def __init__(self, container_id: ContainerId, endpoint: EndpointConfig | None) -> None:
        self.container_id = container_id
        self.endpoint = endpoint
        """None if the endpoint is from an earlier process: the container's record then describes it."""
        self.is_claimed = endpoint is None
        self.released = asyncio.Event()


class ClusterAttachments:
    """The endpoints of this node's plain containers on cluster networks."""

    def __init__(self, managers: EndpointRequests) -> None:
        self._managers = managers
        self._requesting: Counter[ContainerId] = Counter()
        self._held: dict[TaskId, _Held] = {}
        self._arrived = asyncio.Event()

    def restore(self, held: Iterable[tuple[TaskId, ContainerId]]) -> None:
        """Adopt endpoints of containers that an earlier process of this node started."""
        for id, container_id in held:
            self._held[id] = _Held(container_id, None)

    async def take(self, container_id: ContainerId, request: EndpointRequest) -> EndpointConfig:
        """Request an endpoint and return it with its address.

        The first of ``request.aliases`` is the container's name.

        Raises:
            NotFound: The node is not in a swarm, so the network does not exist.
            SkepError: The managers refused, in Docker's words.
        """
        self._requesting[container_id] += 1
        id = TaskId("")
        try:
            id = await self._managers.attach_network(container_id, request)
            async with asyncio.timeout(ENDPOINT_SECONDS_MAX):
                return await self._claim(id)
        except TimeoutError as error:
            raise Unavailable(_TIMED_OUT) from error
        finally:
            self._requesting[container_id] -= 1
            if not self._requesting[container_id]:
                del self._requesting[container_id]
                self._drop_unclaimed(container_id)
            if id and id not in self._held:
                await asyncio.shield(self._detach(id))

    async def give_back(self, id: TaskId) -> None:
        """Release an endpoint after the container has left the network.  Idempotent."""
        held = self._held.pop(id, None)
        if held is not None:
            held.released.set()
            await self._detach(id)

    async def _claim(self, id: TaskId) -> EndpointConfig:
        """Wait for the assignment and return its endpoint."""
        while (held := self._held.get(id)) is None:
            self._arrived.clear()
            await self._arrived.wait()
        assert held.endpoint is not None, "an endpoint of an earlier process is not requested"
        held.is_claimed = True
        return held.endpoint

    def _drop_unclaimed(self, container_id: ContainerId) -> None:
        """Release endpoints that were assigned to a container after it had stopped waiting."""
        for id, held in tuple(self._held.items()):
            if held.container_id == container_id and not held.is_claimed:
                del self._held[id]
                held.released.set()

    async def _detach(self, id: TaskId) -> None:
        """Detach.  A failure is only logged, because a manager learns the same from the end of the task."""
        try:
            await self._managers.detach_network(id)
        except SkepError as error:
            log.info("endpoint released by the end of its task", task=id, reason=str(error))

    # --- as tasks -----------------------------------------------------------------------------------------------

    def arrive(self, task: AssignedTask) -> None:
        """Record an endpoint that the managers have assigned.  Raises: Rejected: no container waits for it."""
        id, container_id = task.task.id, container_of(task)
        if id in self._held:
            return
        if not self._requesting[container_id]:
            raise Rejected("the container that requested this endpoint no longer waits for it")
        (endpoint, *_) = endpoint_configs(task.task) or (None,)
        if endpoint is None:
            raise Rejected("this endpoint has no overlay network")
        self._held[id] = _Held(container_id, msgspec.structs.replace(endpoint, attachment=id))
        self._arrived.set()

    async def wait_released(self, id: TaskId) -> None:
        """Wait until the endpoint is released here."""
        held = self._held.get(id)
        if held is not None:
            await held.released.wait()

    def holder_of(self, id: TaskId) -> ContainerId | None:
        """Return the container that has the endpoint, or None."""
        held = self._held.get(id)
        return held.container_id if held is not None and held.is_claimed else None

    def release(self, id: TaskId) -> None:
        """Record that the container no longer uses the endpoint.  Idempotent."""
        held = self._held.pop(id, None)
        if held is not None:
            held.released.set()


class AttachmentController:
    """Runs an attachment task (see ``Controller``).  ``evict`` disconnects a running container from a network."""

    def __init__(self, attachments: ClusterAttachments, evict: Evict, task: AssignedTask) -> None:
        self._attachments = attachments
        self._evict = evict
        self._task = task

    def observed(self) -> Running | None:
        return Running(container=ContainerStatus(container_id=container_of(self._task)))

    async def prepare(self) -> None:
        self._attachments.arrive(self._task)

    async def start(self) -> Running:
        return Running(container=ContainerStatus(container_id=container_of(self._task)))

    async def wait(self, on_unhealthy: OnUnhealthy = ignored) -> TaskExit:
        await self._attachments.wait_released(self._task.task.id)
        return TaskExit(exit_code=0)

    async def fetch_end(self) -> TaskEnd | None:
        return None

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Take the endpoint back.  The container leaves the network and keeps running."""
        id = self._task.task.id
        container_id = self._attachments.holder_of(id)
        for attachment in self._task.task.networks_attachments:
            if container_id is not None and attachment.network is not None:
                await self._evict(container_id, attachment.network.id)
        self._attachments.release(id)

    async def terminate(self) -> None:
        await self.shutdown()

    async def update(self, task: AssignedTask) -> None:
        self._task = task

    async def remove(self) -> None:
        await self.shutdown()


def is_attachment(task: AssignedTask) -> bool:
    """Return whether the task stands for a plain container's endpoint and runs no container itself."""
    return task.task.spec.network_attachment_spec is not None


def container_of(task: AssignedTask) -> ContainerId:
    """Return the plain container of an attachment task."""
    attachment = task.task.spec.network_attachment_spec
    return ContainerId(attachment.container_id if attachment is not None else "")
