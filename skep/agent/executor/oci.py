"""Tasks as containers under runc: the executor skep nodes have by default.

A controller is thin: what a task wants becomes a ``ContainerWish``, and ``Containers`` does the rest.  The
container of a task is found by its label, so nothing about tasks has to be remembered here.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import msgspec
import structlog

from skep.agent.executor import wish
from skep.agent.executor.attaching import ClusterAttachments, is_attachment
from skep.agent.executor.interface import Controller, Rejected, Running, TaskExit
from skep.agent.executor.mounting import Mounting
from skep.agent.executor.pulling import Images, Pulling
from skep.agent.executor.template import expand
from skep.agent.executor.wish import NodeFacts
from skep.aio.clock import Clock
from skep.aio.guard import persist
from skep.dataplane.container_network import ContainerNetwork
from skep.dataplane.ingress.mesh import Mesh
from skep.dataplane.local.keeper import GatewayBridge
from skep.dataplane.naming import Naming
from skep.dataplane.netns.connections import inbound_of
from skep.dataplane.overlays import Overlays
from skep.dataplane.probe.prober import PathProber
from skep.engine.bundle import Bundles
from skep.engine.container import Container, ContainerWish, NotRunning
from skep.engine.containers import Containers
from skep.engine.health import HealthStatus
from skep.engine.mounts.payloads import Payloads
from skep.engine.mounts.volumes import Volumes
from skep.errors import InvalidArgument, NotFound, SkepError
from skep.model.ids import NodeId, TaskId
from skep.model.labels import LABEL_TASK_ID
from skep.model.meta import Driver
from skep.model.planes import is_overlay
from skep.model.task import AssignedTask, ContainerStatus

log = structlog.get_logger()

DRAIN_LOOK_S = 0.05
"""The kernel announces the end of a connection to its owner alone."""

UNHEALTHY = "dockerexec: unhealthy container"
"""Docker's words, in ``docker service ps``."""


class OciExecutor:
    """Runs tasks as containers."""

    name = "oci"

    def __init__(
        self,
        *,
        containers: Containers,
        bundles: Bundles,
        images: Images,
        payloads: Payloads,
        volumes: Volumes,
        clock: Clock,
        hostname: str,
        log_default: Driver | None = None,
        overlays: Overlays,
        mesh: Mesh,
        prober: PathProber,
        gateway: GatewayBridge | None = None,
        naming: Naming | None = None,
        attachments: ClusterAttachments,
        network: ContainerNetwork,
    ) -> None:
        """
        Args:
            log_default: the node's log driver with its options, for tasks that name none.
            naming: has names answered in containers; None: nobody does.
            gateway: the bridge by which containers reach the world; whoever shows the node's networks asks for it.
            attachments: places of plain containers, which are tasks too.
            network: where they are changed while they run.
        """
        self.containers = containers
        self.bundles = bundles
        self.images = images
        self.payloads = payloads
        self.volumes = volumes
        self.mounting = Mounting(volumes, bundles)
        self.gateway = gateway
        self.naming = naming
        self.overlays = overlays
        self.mesh = mesh
        self.prober = prober
        self.attachments = attachments
        self.network = network
        self.pulling = Pulling(images, clock)
        self.clock = clock
        self.log_default = log_default or Driver(name="json-file")
        self.node = NodeFacts(id=NodeId(""), hostname=hostname, architecture=os.uname().machine)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Find the containers of earlier processes again; they go on when the block ends."""
        opening = partial(asyncio.to_thread, self.payloads.open)
        await persist(opening, "no place for secrets yet", clock=self.clock, longest_s=10.0)
        async with self.containers.running():
            yield

    def controller(self, task: AssignedTask, registry_auth: str = "") -> Controller:
        """Raises nothing: what is wrong with the task is said by ``prepare``."""
        if is_attachment(task):
            return self.attachments.controller(task)
        return OciController(self, task, registry_auth)

    async def leftovers(self) -> Sequence[TaskId]:
        found = {one.labels[LABEL_TASK_ID] for one in self.containers.list() if LABEL_TASK_ID in one.labels}
        return [TaskId(id) for id in sorted(found)]

    async def discard(self, task_id: TaskId) -> None:
        for container in self.containers.list():
            if container.labels.get(LABEL_TASK_ID) == task_id:
                await self.remove_container(container)

    def identify(self, node_id: NodeId) -> None:
        self.node = msgspec.structs.replace(self.node, id=node_id)
        self.overlays.identify(node_id)
        self.mesh.identify(node_id)

    async def remove_container(self, container: Container) -> None:
        """Remove a task's container with its secrets and its nameless volumes."""
        try:
            await self.containers.remove(container.id, force=True)
        except NotFound:
            pass  # somebody was faster
        self.payloads.forget(container.labels.get(LABEL_TASK_ID, ""))
        await self.mounting.discard_nameless(container.config.mounts)


