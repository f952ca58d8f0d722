"""Tasks as containers under runc: the default executor of nodes.

``adapter`` translates a task into a create request, and the engine does the rest.  A label on each container names its
task, so this module keeps no state about tasks.
"""

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec
import structlog

from skep.agent.executor import adapter
from skep.agent.executor.adapter import NodeFacts
from skep.agent.executor.attaching import AttachmentController, ClusterAttachments, is_attachment
from skep.agent.executor.ends import end_of, failed_check, unhealthy_end, with_last_lines
from skep.agent.executor.interface import Controller, OnUnhealthy, Rejected, Running, TaskExit, ignored
from skep.agent.executor.payloads import Payloads
from skep.agent.executor.pulling import Bring, ImagePuller, nothing_beside
from skep.agent.tasks.cluster_volumes import ClusterVolumes, PathQueries, PublishedVolume
from skep.aio.clock import Clock
from skep.aio.failures import isolate, retry
from skep.aio.race import SharedWork
from skep.csi.drivers import Drivers
from skep.dataplane.dataplane import DataPlane
from skep.dataplane.netns.kernel.namespaces import inbound_of
from skep.engine import api_sockets
from skep.engine.api_sockets import ApiSockets
from skep.engine.capacity import Capacity, Programs, capacity_of, find_programs
from skep.engine.confinement import cdi
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.containers.container import Container, HealthStatus, NotRunning
from skep.engine.engine import Engine, EngineConfig
from skep.engine.events import Events
from skep.engine.images.image import EMPTY
from skep.engine.images.store import ImageStore
from skep.engine.runtime.bundle import Bundles
from skep.engine.runtime.runtime import Runtime
from skep.engine.volumes.volume_plugins import VolumePlugins
from skep.engine.volumes.volumes import Volumes
from skep.errors import InvalidArgument, NotFound, SkepError, Unavailable
from skep.linux import mounting
from skep.linux.name_files import RESOLVER
from skep.model.door.settings import is_door
from skep.model.network import Network
from skep.model.networks.data_planes import driver_of, is_overlay
from skep.model.networks.sandbox import as_requested
from skep.model.networks.tables import NetworkHead
from skep.model.options import templates
from skep.model.options.labels import LABEL_TASK_ID, last_lines
from skep.model.options.slot_volumes import created_ms, slot_user
from skep.model.permissions.processes import is_process
from skep.model.permissions.rights import ALL_RIGHTS, Right
from skep.model.task import AssignedTask, ContainerStatus
from skep.model.task_end import TaskEnd, words_of
from skep.model.values.ids import ContainerId, TaskId
from skep.model.values.user_map import UserMap
from skep.paths import Paths

log = structlog.get_logger()

DRAIN_POLL_S = 0.05
"""Seconds between two polls for open connections.

Polling is needed because the kernel reports the end of a connection only to its owner.
"""

UNHEALTHY = "dockerexec: unhealthy container"
"""Docker's text for an unhealthy task in ``docker service ps``."""


class TaskStorage(msgspec.Struct, frozen=True):
    """Cluster storage for tasks: secrets and configs, and cluster volumes."""

    payloads: Payloads
    cluster_volumes: ClusterVolumes


