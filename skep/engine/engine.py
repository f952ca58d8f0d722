"""The container engine of a node: create, start, stop, remove, exec, logs, events, stats.

One ``Engine`` owns everything below ``<data>/containers``.  Callers name a container by its id, its name or a unique
prefix of the id, as in Docker.  They get an immutable ``Container`` and call ``get`` again to see changes.

Containers outlive this process: ``running()`` reads an earlier process's records, adopts running containers and records
the ends of the others.

A task's container has its networks from creation to removal, a plain container while it runs, as in Docker.
``lifecycle/`` moves a container from state to state.
"""

import asyncio
import random
import signal
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec
import structlog
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.aio.failures import isolate, retry
from skep.aio.race import run_to_end
from skep.engine.confinement import machine, selinux
from skep.engine.containers import create, image_mounts, shared_namespaces, updates
from skep.engine.containers.attachment import Attachment, attach
from skep.engine.containers.container import (
    Container,
    ContainerConfig,
    ContainerState,
    EngineCounts,
    LogEntry,
    LogFilter,
    MountPoint,
    NewContainer,
    NotRunning,
    Top,
    WaitCondition,
)
from skep.engine.containers.request import CreateRequest, TaskOptions
from skep.engine.containers.signals import signal_number
from skep.engine.containers.state import ContainerStore
from skep.engine.images.digest import Digest
from skep.engine.images.image import Image
from skep.engine.images.store import ImageStore
from skep.engine.lifecycle import life_events
from skep.engine.lifecycle.driver import LifecycleDriver
from skep.engine.lifecycle.restart import RestartMonitor
from skep.engine.log_drivers.drivers import sending_drivers
from skep.engine.log_drivers.facts import with_attributes, with_tag
from skep.engine.logs import logs
from skep.engine.logs.log_forwarding import LogForwarding
from skep.engine.metrics import top
from skep.engine.metrics.stats import Stats, sample
from skep.engine.metrics.usage import ActionTimes, timed
from skep.engine.networks.networking import NetworkChanges, Networking
from skep.engine.runtime.conmon import resize_terminal
from skep.engine.runtime.runtime import Runtime
from skep.engine.volumes.files import ContainerFiles
from skep.engine.volumes.mounts import relabel_modes
from skep.engine.volumes.volumes import Volumes
from skep.errors import InvalidArgument, NotFound, SkepError
from skep.model.container import Mount
from skep.model.networks.sandbox import Sandbox
from skep.model.values.ids import ContainerId, new_container_id
from skep.model.values.meta import Driver
from skep.model.values.name_generator import NameSource, names_from
from skep.model.values.times import timestamp

log = structlog.get_logger()

T = TypeVar("T")
P = ParamSpec("P")


