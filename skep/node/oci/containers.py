"""The containers of this node: from a wish to a process under runc, and back to nothing.

One ``Containers`` owns everything below ``<data>/containers``.  A container is named by its id, its name or
a unique prefix of the id, as docker does (``word``).  What a caller gets is an immutable ``Container``; ask
again to see changes.

Containers outlive this process: ``running()`` finds those of an earlier process again, takes over the ones
that still run and settles the ones that ended meanwhile.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.aio.first import finish
from skep.aio.groups import errors_as_they_are
from skep.errors import NotFound, SkepError
from skep.model.ids import ContainerId
from skep.model.times import ZERO_TIME, timestamp
from skep.node.oci import health
from skep.node.oci.attachment import Attachment, WaitingClients, attach
from skep.node.oci.bundle import Bundles
from skep.node.oci.cgroups import Cgroups
from skep.node.oci.changing import ContainerChanger
from skep.node.oci.conmon import StartError
from skep.node.oci.container import (
    Container,
    ContainerState,
    ContainerWish,
    NotRunning,
    StillRunning,
)
from skep.node.oci.events import Events
from skep.node.oci.execs import Execs
from skep.node.oci.health_checks import HealthChecks
from skep.node.oci.log_keeping import LogKeeper
from skep.node.oci.networking import Networking, kept
from skep.node.oci.processes import send_signal
from skep.node.oci.registry import Registry
from skep.node.oci.runtime import Runtime
from skep.node.oci.signals import signal_number

log = structlog.get_logger()

T = TypeVar("T")

SWEEP_SECONDS = 20.0
"""Between two comparisons of what the network holds for containers with the containers there are."""


class Containers(ContainerChanger):
    """All containers of this node."""

    def __init__(
        self,
        *,
        bundles: Bundles,
        runtime: Runtime,
        cgroups: Cgroups,
        network: Networking,
        clock: Clock,
        new_id: Callable[[], ContainerId],
        starts_max: int,
    ) -> None:
        """``starts_max``: containers that are created and started at the same moment, at most.

        Twice the number of cores keeps a single start short under load at no loss of rate.
        """
        super().__init__(
            registry=Registry(bundles),
            bundles=bundles,
            cgroups=cgroups,
            clock=clock,
            runtime=runtime,
            events=Events(clock),
        )
        self._network = network
        self._new_id = new_id
        self._starting = asyncio.Semaphore(starts_max)
        self._waiting = WaitingClients()
        self._watches: dict[ContainerId, asyncio.Task[None]] = {}
        self._turns: dict[ContainerId, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._group: asyncio.TaskGroup | None = None
        self.log_keeper = LogKeeper(bundles, runtime, clock, self.list)
        self.execs = Execs(bundles, runtime, self.events, container=self.get, spawn=self._spawn)
        self.health = HealthChecks(self._registry, self.execs, self.events, cgroups, clock)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take over what earlier processes left, then watch all containers until the block ends.

        The containers go on when the block ends.
        """
        async with errors_as_they_are(), asyncio.TaskGroup() as group, self._network.running():
            self._group = group
            known, unknown = await asyncio.to_thread(self._bundles.load)
            for container in known:
                self._registry.add(container)
            for id in unknown:
                await self._remove_unknown(id)
            live = kept(known)
            await self._network.restore(live)
            connected = {one.id for one in live}
            for container in self._registry.list():
                await self._adopt(container, has_network=container.id in connected)
            self._spawn(self.log_keeper.run(), name="log-rotation")
            self._spawn(self._keep_sweeping(), name="network-sweep")
            try:
                yield
            finally:
                for task in tuple(self._tasks):
                    task.cancel()
                self._runtime.close()

    # --- the life of one container ----------------------------------------------------------------------------

    async def create(self, wish: ContainerWish) -> Container:
        """Make everything ready to start: directories, root file system, network, published ports.

        A plain container has the last two from its start to its end only.
        Raises: AlreadyExists: the name (or a port) is taken; SkepError: something of the wish cannot be had.
        """
        container = Container(
            id=self._new_id(),
            name=wish.name,
            image=wish.image,
            image_id=wish.image_id,
            config=wish.config,
            labels=wish.labels,
            layers=wish.layers,
            created_at=timestamp(self._clock.now_ns()),
            plain=wish.plain,
        )
        if not wish.config.hostname:  # Docker's: the short id
            config = msgspec.structs.replace(wish.config, hostname=container.id[:12])
            container = msgspec.structs.replace(container, config=config)
        self._registry.add(container)
        container = await finish(self._in_turn(container.id, self._make(container)))
        self.events.publish("create", container)
        return container

    async def start(self, word: str) -> Container:
        """Start it; return when runc has let its command begin.  Nothing happens when it runs already.

        Raises: NotFound; StartError: the runtime refused, with its words; the exit code is in the record too.
        """
        id = self.get(word).id
        async with self._starting:
            return await finish(self._in_turn(id, self._start(id)))

    async def kill(self, word: str, signal_name: str = "SIGKILL") -> None:
        """Send a signal to its first process (``SIGTERM``, ``TERM`` or ``15``).

        Raises: NotFound; NotRunning; InvalidArgument: no such signal.
        """
        number = signal_number(signal_name)
        container = self.get(word)
        if not container.is_running:
            raise NotRunning(f"Cannot kill container: {word}: Container {container.id} is not running")
        if number in (signal.SIGKILL, signal_number(container.config.stop_signal or "SIGTERM")):
            container = self._stopped_by_user(container)
        await self._signal(container, number)

    async def stop(self, word: str, grace_s: float | None = None) -> Container:
        """Its stop signal, then SIGKILL after ``grace_s`` seconds (None: its own grace); return when it ended.

        Raises: NotFound.
        """
        container = self._stopped_by_user(self.get(word))
        if not container.is_running:
            return container
        if grace_s is None:
            grace_s = container.config.stop_grace_ns / 1e9
        await self._signal(container, signal_number(container.config.stop_signal or "SIGTERM"))
        try:
            async with asyncio.timeout(grace_s):
                ended = await self.wait(container.id)
        except TimeoutError:
            with suppress(NotFound):
                await self._signal(self.get(container.id), signal.SIGKILL)
            ended = await self.wait(container.id)
        self.events.publish("stop", ended)
        return ended

    async def attach(self, word: str) -> Attachment:
        """Its standard streams.  A plain container that does not run is waited for, and nothing it says is missed.

        Raises: NotFound; NotRunning: a task's, or the start that was waited for has failed.
        """
        container = self.get(word)
        if container.plain is not None and not container.is_running:
            attachment = await self._waiting.wait(container.id)
        else:
            attachment = await attach(self._bundles.bundle(self.require_running(container.id).id))
        self.events.publish("attach", container)
        return attachment

    async def remove(self, word: str, *, force: bool = False) -> None:
        """Free everything it holds; ``force`` kills it first.

        Raises: NotFound; StillRunning: it runs and ``force`` was not given.
        """
        id = self.get(word).id
        await self._in_turn(id, self._remove(id, force=force))

    async def retire(self, word: str) -> None:
        """A task's container that never ran is not going to: free what only a running one needs.

        Its record stays, as that of one that ended.  Raises: NotFound.
        """
        id = self.get(word).id
        await finish(self._in_turn(id, self._retire(id)))

    async def sweep(self) -> Collection[ContainerId]:
        """Free what the network holds for containers that are gone, have ended or never ran; gives whose it was.

        Raises: SkepError, OSError: some of it could not be freed.
        """
        return await self._network.sweep(self._needs_network)

    # --- inside -----------------------------------------------------------------------------------------------

    async def _keep_sweeping(self) -> None:
        while True:
            await self._clock.sleep(SWEEP_SECONDS)
            try:
                await self.sweep()
            except (SkepError, OSError) as error:
                log.warning("leftovers of networks not removed yet", error=str(error))

    def _needs_network(self, id: ContainerId) -> bool:
        """Whether it has a network, or somebody is just giving it one or taking it back."""
        turn, container = self._turns.get(id), self._registry.lookup(id)
        if turn is not None and turn.locked():
            return True
        if container is None or container.endpoint is None:
            return False
        return container.is_running or not container.was_started

    async def _in_turn(self, id: ContainerId, work: Coroutine[Any, Any, T]) -> T:
        """What makes, starts, retires or removes one container happens one after the other.

        A removal that overtook the making would leave the namespace that is just being made to nobody.
        """
        turn = self._turns.setdefault(id, asyncio.Lock())
        try:
            async with turn:
                return await work
        finally:
            work.close()  # of one that was cancelled before its turn
            if self._registry.lookup(id) is None and not turn.locked():
                self._turns.pop(id, None)

    async def _make(self, container: Container) -> Container:
        try:
            self._bundles.make(container)
            if container.plain is None:
                container = await self._connect(container)
            await asyncio.to_thread(self._bundles.prepare, container)
            return container
        except BaseException as error:
            await asyncio.shield(self._discard(container.id))
            if isinstance(error, OSError):
                raise StartError(f"cannot prepare the container: {error}") from error
            raise

    async def _connect(self, container: Container) -> Container:
        """Give it its network, and write that down; a network that is in no record is nobody's to free."""
        endpoint = await self._network.attach(container)
        try:
            return self._registry.change(container.id, endpoint=endpoint)
        except BaseException:
            await asyncio.shield(self._free(self._network.detach(container.id, endpoint), container.id))
            raise

    async def _retire(self, id: ContainerId) -> None:
        container = self.get(id)
        if container.state is not ContainerState.CREATED or container.plain is not None:
            return
        await self._runtime.delete(id)
        if container.endpoint is not None:
            await self._free(self._network.detach(id, container.endpoint), id)
        await self._free(asyncio.to_thread(self._bundles.release, id), id)
        self._registry.change(id, process=None, monitor=None, endpoint=None, is_retired=True)

    async def _remove(self, id: ContainerId, *, force: bool) -> None:
        container = self.get(id)
        if container.is_running:
            if not force:
                raise StillRunning(
                    f"You cannot remove a running container {container.id}."
                    " Stop the container before attempting removal or force remove"
                )
            container = self._stopped_by_user(container)
            await self._signal(container, signal.SIGKILL)
            await self.wait(container.id)
        await self._wait_settled(container.id)
        await self._discard(container.id)
        self._waiting.fail(container.id, NotRunning(f"Container {container.id} was removed"))
        self.events.publish("destroy", container)

    async def _start(self, id: ContainerId) -> Container:
        container = self.get(id)
        if container.is_running:
            return container
        try:
            # What it had was given back when it ended; a plain one never had it.
            if container.was_started or container.plain is not None:
                await self._wait_settled(id)
                container = await self._ready_again(container)
            started = await self._runtime.create(container)
            self._registry.change(id, process=started.process, monitor=started.monitor)
            await self._waiting.serve(id, self._bundles.bundle(id))
            await self._runtime.start(id, started.process)
        except BaseException as error:
            await asyncio.shield(self._give_up(id, error))
            raise
        container = self._registry.change(
            id,
            state=ContainerState.RUNNING,
            started_at=timestamp(self._clock.now_ns()),
            finished_at=ZERO_TIME,
            exit_code=0,
            error="",
            oom_killed=False,
            health=health.first(container.config.healthcheck),
        )
        self._watch(container)
        self.events.publish("start", container)
        return container

    def note_stopped(self, id: ContainerId) -> None:
        """A plain container that does not run is not to be started again but by its user.  Raises: NotFound."""
        self._stopped_by_user(self.get(id))

    def _stopped_by_user(self, container: Container) -> Container:
        """Note that a plain container's restart policy is not to start it again."""
        plain = container.plain
        if plain is None or plain.is_stopped:
            return container
        return self._registry.change(container.id, plain=msgspec.structs.replace(plain, is_stopped=True))

    async def _signal(self, container: Container, number: int) -> None:
        if container.process is not None:
            send_signal(container.process, number)
        self.events.publish("kill", container, signal=str(int(number)))
        if number == signal.SIGKILL and container.state is ContainerState.PAUSED:
            with suppress(SkepError):
                await self._runtime.resume(container.id)  # a frozen process does not even die

    def _watch(self, container: Container) -> None:
        task = self._spawn(self._wait_and_settle(container), name=f"container-{container.id[:12]}")
        self._watches[container.id] = task
        task.add_done_callback(lambda _: self._watches.pop(container.id, None))
        if container.health is not None:
            self._spawn(self.health.run(container.id), name=f"health-{container.id[:12]}")

    async def _wait_settled(self, id: ContainerId) -> None:
        """Return when everything is freed that an ended container does not need."""
        watch = self._watches.get(id)
        if watch is not None:
            await asyncio.wait([watch])

    async def _wait_and_settle(self, container: Container) -> None:
        """Wait for its end, free what only a running container needs, then say that it ended."""
        id = container.id
        ended = await self._runtime.wait(container)
        if container.endpoint is not None:
            await self._free(self._network.detach(id, container.endpoint), id)
        container = self._registry.change(
            id,
            state=ContainerState.EXITED,
            process=None,
            monitor=None,
            exit_code=ended.exit_code,
            error=ended.error,
            oom_killed=ended.oom_killed,
            finished_at=timestamp(self._clock.now_ns()),
        )
        if ended.oom_killed:
            self.events.publish("oom", container)
        self.events.publish("die", container, exitCode=str(ended.exit_code))
        await self._runtime.clear(id)
        await self._free(asyncio.to_thread(self._bundles.release, id), id)

    async def _free(self, work: Coroutine[Any, Any, None], id: ContainerId) -> None:
        """Free one thing; a failure is logged and the next start of the node process finds the rest."""
        try:
            await work
        except (SkepError, OSError) as error:
            log.warning("not freed", container=id, error=str(error))

    async def _give_up(self, id: ContainerId, error: BaseException) -> None:
        """A start failed: nothing of it stays but the record, which says why."""
        container = self.get(id)
        await self._runtime.delete(id)
        if container.endpoint is not None:
            await self._free(self._network.detach(id, container.endpoint), id)
        await self._free(asyncio.to_thread(self._bundles.release, id), id)
        code = error.exit_code if isinstance(error, StartError) else 128
        self._waiting.fail(id, NotRunning(str(error)))
        self._registry.change(id, process=None, monitor=None, endpoint=None, exit_code=code, error=str(error))

    async def _ready_again(self, container: Container) -> Container:
        container = await self._connect(container)
        await asyncio.to_thread(self._bundles.prepare, container)
        return container

    async def _discard(self, id: ContainerId) -> None:
        container = self.get(id)
        self.execs.forget(id)
        if container.state is ContainerState.CREATED:
            await self._runtime.delete(id)
            if container.endpoint is not None:
                await self._free(self._network.detach(id, container.endpoint), id)
        await asyncio.to_thread(self._bundles.discard, id)
        self._registry.forget(id)

    # --- after a restart --------------------------------------------------------------------------------------

    async def _remove_unknown(self, id: ContainerId) -> None:
        """End and remove a container whose record cannot be read: a task's is replaced, as if it had failed."""
        log.warning("container without a readable record removed", id=id)
        await self._runtime.delete(id)
        await asyncio.to_thread(self._bundles.discard, id)

    async def _adopt(self, container: Container, *, has_network: bool) -> None:
        """Go on where the process before this one stopped."""
        if container.is_running:
            self._watch(container)  # settles at once what ended meanwhile
        elif not container.was_started and not container.is_retired:
            await self._adopt_created(container, has_network=has_network)

    async def _adopt_created(self, container: Container, *, has_network: bool) -> None:
        """Perhaps it was started a moment before the process ended: runc knows.  Otherwise make it ready anew."""
        id = container.id
        if container.process is not None and await self._runtime.status(id) in ("running", "stopped"):
            started_at = timestamp(self._clock.now_ns())
            container = self._registry.change(id, state=ContainerState.RUNNING, started_at=started_at)
            self._watch(container)
            return
        await self._runtime.delete(id)
        container = self._registry.change(id, process=None, monitor=None)
        if container.plain is not None:
            if container.endpoint is not None:  # the process before this one ended in the middle of its start
                await self._free(self._network.detach(id, container.endpoint), id)
            return
        try:
            if has_network:
                await asyncio.to_thread(self._bundles.prepare, container)
            elif not container.error:  # it could not be started, and its network was given back
                await self._ready_again(container)
        except (SkepError, OSError) as error:
            log.warning("container not ready again", container=id, error=str(error))
            self._registry.change(id, error=str(error), exit_code=128)

    # --- tasks ------------------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        if self._group is None:
            work.close()
            raise RuntimeError("containers are used outside of running()")
        task = self._group.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