class OciExecutor:
    """Runs tasks as containers."""

    name = "oci"

    def __init__(
        self,
        *,
        engine: Engine,
        data_plane: DataPlane,
        storage: TaskStorage,
        attachments: ClusterAttachments,
        clock: Clock,
        node: NodeFacts,
        bring: Bring = nothing_beside,
    ) -> None:
        """Args: attachments: Plain containers' endpoints on cluster networks.

        Each endpoint is represented by a task. bring: See ``ImagePuller``.
        """
        self.cluster_volumes = storage.cluster_volumes
        self.engine = engine
        self.data_plane = data_plane
        self.payloads = storage.payloads
        self.attachments = attachments
        self.image_puller = ImagePuller(engine.images, clock, bring)
        self.clock = clock
        self.node = node

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Adopt the containers of earlier processes.  They keep running when the block ends."""
        opening = partial(asyncio.to_thread, self.payloads.open)
        await retry(opening, "file system for secrets not mounted", clock=self.clock, longest_s=10.0)
        async with self.data_plane.running(), self.engine.running():
            yield

    def controller(self, task: AssignedTask, registry_auth: str = "") -> Controller:
        """Return a controller.  Never raises: if the task is invalid, ``prepare`` raises the error."""
        if is_attachment(task):
            return AttachmentController(self.attachments, self.engine.networks.evict, task)
        return OciController(self, task, registry_auth)

    async def leftovers(self) -> Sequence[TaskId]:
        """Return the tasks that a container's label names."""
        found = {one.labels[LABEL_TASK_ID] for one in self.engine.list() if LABEL_TASK_ID in one.labels}
        return [TaskId(id) for id in sorted(found)]

    async def discard(self, task_id: TaskId) -> None:
        """Kill and remove the containers of a task."""
        for container in self.engine.list():
            if container.labels.get(LABEL_TASK_ID) == task_id:
                await self.remove_container(container)

    async def remove_container(self, container: Container) -> None:
        """Remove a task's container with its secrets and its anonymous volumes."""
        with suppress(NotFound):  # removed manually in the meantime
            await self.engine.remove(container.id, force=True)
        self.payloads.forget(container.labels.get(LABEL_TASK_ID, ""))
        await self.engine.volumes.remove_anonymous(container.config.mounts, self.engine.list)


def oci_executor(
    paths: Paths,
    images: ImageStore,
    data_plane: DataPlane,
    attachments: ClusterAttachments,
    config: EngineConfig,
    clock: Clock,
    *,
    cgroup_parent: str = "skep",
    programs: Programs | None = None,
    cdi_directories: tuple[Path, ...] = cdi.DIRECTORIES,
    allowed: frozenset[Right] = ALL_RIGHTS,
    bring: Bring = nothing_beside,
    plugins: VolumePlugins | None = None,
    apis: ApiSockets = api_sockets.NONE,
    users: UserMap | None = None,
    with_selinux: bool = False,
) -> OciExecutor:
    """Return the executor of one node, with its engine.

    Args:
        cgroup_parent: Parent of the containers' cgroups.  Two nodes on one machine need different parents.
        programs: The OCI runtimes and conmon, or None to find runc and conmon on the PATH.
        cdi_directories: Directories with CDI descriptions of devices.
        allowed: Rights over the node that tasks may have.
        bring: See ``ImagePuller``.
        plugins: Volume plug-ins, or None for the machine's plug-ins.
        apis: API sockets for containers that mount the Engine API's socket.
        users: Mapping of the containers' users, or None if they are the machine's.
        with_selinux: Whether to label containers, if the machine has SELinux.
    """
    cgroups, programs = Cgroups(cgroup_parent), programs or find_programs()
    capacity = capacity_of(cgroups, programs, cdi_directories, with_selinux=with_selinux)
    runtime = _runtime(paths, cgroups, programs, apis, msgspec.structs.replace(capacity, users=users))
    engine = Engine(
        runtime=runtime,
        images=images,
        volumes=Volumes(paths.volumes, plugins=plugins, events=Events(clock), run=paths.run),
        network=data_plane.containers,
        clock=clock,
        config=config,
    )
    payloads = Payloads(paths.secrets, users=users)
    return OciExecutor(
        engine=engine,
        data_plane=data_plane,
        storage=TaskStorage(payloads, _cluster_volumes(paths, engine, payloads, clock)),
        attachments=attachments,
        clock=clock,
        node=NodeFacts(hostname=config.hostname, architecture=os.uname().machine, allowed=allowed),
        bring=bring,
    )