class OciController:
    """One task's container."""

    def __init__(self, executor: OciExecutor, task: AssignedTask, registry_auth: str) -> None:
        self._executor = executor
        self._containers = executor.containers
        self._task = task
        self._registry_auth = registry_auth

    def observed(self) -> Running | None:
        container = self._container()
        return None if container is None else _running(container)

    async def prepare(self) -> None:
        if self._container() is not None:
            return
        spec = wish.container_spec(self._task)
        image = await self._executor.pulling.image(spec.image, self._registry_auth)
        defaults = image.config.defaults
        try:
            mounts = [
                *self._executor.mounting.points(spec.mounts, defaults.volumes or {}, self._expand),
                *self._executor.payloads.mounts(self._task.task.id, spec.secrets, spec.configs),
            ]
            async with self._executor.images.pinned(image.chain):
                container = await self._containers.create(
                    ContainerWish(
                        name=self._task.name,
                        image=spec.image,
                        image_id=image.id,
                        layers=tuple(map(str, self._executor.images.layers(image))),
                        config=wish.config(
                            self._task, self._executor.node, defaults, mounts, self._executor.log_default
                        ),
                        labels=wish.labels(self._task, self._executor.node, defaults),
                    )
                )
        except InvalidArgument as error:
            raise Rejected(str(error)) from error
        await self._executor.mounting.fill(container, spec.mounts)

    async def start(self) -> Running:
        container = self._require()
        if container.was_started:
            return await self._healthy(container)
        spec = wish.container_spec(self._task)
        self._executor.payloads.materialize(self._task.task.id, spec.secrets, spec.configs)
        try:
            container = await self._containers.start(container.id)
        except SkepError as error:
            raise SkepError(f"starting container failed: {error}") from error
        return await self._healthy(container)

    async def _healthy(self, container: Container) -> Running:
        """Return once its probe has succeeded, if it has one.

        Raises: SkepError: it is unhealthy, and has been stopped; or it ended with an error.
        """
        if container.health is None:
            return _running(container)
        container = await self._containers.health.wait(
            container.id, HealthStatus.HEALTHY, HealthStatus.UNHEALTHY
        )
        if _is_unhealthy(container):
            await self._containers.stop(container.id)
            raise SkepError(UNHEALTHY)
        if not container.is_running and container.exit_code:
            raise SkepError(_exit_of(container, container.error).message)
        return _running(container)

    async def wait(self) -> TaskExit:
        id = self._require().id
        container = await self._containers.health.wait(id, HealthStatus.UNHEALTHY)
        reason = ""
        if _is_unhealthy(container):
            reason = UNHEALTHY
            await self._containers.stop(id)
        container = await self._containers.wait(id)
        return _exit_of(container, reason or container.error)

    async def shutdown(self, drain_s: float = 0.0) -> None:
        container = self._container()
        if container is not None:
            await self._drain(container, drain_s)
            await self._containers.stop(container.id)
            await self._containers.retire(container.id)

    async def _drain(self, container: Container, limit_s: float) -> None:
        """Return when the last client of a task on a cluster's network has gone, or ``limit_s`` has passed.

        New ones do not come any more: everybody who routes to the task was told before it was told to stop.
        """
        if not container.pid or not _is_routed(self._task) or not limit_s:
            return
        self._containers.events.publish("drain", container)
        clock = self._executor.clock
        until = clock.monotonic() + limit_s
        while inbound_of(container.pid) and (left_s := until - clock.monotonic()) > 0:
            await clock.sleep(min(DRAIN_LOOK_S, left_s))

    async def terminate(self) -> None:
        container = self._container()
        if container is not None and container.is_running:
            try:
                await self._containers.kill(container.id)
            except NotRunning:
                return
            await self._containers.wait(container.id)

    async def update(self, task: AssignedTask) -> None:
        self._task = task
        container = self._container()
        if container is None or not container.is_running:
            return
        resources = task.task.spec.resources
        limits = resources.limits if resources else None
        await self._containers.update(
            container.id,
            nano_cpus=limits.nano_cpus if limits else 0,
            memory_bytes=limits.memory_bytes if limits else 0,
            pids=limits.pids if limits else 0,
        )

    async def remove(self) -> None:
        container = self._container()
        if container is not None:
            await self._executor.remove_container(container)
        self._executor.payloads.forget(self._task.task.id)

    def _expand(self, text: str) -> str:
        return expand(text, wish.context_of(self._task, self._executor.node))

    def _container(self) -> Container | None:
        return self._containers.find_by_label(LABEL_TASK_ID, self._task.task.id)

    def _require(self) -> Container:
        container = self._container()
        if container is None:
            raise NotFound(f"No such container: {self._task.name}")
        return container


def _is_routed(task: AssignedTask) -> bool:
    """Whether others find the task by a cluster's network, and so were told that it goes."""
    return any(one.network is not None and is_overlay(one.network) for one in task.task.networks_attachments)


def _is_unhealthy(container: Container) -> bool:
    found = container.health
    return container.is_running and found is not None and found.status is HealthStatus.UNHEALTHY


def _exit_of(container: Container, reason: str) -> TaskExit:
    code = container.exit_code
    message = f"task: non-zero exit ({code})" if code else ""
    if code and reason:
        message += f": {reason}"
    return TaskExit(exit_code=code, message=message, oom_killed=container.oom_killed)


def _running(container: Container) -> Running:
    return Running(
        container=ContainerStatus(
            container_id=container.id, pid=container.pid, exit_code=container.exit_code
        ),
        ports=container.sandbox.ports if container.sandbox is not None else (),
    )
