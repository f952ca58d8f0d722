"""The containers of this node: from a wish to a process under runc, and back to nothing.

One ``Containers`` owns everything below ``<data>/containers``.  A container is named by its id, its name or
a unique prefix of the id, as docker does (``word``).  What a caller gets is an immutable ``Container``; ask
again to see changes.

Containers outlive this process: ``running()`` finds those of an earlier process again, takes over the ones
that still run and settles the ones that ended meanwhile.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TypeVar

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.first import finish
from skep.aio.groups import errors_as_they_are
from skep.aio.guard import contain, explain, persist, report
from skep.engine import health
from skep.engine.attachment import Attachment, attach
from skep.engine.bundle import Bundles
from skep.engine.cgroups import Cgroups
from skep.engine.conmon import StartError
from skep.engine.container import Container, ContainerState, ContainerWish, NotRunning, StillRunning
from skep.engine.events import Events
from skep.engine.log_keeping import LogKeeper
from skep.engine.networking import Networking, kept
from skep.engine.processes import send_signal
from skep.engine.registry import Registry
from skep.engine.runtime import Runtime
from skep.engine.settling import ContainerSettler
from skep.engine.signals import signal_number
from skep.errors import NotFound, SkepError
from skep.model.ids import ContainerId
from skep.model.times import ZERO_TIME, timestamp
from skep.node.conditions import Conditions

log = structlog.get_logger()

T = TypeVar("T")

_READ_TRIES_MAX = 5
"""Of records that the disk does not give: it may be out of memory or descriptors for a moment."""


class Containers(ContainerSettler):
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
        conditions: Conditions | None = None,
    ) -> None:
        """``starts_max``: containers that are created and started at the same moment, at most.

        Twice the number of cores keeps a single start short under load at no loss of rate.
        """
        super().__init__(
            network=network,
            registry=Registry(bundles),
            bundles=bundles,
            cgroups=cgroups,
            clock=clock,
            runtime=runtime,
            events=Events(clock),
        )
        self._new_id = new_id
        self._starting = asyncio.Semaphore(starts_max)
        self._conditions = conditions
        self.log_keeper = LogKeeper(bundles, runtime, clock, self.list)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take over what earlier processes left, then watch all containers until the block ends.

        The containers go on when the block ends.
        """
        async with errors_as_they_are(), asyncio.TaskGroup() as group, self._network.running():
            self._group = group
            await self._restore()
            self._spawn(self._registry.run(self._clock), name="records")
            rotating = persist(self.log_keeper.run, "log rotation ended", clock=self._clock)
            self._spawn(rotating, name="log-rotation")
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

    async def _make(self, container: Container) -> Container:
        try:
            self._bundles.make(container)
            if container.plain is None:
                container = await self._connect(container)
            await asyncio.to_thread(self._bundles.prepare, container)
            return container
        except BaseException as error:
            await asyncio.shield(self._free(self._discard(container.id), container.id))
            if isinstance(error, OSError):
                raise StartError(f"cannot prepare the container: {error}") from error
            raise

    async def _connect(self, container: Container) -> Container:
        """Give it its network, and write that down; a network that is in no record is nobody's to free."""
        sandbox = await self._network.attach(container)
        try:
            return self._registry.change(container.id, sandbox=sandbox)
        except BaseException:
            await asyncio.shield(self._free(self._network.detach(container.id, sandbox), container.id))
            raise

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
        container = self._registry.observe(
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
        return self._registry.observe(container.id, plain=msgspec.structs.replace(plain, is_stopped=True))

    async def _signal(self, container: Container, number: int) -> None:
        if container.process is not None:
            send_signal(container.process, number)
        self.events.publish("kill", container, signal=str(int(number)))
        if number == signal.SIGKILL and container.state is ContainerState.PAUSED:
            with suppress(SkepError):
                await self._runtime.resume(container.id)  # a frozen process does not even die

    async def _ready_again(self, container: Container) -> Container:
        container = await self._connect(container)
        await asyncio.to_thread(self._bundles.prepare, container)
        return container

    # --- after a restart --------------------------------------------------------------------------------------

    async def _restore(self) -> None:
        """Find the containers of earlier processes again.  Nothing that one of them has left stops this."""
        load = partial(asyncio.to_thread, self._bundles.load)
        found = await self._persist_restoring(load, "containers not found again")
        backoff = Backoff(0.1, 2.0)
        for _ in range(_READ_TRIES_MAX):
            if not found.unreadable:
                break
            await backoff.sleep(self._clock)
            found = await self._persist_restoring(load, "containers not found again")
        for container in found.known:
            self._registry.restore(container)
        for id in found.unreadable:  # without its record nobody knows its network, which others are given now
            log.error("container is ended: its record cannot be read", container=id)
            await self._free(self._runtime.delete(id), id)
            self._spawn(self._persist(partial(self._look_again, id), id), name=f"record-{id[:12]}")
        for id in found.unknown:
            log.warning("container without a record removed", container=id)
            self._spawn(self._persist(partial(self._remove_unknown, id), id), name=f"remove-{id[:12]}")
        live = kept(found.known)
        await self._persist_restoring(partial(self._network.restore, live), "networks not restored")
        connected = {one.id for one in live}
        for container in self._registry.list():
            work = self._adopt(container, has_network=container.id in connected)
            await contain(
                work,
                "container not taken over",
                on_error=partial(self._show, container.id),
                container=container.id,
            )

    async def _persist_restoring(self, work: Callable[[], Awaitable[T]], event: str) -> T:
        """What comes of ``work``; meanwhile the node answers, and says why it is not ready."""

        def show(error: Exception) -> None:
            if self._conditions is not None:
                message = f"containers of before are not taken over: {explain(error)}"
                self._conditions.raise_("restore", message)

        result = await persist(work, event, clock=self._clock, longest_s=10.0, on_error=show)
        if self._conditions is not None:
            self._conditions.clear("restore")
        return result

    async def _look_again(self, id: ContainerId) -> None:
        """Take over a container whose record could not be read.  Raises: Unavailable: it still cannot."""
        container = await asyncio.to_thread(self._bundles.read, id)
        if container is None:
            await self._remove_unknown(id)
        else:
            self._registry.restore(container)
            await self._adopt(container, has_network=False)

    async def _adopt(self, container: Container, *, has_network: bool) -> None:
        """Go on where the process before this one stopped."""
        if container.state is ContainerState.REMOVING:
            id = container.id
            self._spawn(
                self._persist(lambda: self._in_turn(id, self._discard(id)), id), name=f"remove-{id[:12]}"
            )
        elif container.is_running:
            self._watch(container)  # settles at once what ended meanwhile
        elif not container.was_started and not container.is_retired:
            await self._adopt_created(container, has_network=has_network)

    async def _adopt_created(self, container: Container, *, has_network: bool) -> None:
        """Perhaps it was started a moment before the process ended: runc knows.  Otherwise make it ready anew."""
        id = container.id
        if container.process is not None and await self._runtime.status(id) in ("running", "stopped"):
            started_at = timestamp(self._clock.now_ns())
            container = self._registry.observe(id, state=ContainerState.RUNNING, started_at=started_at)
            self._watch(container)
            return
        await self._runtime.delete(id)
        container = self._registry.observe(id, process=None, monitor=None)
        if container.plain is not None:
            if container.sandbox is not None:  # the process before this one ended in the middle of its start
                await self._free(self._network.detach(id, container.sandbox), id)
            return
        try:
            if has_network:
                await asyncio.to_thread(self._bundles.prepare, container)
            elif not container.error:  # it could not be started, and its network was given back
                await self._ready_again(container)
        except Exception as error:
            report(error, "container not ready again", container=id)
            self._registry.observe(id, error=explain(error), exit_code=128)