def _runtime(
    paths: Paths, cgroups: Cgroups, programs: Programs, apis: ApiSockets, capacity: Capacity
) -> Runtime:
    return Runtime(
        programs=programs,
        root=paths.runc,
        bundles=Bundles(
            paths.containers,
            paths.bundles,
            cgroups,
            capacity,
            RESOLVER,
            apis,
            mapped=(paths.cluster_volumes,),
        ),
        cgroups=cgroups,
        capacity=capacity,
    )


def _cluster_volumes(paths: Paths, engine: Engine, payloads: Payloads, clock: Clock) -> ClusterVolumes:
    return ClusterVolumes(
        paths.cluster_volumes,
        Drivers(paths.csi_sockets, clock),
        clock,
        secret=payloads.text_of_secret,
        paths=PathQueries(
            users_of=partial(_users_of, engine), is_mounted=mounting.is_target, device_at=_device_at
        ),
    )


def _device_at(path: Path) -> str:
    """Return ``major:minor`` of a block device, or an empty text.  Blocks."""
    with suppress(OSError):
        status = path.stat()
        if stat.S_ISBLK(status.st_mode):
            return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return ""


def _users_of(engine: Engine, path: Path) -> Sequence[str]:
    """Return the containers that mount ``path`` and run or may be started."""
    return [
        one.id
        for one in engine.list()
        if (one.is_running or not one.was_started) and any(at.source == str(path) for at in one.config.mounts)
    ]