def continuing(
    work: "Callable[Concatenate[Engine, ContainerId, P], Coroutine[Any, Any, T]]",
) -> "Callable[Concatenate[Engine, str, P], Coroutine[Any, Any, T]]":
    """Let an operation continue without its caller if that is cancelled, as in Docker, until the engine ends."""

    @wraps(work)
    async def carry_out(self: "Engine", word: str, /, *args: P.args, **kwargs: P.kwargs) -> T:
        id = self.get(word).id
        return await self.carry_out(work(self, id, *args, **kwargs), name=f"{work.__name__}-{id[:12]}")

    return carry_out


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one engine."""

    starts_max: int
    """Containers that may start at the same time.  Twice the number of cores keeps a single start short under load and
    does not lower the rate."""
    hostname: str = ""
    """Hostname of the node."""
    log_default: Driver = Driver(name="json-file")
    """Log driver and options of containers that do not name a driver."""
    new_id: Callable[[], ContainerId] = new_container_id
    new_name: NameSource = names_from(random.Random())
    chance: random.Random = msgspec.field(default_factory=random.Random)
    """Source of the categories in SELinux labels."""
    report_restore: Callable[[str], None] = lambda _: None
    """Called with the reason while containers of an earlier process cannot be adopted, and with "" once they are."""


class Engine:
    """All containers of this node.  ``word`` is a container's id, name or unique prefix of the id."""

    def __init__(
        self,
        *,
        runtime: Runtime,
        images: ImageStore,
        volumes: Volumes,
        network: Networking,
        clock: Clock,
        config: EngineConfig,
    ) -> None:
        self.bundles = runtime.bundles
        self.images = images
        self.volumes = volumes
        self.cgroups = runtime.cgroups
        self.runtime = runtime
        self._network = network
        self._clock = clock
        self._config = config
        self.store = ContainerStore(self.bundles)
        self.lifecycle = LifecycleDriver(
            runtime=runtime,
            network=network,
            volumes=volumes,
            store=self.store,
            clock=clock,
            starts_max=config.starts_max,
            report_restore=config.report_restore,
        )
        self.events, self.may_have = self.lifecycle.events, self.lifecycle.may_have
        self.carry_out = self.lifecycle.carry_out
        self.networks = NetworkChanges(self.store, self.lifecycle)
        self.files = ContainerFiles(self.store.get, self.lifecycle.mount_root, self.events, images)
        self.execs, self.health = self.lifecycle.execs, self.lifecycle.health
        self.log_rotation = logs.LogRotation(self.bundles, runtime.reopen_log, clock, self.list)
        self.log_forwarding = LogForwarding(self.bundles, config.hostname, self.events, self.list)
        self.restart_monitor = RestartMonitor(self, clock)
        self.action_times = ActionTimes(clock)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Adopt the containers of earlier processes, then watch all containers until the block ends.

        The containers keep running when the block ends.
        """
        async with self.lifecycle.running():
            rotating = retry(self.log_rotation.run, "log rotation ended", clock=self._clock)
            self.lifecycle.spawn(rotating, name="log-rotation")
            forwarding = retry(self.log_forwarding.run, "log sender failed", clock=self._clock)
            self.lifecycle.spawn(forwarding, name="log-forwarding")
            self.lifecycle.spawn(self.volumes.sweep(), name="volume-sweep")
            for container in self.list():
                if container.is_unfilled or (container.plain is not None and container.plain.is_step):
                    remove = partial(self.remove, container.id, force=True, with_volumes=True)
                    event = "container of an interrupted build or creation not removed"
                    removing = retry(remove, event, clock=self._clock, passes=(NotFound,))
                    self.lifecycle.spawn(removing, name=f"remove-{container.id[:12]}")
            yield

    async def run_restart_policies(self) -> None:
        """Restart plain containers by their policies, and remove containers with ``--rm``, until cancelled."""
        await self.restart_monitor.run()

    # --- reading ------------------------------------------------------------------------------------------------

    @property
    def network_ids(self) -> Mapping[str, str]:
        """Ids of the predefined networks by name."""
        return self._network.predefined_ids

    def list(self) -> Sequence[Container]:
        """Return all containers, running or not, newest first (Docker's order)."""
        return self.store.list()

    def running_sandboxes(self) -> Iterator[Sandbox]:
        """Yield the sandboxes of running containers, except paused ones."""
        for container in self.store.list():
            if container.state is ContainerState.RUNNING and container.sandbox is not None:
                yield container.sandbox

    def get(self, word: str) -> Container:
        """Raises: NotFound: ``No such container: <word>``; InvalidArgument: the prefix is ambiguous."""
        return self.store.get(word)

    def has(self, word: str) -> bool:
        """Return whether ``word`` matches at least one container."""
        try:
            return bool(self.store.get(word))
        except NotFound:
            return False
        except InvalidArgument:
            return True

    def counts(self) -> EngineCounts:
        """Return the number of containers by state, of images, and of health probes."""
        probes = self.lifecycle.health
        return replace(
            EngineCounts.of(self.list()),
            images=len(self.images.images()),
            health_checks=probes.count,
            failed_health_checks=probes.failures,
        )

    def find_by_label(self, label: str, value: str) -> Container | None:
        """Return the newest container with this label, or None."""
        return next((one for one in self.list() if one.labels.get(label) == value), None)

    def plain_containers(self) -> Sequence[Container]:
        """Return the containers that no orchestrator created."""
        return [one for one in self.list() if one.plain is not None]

    async def top(self, word: str, ps_args: str = "") -> Top:
        """Return a running container's processes as ``ps`` on the node shows them.  Empty ``ps_args`` mean ``-ef``.

        Raises: NotFound; NotRunning; InvalidArgument: ps rejects the arguments; Unavailable.
        """
        container = self._require_running(word)
        return await top.processes(self.cgroups.pids(container), ps_args or "-ef")

    async def stats(self, word: str) -> Stats:
        """Return a sample of its resource usage, zeros if it does not run.  Raises: NotFound; Unavailable."""
        container = self.get(word)
        return await asyncio.to_thread(sample, container, self.cgroups, self._clock.now_ns())

    def logs(self, word: str, filter: LogFilter) -> AsyncGenerator[LogEntry, None]:
        """Return the output, oldest first; ``follow`` it until the end.  Raises at once: NotFound, Unimplemented."""
        return logs.singly(self.log_batches(word, filter))

    def log_batches(self, word: str, filter: LogFilter) -> AsyncGenerator[Sequence[LogEntry], None]:
        """Return the output like ``logs``, in batches."""
        return logs.of_container(self.get(word), filter, self.bundles, self.store)

    def changes(self, word: str) -> Sequence[tuple[int, str]]:
        """Return the changed paths, sorted: (0 modified, 1 added, 2 deleted).  Raises: NotFound."""
        return self.bundles.changes(self.get(word))

    async def wait(self, word: str, condition: WaitCondition = WaitCondition.NOT_RUNNING) -> Container:
        """Return the container, with exit code and error, once ``condition`` holds.  Raises: NotFound."""
        return await self.store.wait(self.get(word).id, condition)

    def _require_running(self, word: str) -> Container:
        """Return a running container.  Raises: NotFound; NotRunning."""
        container = self.get(word)
        container.require_running()
        return container

    # --- create -------------------------------------------------------------------------------------------------

    @timed("create")
    async def create(
        self,
        request: CreateRequest,
        *,
        name: str = "",
        task: TaskOptions | None = None,
        image: Image | None = None,
        is_step: bool = False,
    ) -> Container:
        """Create a container without starting it.

        Args:
            name: Name of the container.  Empty to generate one.
            task: A task's additions to the request, or None for a plain container.
            image: The image of the request (``EMPTY`` for a program of the machine), or None to look it up.
            is_step: Whether a build creates it.  See ``PlainOptions``.

        Raises: NotFound: no such image; AlreadyExists: the name or a port is taken; SkepError: anything else.
        """
        chosen = create.checked_name(name) if name else self.store.free_name(self._config.new_name)
        request = shared_namespaces.joined(request, chosen, self.store.get)
        plain = create.plain_options(request, is_step=is_step) if task is None else None
        self.store.check_free(chosen)  # before any volume is created
        image = image or self.images.get(request.image)
        defaults = image.config.defaults
        mounts = create.mounts(request)
        labels = create.labels(request, defaults, task)
        node = create.NodeDefaults(
            self._config.hostname, self._network.host_gateway, self._config.log_default, sending_drivers()
        )
        config = replace(create.container_config(request, defaults, task, node), is_process=not image.id)
        self._check_confinement(config, request.host_config.network_mode)  # before a volume is created
        runtime = self.runtime.name_of(request.host_config.runtime)
        config = shared_namespaces.with_hostname(config, request.host_config.network_mode, self.store.get)
        config = await with_attributes(config, labels)
        await self.volumes.bind_sources.check(mounts, self.bundles.apis.others)
        stack = task.stack if task is not None else ""
        await self.volumes.create_of_plugins(mounts, stack)
        # No await from here to ``store.add``: a concurrent image removal sees this container, or we see that removal.
        if not is_step and image.id:  # a build has pinned its steps' layers, even of a removed image
            self.images.get(image.id)
        layers = tuple(map(str, self.images.layers(image)))
        points, inherited = self._mount_points(request, mounts, defaults.volumes or (), stack)
        chain = (*image.chain, *image_mounts.chains(self.images, points))
        is_plain = plain is not None and not is_step
        api = self.bundles.apis.access(request.labels, (*points, *inherited), is_plain=is_plain)
        relabel = relabel_modes(request.host_config.binds, points, task.relabel if task is not None else {})
        new = NewContainer(
            name=chosen,
            image=request.image,
            image_id=image.id,
            layers=layers,
            config=replace(config, mounts=(*points, *inherited, *config.mounts), api=api, relabel=relabel),
            labels=labels,
            plain=plain,
            stack=stack,
            runtime=runtime,
        )
        return await self._add_filled(new, (*points, *config.mounts), mounts, chain)

    def _check_confinement(self, config: ContainerConfig, network_mode: str) -> None:
        """Raise InvalidArgument or FailedPrecondition if this node cannot confine such a container."""
        machine.check_mapped(config.machine, network_mode, self.bundles.users)
        self.cgroups.check_parent(config.machine.cgroup_parent)
        self._labels_of(config)

    def _mount_points(
        self, request: CreateRequest, mounts: Sequence[Mount], image_volumes: Collection[str], stack: str
    ) -> tuple[Sequence[MountPoint], Sequence[MountPoint]]:
        """Return its own mounts, and the mounts of ``--volumes-from``.  Raises: InvalidArgument; NotFound."""
        inherited = shared_namespaces.inherited_mounts(
            request.host_config.volumes_from, mounts, self.store.get
        )
        pictures = image_mounts.image_points(self.images, mounts)
        anonymous = set(image_volumes) - {point.destination for point in (*inherited, *pictures)}
        return pictures + self.volumes.mount_points(image_mounts.others(mounts), anonymous, stack), inherited

    async def _add_filled(
        self, new: NewContainer, own: Sequence[MountPoint], mounts: Sequence[Mount], chain: Sequence[Digest]
    ) -> Container:
        """Add a container and fill its new volumes.  Cleans up on failure or cancellation.

        ``own`` are its mounts without the inherited ones.  ``chain`` are the layers that it needs.
        """
        container: Container | None = None
        try:
            is_unfilled = any(point.type == "volume" for point in own)
            async with self.images.pin(chain):
                container = await self.add(new, is_unfilled=is_unfilled)
            root = self.bundles.rootfs(container.id)
            await self.volumes.fill(container.id, own, mounts, root, container.users)
            if is_unfilled:
                container = self.store.change(container.id, is_unfilled=False)
        except BaseException:
            await self._undo(
                self.volumes.remove_anonymous(own, self.list)
                if container is None
                else self.remove(container.id, with_volumes=True),
                new.name,
            )
            raise
        return container

    @staticmethod
    async def _undo(work: Coroutine[Any, Any, None], name: str) -> None:
        """Undo a part of a creation or of a run's start, even if the caller is cancelled again."""
        await run_to_end(isolate(work, "container not removed", name=name))

    async def add(self, new: NewContainer, *, is_unfilled: bool = False) -> Container:
        """Create a container whose configuration is complete: directories, root file system, network, ports.

        A plain container has a network and ports only while it runs.  Cleans up if the caller is cancelled.
        Raises: AlreadyExists: the name or a port is taken; InvalidArgument: no such runtime;
        SkepError: a part of it is unavailable.
        """
        id, config = self._config.new_id(), new.config
        if not config.hostname:  # the short id, as in Docker
            config = msgspec.structs.replace(config, hostname=id[:12])
        labels = self._labels_of(config)
        config = msgspec.structs.replace(config, process_label=labels.process, mount_label=labels.mount)
        container = Container(
            id=id,
            name=new.name,
            image=new.image,
            image_id=new.image_id,
            config=config,
            labels=new.labels,
            layers=new.layers,
            runtime=self.runtime.name_of(new.runtime),
            users=None if config.machine.userns_mode == "host" else self.bundles.users,
            created_at=timestamp(self._clock.now_ns()),
            plain=new.plain,
            stack=new.stack,
            is_unfilled=is_unfilled,
        )
        container = with_tag(container, self._config.hostname)
        self.store.add(container)
        try:
            await self.lifecycle.prepare(container)
        except asyncio.CancelledError:  # the container may be complete
            if self.has(id):
                await self._undo(self.remove(id), new.name)
            raise
        container = self.store.require(id)
        self.events.publish("create", container)
        return container

    def _labels_of(self, config: ContainerConfig) -> selinux.Labels:
        """Return SELinux labels that no container has yet.  Raises: InvalidArgument; FailedPrecondition."""
        in_use = {one.config.process_label for one in self.store.list()}
        return selinux.labels_of(
            self.bundles.selinux_policy, config.label_options, in_use, self._config.chance
        )

    # --- start and stop -----------------------------------------------------------------------------------------

    @timed("start")
    async def start(self, word: str, *, secret_env: tuple[str, ...] = ()) -> Container:
        """Start a container for its user.  Return when runc has started the command, or at once if it runs already.

        Resets the restart count.  A container with ``--rm`` that cannot be started is removed.

        Args:
            secret_env: Additional variables (``NAME=value``) for this run.  No record contains them.

        Raises: NotFound; BeingRemoved; StartError: the runtime refused, in its words; the record has the exit code.
        """
        container = self.store.require_startable(self.get(word).id)
        if container.plain is None:
            return await self.lifecycle.start(container.id, secret_env)
        self.restart_monitor.reset(container.id)
        try:
            return await self.lifecycle.start(container.id, secret_env)
        except (SkepError, OSError):
            if container.plain.auto_remove and self.store.lookup(container.id) is not None:
                await self._undo(self.remove(container.id, force=True, with_volumes=True), container.name)
            raise

    async def restart(self, id: ContainerId, *, ignore_stop: bool) -> None:
        """Start a plain container because of its restart policy, unless it runs or the policy has changed.

        ``ignore_stop`` starts it even if its user has stopped it.
        Raises: NotFound; BeingRemoved; SkepError, OSError: it cannot be started.
        """
        await self.lifecycle.restart(id, ignore_stop=ignore_stop)

    async def kill(self, word: str, signal_name: str = "SIGKILL") -> None:
        """Send a signal (``SIGTERM``, ``TERM`` or ``15``) to the first process.  After SIGKILL, return when the
        container has ended.

        A restarting container has no process, but a signal that ends a container ends its restarting.
        Raises: NotFound; NotRunning; InvalidArgument: no such signal; Unavailable: it did not end although it was
        killed.
        Source: moby, daemon/kill.go (ContainerKill, Kill, killWithSignal).
        """
        number = signal_number(signal_name)
        container = self.get(word)
        if not container.is_active:
            container = await self.lifecycle.await_start(container.id)
        if not container.is_active:
            raise NotRunning(f"Cannot kill container: {word}: Container {container.id} is not running")
        if number in (signal.SIGKILL, signal_number(container.config.stop_signal or "SIGTERM")):
            self.restart_monitor.note_stop(container.id)
            container = await self.lifecycle.end_restarting(container)
        if container.is_running and number == signal.SIGKILL:
            await self.lifecycle.kill(container)
        elif container.is_running:
            await self.lifecycle.signal(container, number)

    @continuing
    async def stop(self, id: ContainerId, grace_s: float | None = None, signal_name: str = "") -> Container:
        """Send ``signal_name``, then SIGKILL after ``grace_s`` seconds.  Return when the container has ended.

        ``signal_name`` "" and ``grace_s`` None mean the container's own.  A negative grace period never kills.
        Raises: NotFound; InvalidArgument: no such signal; Unavailable: it did not end although it was killed (its end
        is recorded when it comes).
        """
        return await self._stop(id, grace_s, signal_name)

    @continuing
    async def stop_and_start(
        self, id: ContainerId, grace_s: float | None = None, signal_name: str = ""
    ) -> Container:
        """Stop, if it runs, and start.  Raises: as ``stop`` and ``start``."""
        with self.restart_monitor.restarting(id):
            await self._stop(id, grace_s, signal_name)
            return await self.start(id)

    async def _stop(self, id: ContainerId, grace_s: float | None, signal_name: str) -> Container:
        config = self.get(id).config
        self.restart_monitor.note_stop(id)
        number = signal_number(signal_name or config.stop_signal or "SIGTERM")
        grace_s = config.stop_grace_ns / 1e9 if grace_s is None else grace_s
        return await self.lifecycle.stop(id, number, grace_s)

    def note_stopped(self, word: str) -> Container:
        """Record that its user has stopped a plain container: no policy restarts it.  Raises: NotFound."""
        id = self.get(word).id
        self.restart_monitor.note_stop(id)
        return self.lifecycle.note(id, life_events.UserStops())

    async def pause(self, word: str) -> None:
        """Freeze the processes.  Raises: NotFound; NotRunning; RuntimeFailed."""
        await self.lifecycle.pause(self._require_running(word))

    async def unpause(self, word: str) -> None:
        """Resume the processes.  Raises: NotFound; NotRunning; RuntimeFailed."""
        await self.lifecycle.unpause(self._require_running(word))

    # --- other operations ---------------------------------------------------------------------------------------

    async def attach(self, word: str) -> Attachment:
        """Return the standard streams.  Waits for a plain container to start, so that no output is missed.

        A container that is starting has a conmon that serves clients.  Those who wait have got their streams before.

        Raises: NotFound; NotRunning: a task's container does not run, or the start that was waited for has failed.
        """
        container = self.get(word)
        if container.process is not None:
            attachment = await attach(self.bundles.bundle(container.id))
        elif container.plain is not None and not container.is_running:
            attachment = await self.lifecycle.waiting.wait(container.id)
        else:
            attachment = await attach(self.bundles.bundle(self._require_running(container.id).id))
        self.events.publish("attach", container)
        return attachment

    async def resize(self, word: str, height: int, width: int) -> None:
        """Set the terminal's size, in characters.  Raises: NotFound; NotRunning."""
        container = self._require_running(word)
        resize_terminal(container.monitor, height, width)
        self.events.publish("resize", container, height=str(height), width=str(width))

    @continuing
    async def update(self, id: ContainerId, change: updates.Change) -> Container:
        """Change limits and the restart policy without a restart.

        Raises: NotFound; BeingRemoved; RuntimeFailed; as ``change``.
        """
        return await self.lifecycle.update(id, life_events.Update(change))

    @continuing
    async def rename(self, id: ContainerId, name: str) -> None:
        """Raises: FailedPrecondition: it belongs to a task; InvalidArgument; as ``networks.rename``."""
        container, _ = self.store.require_plain(id)
        chosen = create.checked_name(name)
        if chosen == container.name:
            raise InvalidArgument("Renaming a container with the same name as its current name")
        await self.networks.rename(id, chosen)

    # --- remove -------------------------------------------------------------------------------------------------

    async def retire(self, word: str) -> None:
        """Free what only a running container needs, of a task's container that never ran and never will.

        Its record stays, as for a container that ended.  Raises: NotFound.
        """
        await self.lifecycle.retire(self.get(word).id)

    @continuing
    @timed("delete")
    async def remove(self, id: ContainerId, *, force: bool = False, with_volumes: bool = False) -> None:
        """Remove a container, ``with_volumes`` also its anonymous volumes.  ``force`` kills it first.

        Also deletes layers of removed images that were kept only for it.
        Raises: NotFound; StillRunning: it runs or is restarting, without ``force``; Unavailable: a part of it is left.
        """
        container = self.store.require(id)
        if force or not container.is_active:
            await self.log_forwarding.hold(container)
        await self.lifecycle.remove(id, force=force)
        self.restart_monitor.reset(id)
        sweeping = self.images.sweep(self._images_in_use)
        await isolate(sweeping, "unused layers not deleted", container=id)
        if with_volumes:
            await self.volumes.remove_anonymous(container.config.mounts, self.list)

    def _images_in_use(self) -> Collection[str]:
        return {id for one in self.list() for id in image_mounts.images_of(one)}

    async def sweep(self) -> Collection[ContainerId]:
        """Free network resources of containers that do not exist, have ended or never ran.  Return the containers' ids.

        A failure for one container is logged, and the next sweep retries it.  Raises: OSError: network namespaces.
        """
        return await self.lifecycle.sweep()