class OciController:
    """One task's container."""

    def __init__(self, executor: OciExecutor, task: AssignedTask, registry_auth: str) -> None:
        self._executor = executor
        self._engine = executor.engine
        self._task = task
        self._registry_auth = registry_auth
        self._stopping_since: float | None = None
        """Time of the clock when the running container was told to stop."""
        self._draining_since: float | None = None
        """Time of the clock when the task began to wait for its last connection."""
        self._stop_work = SharedWork()

    def observed(self) -> Running | None:
        """Return the state in the container's record."""
        container = self._container()
        return None if container is None else _running(container)

    async def prepare(self) -> None:
        """Fetch the image and create the container with its networks and ports."""
        if self._container() is None:
            await self._create()
        # An earlier process of the node may have ended right after the creation.
        await self._note_volumes()

    async def _create(self) -> None:
        executor, spec = self._executor, adapter.container_spec(self._task)
        image = EMPTY
        if not is_process(spec):
            image = await executor.image_puller.image(
                spec.image, self._registry_auth, uses_helper=self._task.trust.logins
            )
        key = self._task.task.id
        secrets = executor.payloads.mounts(key, spec.secrets, spec.configs)
        if is_door(self._task.service_labels):
            secrets += (executor.payloads.door_mount(key),)
        try:
            async with self._cluster_volumes() as volumes:
                task = self._task  # rights may have changed while the image and the volumes were awaited
                await self._engine.create(
                    adapter.create_request(task, executor.node, volumes),
                    name=task.name,
                    task=adapter.task_options(
                        task, secrets, adapter.own_networks(task.task, self._network_here)
                    ),
                    image=image,
                )
        except InvalidArgument as error:
            raise Rejected(str(error)) from error

    @asynccontextmanager
    async def _cluster_volumes(self) -> AsyncIterator[Sequence[PublishedVolume]]:
        """Mount the task's cluster volumes.  Raises: SkepError: one cannot be mounted."""
        async with self._executor.cluster_volumes.keep_mounted(self._task.task.volumes) as volumes:
            yield volumes

    async def _note_volumes(self) -> None:
        """Record which volumes have data of the task's slot, so that later tasks of the slot return to this node."""
        container, task = self._container(), self._task.task
        slot = slot_user(self._task.service_name, task)
        if container is None or not slot:
            return
        volumes = self._engine.volumes
        for point in container.config.mounts:
            if point.type == "volume" and point.name and not point.anonymous:
                noting = volumes.note_use(point.name, slot, created_ms(task))
                await isolate(noting, "use of a volume not kept", volume=point.name)

    def _network_here(self, network: Network) -> NetworkHead:
        """Create a cluster network on a device of this machine.  Raises: Rejected: it cannot be created here."""
        source = network.spec.config_from
        try:
            return self._executor.data_plane.network_of_cluster(
                network.id,
                network.spec.name,
                driver_of(network),
                source.network if source is not None else "",
            )
        except SkepError as error:
            raise Rejected(str(error)) from error

    async def start(self) -> Running:
        """Start the container.  With a health check, return once it is healthy."""
        container = self._require()
        if container.was_started:
            return await self._healthy(container)
        seen = adapter.context_of(self._task, self._executor.node)
        spec = templates.expand_container(adapter.container_spec(self._task), seen)
        try:
            # in a thread, because expanding templates may block for long
            await asyncio.to_thread(self._executor.payloads.materialize, self._task.task.id, spec, seen)
            if is_door(self._task.service_labels):
                await asyncio.to_thread(self._executor.payloads.materialize_door, self._task.task.id)
            secret_env = await asyncio.to_thread(self._executor.payloads.environment, spec, seen)
            # Check again: after a restart since ``prepare``, the machine may number its devices differently.
            async with self._cluster_volumes() as volumes:
                rules = adapter.volume_device_rules(spec.mounts, volumes)
                if not set(rules).issubset(container.config.machine.device_cgroup_rules):
                    raise SkepError(
                        "a block volume has become another device since the container was created"
                    )
                container = await self._engine.start(container.id, secret_env=secret_env)
        except SkepError as error:
            raise SkepError(f"starting container failed: {error}") from error
        return await self._healthy(container)

    async def _healthy(self, container: Container) -> Running:
        """Wait until the health check has succeeded, if there is one.

        Raises:
            SkepError: The container is unhealthy and was stopped, or it ended with an error.
        """
        if container.health is None:
            return _running(container)
        container = await self._engine.health.wait(container.id, HealthStatus.HEALTHY, HealthStatus.UNHEALTHY)
        if _is_unhealthy(container):
            await self._stop(container.id)
            raise SkepError(_with_words(UNHEALTHY, self._engine.get(container.id)))
        if not container.is_running and container.exit_code:
            raise SkepError(_exit_of(container).message)
        return _running(container)

    async def wait(self, on_unhealthy: OnUnhealthy = ignored) -> TaskExit:
        """Wait until the container has ended.  A container that becomes unhealthy is stopped first.

        Raises:
            NotFound: The container does not exist, or was never started.
        """
        id = self._require().id
        if not self._engine.get(id).was_started:
            raise NotFound(f"Container {id} was not started")
        container = await self._engine.health.wait(id, HealthStatus.UNHEALTHY)
        reason = ""
        if _is_unhealthy(container):
            reason = UNHEALTHY
            if container.health is not None:
                on_unhealthy(unhealthy_end(container, container.health))
            await self._stop(id)
        return _exit_of(await self._engine.wait(id), reason)

    async def fetch_end(self) -> TaskEnd | None:
        """Return the end from the container's record and its log."""
        container = self._container()
        since = self._stopping_since
        stopping_s = self._executor.clock.monotonic() - since if since is not None else None
        end = end_of(container, stopping_s) if container is not None else None
        if container is None or end is None:
            return None
        return await with_last_lines(self._engine, container.id, end, last_lines(self._task.service_labels))

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Wait for the last connection, then stop the container and free its networks."""
        container = self._container()
        if container is not None:
            if self._stopping_since is None:
                await self._drain(container, drain_s)
            if self._stopping_since is None and self._engine.get(container.id).is_running:
                self._stopping_since = self._executor.clock.monotonic()
            await self._stop(container.id)
            await self._engine.retire(container.id)

    async def _stop(self, id: ContainerId) -> None:
        """Stop the container and wait for its end without a limit, because its slot is not free before that.

        A stop that is interrupted and repeated sends its signal once: many programs end at once at the second one.

        Raises:
            NotFound: The container does not exist.
        """
        stop = partial(self._engine.stop, id)
        event = "container of a task not stopped"
        await self._stop_work.run(
            lambda: retry(stop, event, clock=self._executor.clock, kinds=(Unavailable,), container=id)
        )

    async def _drain(self, container: Container, limit_s: float) -> None:
        """Wait until the last connection over a cluster network has ended, or ``limit_s`` has passed.

        There are no new connections: all nodes that route to the task have removed it from their tables before the
        stop.
        """
        if not container.pid or not _is_routed(self._task) or not limit_s:
            return
        clock = self._executor.clock
        if self._draining_since is None:
            self._engine.events.publish("drain", container)
            self._draining_since = clock.monotonic()
        until = self._draining_since + limit_s
        while inbound_of(container.pid) and (left_s := until - clock.monotonic()) > 0:
            await clock.sleep(min(DRAIN_POLL_S, left_s))

    async def terminate(self) -> None:
        """Kill the container."""
        container = self._container()
        if container is not None and container.is_running:
            try:
                await self._engine.kill(container.id)
            except NotRunning:
                return
            except Unavailable as error:  # a process may wait for a device
                log.warning(
                    "container of a task killed, but not ended", container=container.id, reason=str(error)
                )
            await self._engine.wait(container.id)

    async def update(self, task: AssignedTask) -> None:
        """Change the limits of the running container if they differ."""
        self._task = task
        container = self._container()
        if container is None or not container.is_running:
            return
        resources = task.task.spec.resources
        limits = resources.limits if resources else None

        def limited(before: Container) -> Container:
            machine = msgspec.structs.replace(before.config.machine, cpu_quota=0, cpu_period=0)
            config = msgspec.structs.replace(
                before.config,
                machine=machine,
                nano_cpus=limits.nano_cpus if limits else 0,
                memory_bytes=limits.memory_bytes if limits else 0,
                pids=limits.pids if limits else 0,
            )
            return msgspec.structs.replace(before, config=config)

        await self._engine.update(container.id, limited)

    async def remove(self) -> None:
        """Remove the container, its secrets and its anonymous volumes."""
        container = self._container()
        if container is not None:
            await self._executor.remove_container(container)
        self._executor.payloads.forget(self._task.task.id)

    def _container(self) -> Container | None:
        return self._engine.find_by_label(LABEL_TASK_ID, self._task.task.id)

    def _require(self) -> Container:
        container = self._container()
        if container is None:
            raise NotFound(f"No such container: {self._task.name}")
        return container


def _is_routed(task: AssignedTask) -> bool:
    """Return whether other nodes route to the task over a cluster network."""
    return any(one.network is not None and is_overlay(one.network) for one in task.task.networks_attachments)


def _is_unhealthy(container: Container) -> bool:
    found = container.health
    return container.is_running and found is not None and found.status is HealthStatus.UNHEALTHY


def _exit_of(container: Container, reason: str = "") -> TaskExit:
    """Return the exit with Docker's message, followed by the reason if it is known."""
    code = container.exit_code
    message = f"task: non-zero exit ({code})" if code else ""
    if code and (reason := _with_words(reason or container.error, container)):
        message += f": {reason}"
    return TaskExit(exit_code=code, message=message, oom_killed=container.oom_killed)


def _with_words(reason: str, container: Container) -> str:
    end = end_of(container, stopping_s=None)
    return ": ".join(filter(None, (reason, words_of(end) if end is not None else "")))


def _running(container: Container) -> Running:
    return Running(
        container=ContainerStatus(
            container_id=container.id, pid=container.pid, exit_code=container.exit_code
        ),
        warnings=container.warnings,
        ports=as_requested(container.sandbox.ports) if container.sandbox is not None else (),
        failed_check=failed_check(container),
    )
