"""The life of one container: prepare, start, watch until its end, free, remove, and adopt after a restart.

Each background task handles one container.  Its error is retried, logged and shown as that container's error, and does
not affect other containers.
"""

import asyncio
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from functools import partial
from typing import Any, TypeVar

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import describe_error, isolate, log_error, retry
from skep.aio.race import Preempted, run_to_end
from skep.engine import health, runtime_spec
from skep.engine.attachment import WaitingClients
from skep.engine.bundle import RootFiles
from skep.engine.conmon import StartError
from skep.engine.container import Container, ContainerState, NotRunning, StillRunning
from skep.engine.container_locks import ContainerLocks, ForcedRemovals
from skep.engine.execs import Execs
from skep.engine.health import HealthMonitor
from skep.engine.networking import Networking, has_sandbox, publish_networks, sandbox_config
from skep.engine.processes import send_signal
from skep.engine.runtime import Runtime
from skep.engine.sharing import shared_by
from skep.engine.signals import ends_pause
from skep.engine.state import ContainerStore
from skep.engine.volumes import Volumes
from skep.errors import SkepError, Unavailable
from skep.model.ids import ContainerId
from skep.model.sandbox import NetworkMode
from skep.model.times import ZERO_TIME, timestamp
from skep.tracing import within

log = structlog.get_logger()

T = TypeVar("T")

SWEEP_SECONDS = 20.0
"""Interval between searches for network resources of removed containers."""
_READ_TRIES_MAX = 5
"""Attempts to read a container's record: the machine may be short of memory or descriptors for a moment."""
_RETRY_SECONDS_MAX = 30.0
"""Longest pause between two attempts."""
KILLED_S_MAX = 60.0
"""Deadline from SIGKILL to the record of the end.  Docker's is 12 s.  Here the networks are freed before the record,
which may take long on an overloaded machine."""


class Lifecycle:
    """Moves containers from state to state.

    Args:
        starts_max: Maximum number of containers that start at the same time.
        report_restore: Called with the reason while containers of an earlier process cannot be adopted, and with ""
            once they are.
    """

    def __init__(
        self,
        *,
        runtime: Runtime,
        network: Networking,
        volumes: Volumes,
        store: ContainerStore,
        clock: Clock,
        starts_max: int,
        report_restore: Callable[[str], None],
    ) -> None:
        self._bundles = runtime.bundles
        self._runtime = runtime
        self._network = network
        self._volumes = volumes
        self._store = store
        self.events = volumes.events
        self.locks, self.sandbox_locks = ContainerLocks(), ContainerLocks()
        """The second guards a running container's networks and its end.  A removal holds the first meanwhile."""
        self._clock = clock
        self._report_restore = report_restore
        self._starting = asyncio.Semaphore(starts_max)
        self._forced = ForcedRemovals()
        self._watches: dict[ContainerId, asyncio.Task[None]] = {}
        self._background = volumes.background
        self.spawn, self.carry_out = self._background.spawn, self._background.carry_out
        self._has_found = False
        self.waiting = WaitingClients()
        self.execs = Execs(self._bundles, runtime, self.events, clock, container=store.get, spawn=self.spawn)
        self.health = HealthMonitor(store, self.execs, self.events, clock)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Adopt the containers of earlier processes, then watch all containers until the block ends."""
        async with self._background.running():
            await self._restore()
            self.spawn(self._store.run(self._clock), name="records")
            self.spawn(self._keep_sweeping(), name="network-sweep")
            self.spawn(self._keep_unmounting(), name="unfinished-volumes")
            try:
                yield
            finally:
                self._runtime.close()

    # --- operations ---------------------------------------------------------------------------------------------

    async def prepare(self, container: Container) -> Container:
        """Create everything that a new container needs.  Cleans up on failure.  Raises: SkepError."""
        return await run_to_end(self.locks.run(container.id, self._prepare_new(container)))

    async def start(self, id: ContainerId, secret_env: Sequence[str] = ()) -> Container:
        """Start the process.  Does nothing if it runs.

        ``secret_env`` are additional variables for this run, which no record contains.
        Raises: NotFound; BeingRemoved; StartError; MountFailed; NotRunning: a forced removal interrupted the start.
        """
        async with AsyncExitStack() as held:
            await held.enter_async_context(self.locks.acquire(id))
            container = self._store.require_startable(id)
            if container.is_running:
                return container
            await self._wait_settled(id)
            try:
                # Before it takes a start slot: waiting for a server or plug-in must not block other containers.
                await self._mount_unless_removed(container)
                await held.enter_async_context(self._starting)
            except BaseException as error:
                await run_to_end(self._give_up(container, error, held.pop_all()))
                raise
            return await run_to_end(self._start(id, secret_env, held.pop_all()))

    async def retire(self, id: ContainerId) -> None:
        """Free the resources that only a running container needs, of a container that never ran.  Raises: NotFound."""
        await run_to_end(self.locks.run(id, self._retire(id)))

    async def remove(self, id: ContainerId, *, force: bool) -> None:
        """Remove a container.  Raises: NotFound; StillRunning; Unavailable: a part of it is left."""
        with self._forced.removing(id) if force else nullcontext():
            await self.locks.run(id, self._remove(id, force=force))

    @asynccontextmanager
    async def mount_root(self, id: ContainerId) -> AsyncIterator[RootFiles]:
        """Mount the root file system and the volumes for the block, whether the container runs or not.

        Raises: NotFound; MountFailed; Unavailable: it cannot be mounted.
        """
        container, user = self._store.require(id), f"files of {id}: {secrets.token_hex(8)}"
        borrowed: list[RootFiles] = []

        async def borrow() -> None:
            try:
                borrowed.append(await asyncio.to_thread(self._bundles.borrow, self._store.require(id)))
            except OSError as error:
                raise Unavailable(f"cannot mount container {id}: {describe_error(error)}") from error

        try:
            await self._volumes.mount(user, container.config.mounts)
            await run_to_end(self.locks.run(id, borrow()))
            yield borrowed[0]
        finally:
            if borrowed:
                await asyncio.shield(self._free(asyncio.to_thread(self._bundles.give_back, id), id))
            await asyncio.shield(self._free(self._volumes.unmount(user), id))

    async def sweep(self) -> Collection[ContainerId]:
        """Free network resources of containers that do not exist, have ended or never ran.  Return the containers' ids.

        A failure for one container is logged, and the next sweep retries it.  Raises: OSError: network namespaces.
        """
        freed = []
        for id in await self._network.holders():
            if self.locks.is_held(id) or self.sandbox_locks.is_held(id):
                continue  # its sandbox is being attached or freed now
            # A start waits for the lock.  Otherwise this could free the resources that it has just received.
            async with self.locks.acquire(id), self.sandbox_locks.acquire(id):
                if not self._needs_network(id):
                    await self._free(self._network.free(id), id)
                    freed.append(id)
        await self._network.sweep()
        return freed

    async def signal(self, container: Container, number: int) -> None:
        """Send a signal to the first process.  If it no longer exists, record the end that was missed.

        A signal that ends a container also resumes a paused one: a frozen process would not notice before SIGKILL.
        """
        if container.process is not None:
            send_signal(container.process, number)
        elif container.is_running and container.id not in self._watches:
            self._watch(container)  # otherwise waiters would block forever
        self.events.publish("kill", container, signal=str(int(number)))
        if container.state is ContainerState.PAUSED and ends_pause(number, container.config.stop_signal):
            with suppress(SkepError):
                await run_to_end(self.resume(container))

    async def resume(self, container: Container) -> None:
        """Resume the processes, and record that.  Raises: NotFound; NotRunning: it has ended; RuntimeFailed."""
        await self._runtime.resume(container.id)
        running = self._store.observe_running(container, state=ContainerState.RUNNING)
        self.events.publish("unpause", running)

    async def kill(self, container: Container) -> Container:
        """Kill a container and return it once it has ended.

        Bounded, because its caller waits meanwhile and, at a removal, the container's other operations do too.
        Raises: NotFound; Unavailable: it does not end (a process may wait for a device forever).
        Source: moby 24.0, daemon/kill.go, daemon/delete.go.
        """
        await self.signal(container, signal.SIGKILL)
        try:
            async with asyncio.timeout(KILLED_S_MAX):
                return await self._store.wait(container.id)
        except TimeoutError as error:
            raise Unavailable("tried to kill container, but did not receive an exit event") from error

    # --- create and start ---------------------------------------------------------------------------------------

    async def _prepare_new(self, container: Container) -> Container:
        try:
            self._bundles.make(container)
            if container.plain is None:
                container = await self._connect_all(container)
            else:  # it may not be started for a long time, so it gets no network
                container = self._store.change(container.id)
            return await self._write(container, runtime_spec.NOTHING_SHARED)
        except BaseException as error:
            await asyncio.shield(self._free(self._discard(container.id), container.id))
            if isinstance(error, OSError):
                raise StartError(f"cannot prepare the container: {error}") from error
            raise

    async def _connect_all(self, container: Container) -> Container:
        """Create the sandbox and record it.  A sandbox without a record would never be freed."""
        sandbox = await self._network.attach(sandbox_config(container))
        try:
            return self._store.change(container.id, sandbox=sandbox)
        except BaseException:
            await asyncio.shield(self._free(self._network.detach(container.id, sandbox), container.id))
            raise

    async def _start(self, id: ContainerId, secret_env: Sequence[str], held: AsyncExitStack) -> Container:
        """Start a mounted container.  ``held`` has its lock and start slot, which outlast a cancelled caller."""
        async with held:
            container = self._store.require(id)  # read again: it may have waited for minutes
            await self._begin(container, secret_env)
            return self._began(id)

    async def _give_up(self, container: Container, error: BaseException, held: AsyncExitStack) -> None:
        """Clean up after a failed mount, or after a start that was cancelled before it had a start slot."""
        async with held:
            if isinstance(error, Exception):
                await self._abandon_start(container.id, error)
            else:
                await self._unmount(container)

    async def _begin(self, container: Container, secret_env: Sequence[str]) -> None:
        id = container.id
        try:
            # The sandbox was freed at its end, and a plain container never had one.
            if container.was_started or container.plain is not None:
                container = await self._prepare_again(container, secret_env)
            elif secret_env:
                shared = shared_by(container, self._store.get, self._bundles.shm)
                container = await self._write(container, shared, secret_env)
            with within("runc create"):
                started = await self._runtime.create(container)
            self._volumes.release_parts(self._bundles.parts(container))
            self._store.change(id, process=started.process, monitor=started.monitor)
            await self.waiting.serve(id, self._bundles.bundle(id))
            with within("runc start"):
                await self._runtime.start(id, started.process)
        except BaseException as error:
            await asyncio.shield(self._abandon_start(id, error))
            raise
        finally:
            if secret_env:
                self._bundles.forget_environment(id, secret_env)

    def _began(self, id: ContainerId) -> Container:
        container = self._store.observe(
            id,
            state=ContainerState.RUNNING,
            started_at=timestamp(self._clock.now_ns()),
            finished_at=ZERO_TIME,
            exit_code=0,
            error="",
            interruption=None,
            oom_killed=False,
            health=health.initial(self._store.require(id).config.healthcheck),
        )
        if self._background.is_running:  # otherwise this process is ending, and the next one watches it
            self._watch(container)
        publish_networks(self.events, "connect", container, container.sandbox, self._network.predefined_ids)
        self.events.publish_mounts("mount", container)
        self.events.publish("start", container)
        return container

    async def _prepare_again(self, container: Container, secret_env: Sequence[str] = ()) -> Container:
        shared = shared_by(container, self._store.get, self._bundles.shm)
        container = await self._connect_all(container)
        return await self._write(container, shared, secret_env)

    async def _write(
        self, container: Container, shared: runtime_spec.Shared, secret_env: Sequence[str] = ()
    ) -> Container:
        """Write the runtime's input, and record the parts of the configuration that this node could not provide."""
        config = container.config
        written = msgspec.structs.replace(config, env=runtime_spec.merged_environment(config.env, secret_env))
        run = msgspec.structs.replace(container, config=written)
        warnings = await asyncio.to_thread(self._bundles.prepare, run, shared)
        if warnings == container.warnings:
            return container
        return self._store.observe(container.id, warnings=warnings)

    async def _mount(self, container: Container) -> None:
        """Mount the container's volumes.  Raises: MountFailed; Unavailable."""
        await self._volumes.mount(container.id, container.config.mounts, self._bundles.parts(container))

    async def _mount_unless_removed(self, container: Container) -> None:
        """Mount, but give up for a forced removal: a server may be silent.  Raises: as ``_mount``; NotRunning."""
        try:
            await self._forced.mount(container.id, self._mount(container))
        except Preempted as error:
            raise NotRunning(f"Container {container.id} is being removed") from error

    async def _unmount(self, container: Container) -> None:
        await self._free(self._volumes.unmount(container.id, self._bundles.parts(container)), container.id)

    async def _abandon_start(self, id: ContainerId, error: BaseException) -> None:
        """Free all resources of a failed start and record the reason."""
        await self._free_resources(self._store.require(id))
        await self._free(asyncio.to_thread(self._bundles.release, id), id)
        await self._unmount(self._store.require(id))
        code = error.exit_code if isinstance(error, StartError) else 128
        self.waiting.fail(id, NotRunning(str(error)))
        self._store.observe(
            id, process=None, monitor=None, sandbox=None, exit_code=code, error=describe_error(error)
        )

    # --- the end of a container ---------------------------------------------------------------------------------

    def _watch(self, container: Container) -> None:
        id = container.id
        task = self._watches[id] = self.spawn(self._wait_and_settle(container), name=f"container-{id[:12]}")
        task.add_done_callback(lambda done: self._forget_watch(id, done))
        if container.health is not None:
            self.spawn(self._persist(lambda: self.health.run(id), id), name=f"health-{id[:12]}")

    def _forget_watch(self, id: ContainerId, done: asyncio.Task[None]) -> None:
        if self._watches.get(id) is done:  # it may have been started again meanwhile
            del self._watches[id]

    async def _wait_settled(self, id: ContainerId) -> None:
        """Return when all resources of an ended container are freed."""
        if (watch := self._watches.get(id)) is not None:
            await asyncio.wait([watch])

    async def _wait_and_settle(self, container: Container) -> None:
        """Wait for the end, free the resources that only a running container needs, then record the end."""
        id = container.id
        ended = await self._persist(lambda: self._runtime.wait(container), id)
        async with self.sandbox_locks.acquire(id):
            sandbox = self._store.require(id).sandbox  # read again: networks change while it runs
            if sandbox is not None:
                await self._free(self._network.detach(id, sandbox), id)
            container = self._store.observe(
                id,
                state=ContainerState.EXITED,
                process=None,
                monitor=None,
                **msgspec.structs.asdict(ended),
                finished_at=timestamp(self._clock.now_ns()),
                is_at_rest=False,
            )
        if ended.oom_killed:
            self.events.publish("oom", container)
        self.events.publish("die", container, exitCode=str(ended.exit_code))
        publish_networks(self.events, "disconnect", container, sandbox, self._network.predefined_ids)
        await self._free(self._runtime.clear(container), id)
        await self._free(asyncio.to_thread(self._bundles.release, id), id)
        await self._unmount(container)
        self.events.publish_mounts("unmount", container)

    async def _retire(self, id: ContainerId) -> None:
        container = self._store.require(id)
        if container.state is not ContainerState.CREATED or container.plain is not None:
            return
        await self._free_resources(container)
        await self._free(asyncio.to_thread(self._bundles.release, id), id)
        self._store.observe(id, process=None, monitor=None, sandbox=None, is_retired=True)

    async def _remove(self, id: ContainerId, *, force: bool) -> None:
        container = self._store.require(id)
        if container.is_active and not force:
            raise StillRunning(
                "container is paused and must be unpaused first"
                if container.state is ContainerState.PAUSED
                else f"container is {container.status}: stop the container before removing or force remove"
            )
        if container.is_running:
            container = self._store.note_stopped(id)
            try:
                await self.kill(container)
            except Unavailable as error:
                raise Unavailable(
                    f'cannot remove container "/{container.name}": could not kill: {error}'
                ) from error
        await self._wait_settled(container.id)
        await self._discard(container.id)
        self.waiting.fail(container.id, NotRunning(f"Container {container.id} was removed"))
        self.events.publish("destroy", container)

    async def _discard(self, id: ContainerId) -> None:
        """Free everything, unless that is done.  Raises: Unavailable: a part is left.  The record then stays."""
        if (container := self._store.lookup(id)) is None:
            return
        self.execs.forget(id)
        if container.state in (ContainerState.CREATED, ContainerState.REMOVING):
            await self._free_resources(container)
        self._store.observe(id, state=ContainerState.REMOVING)
        try:
            await self._bundles.discard(id)
        except OSError as error:
            self._store.observe(id, error=describe_error(error))
            raise Unavailable(f"cannot remove container {id}: {describe_error(error)}") from error
        self._store.forget(id)

    async def _discard_unknown(self, id: ContainerId) -> None:
        """End and remove a container whose record cannot be decoded.  A task's is replaced, as if it had failed."""
        await self._runtime.delete_unknown(id)
        await self._bundles.discard(id)

    async def _free_resources(self, container: Container) -> None:
        """Remove runc's state, the cgroups and the sandbox of a container that does not run."""
        await self._free(self._runtime.delete(container), container.id)
        if container.sandbox is not None:
            await self._free(self._network.detach(container.id, container.sandbox), container.id)

    async def _free(self, work: Awaitable[None], id: ContainerId) -> None:
        """Free one resource.  A failure is logged, and a sweep or the next start finds the leftovers."""
        await isolate(work, "resource not freed", container=id)

    async def _keep_sweeping(self) -> None:
        while True:
            await self._clock.sleep(SWEEP_SECONDS)
            await isolate(self.sweep(), "leftover network resources not removed yet")

    async def _keep_unmounting(self) -> None:
        """Retry unmounts, apart from the other sweeps, so that a silent device or plug-in holds up nothing else."""
        while True:
            await self._clock.sleep(SWEEP_SECONDS)
            await retry(
                self._volumes.unmount_unfinished, "volumes not unmounted yet", clock=self._clock, first_s=1.0
            )

    def may_have(self, id: ContainerId) -> bool:
        """Return whether the container exists or, until all records are read, may exist."""
        return not self._has_found or self._store.lookup(id) is not None

    def _needs_network(self, id: ContainerId) -> bool:
        """Return whether the container has a sandbox and needs it."""
        container = self._store.lookup(id)
        if container is None or container.sandbox is None:
            return False
        return container.is_running or not container.was_started

    # --- after a restart of the node process --------------------------------------------------------------------

    async def _restore(self) -> None:
        """Read the records of earlier processes and adopt their containers.  Errors are retried."""
        load = partial(asyncio.to_thread, self._bundles.load)
        found = await self._persist_restoring(load, "records of containers not read")
        backoff = Backoff(0.1, 2.0)
        for _ in range(_READ_TRIES_MAX):
            if not found.unreadable:
                break
            await backoff.sleep(self._clock)
            found = await self._persist_restoring(load, "records of containers not read")
        for container in found.known:
            self._store.restore(container)
        for id in found.unreadable:  # its addresses are unknown, and may be assigned to others now
            log.error("container ended: record not readable", container=id)
            await self._free(self._runtime.delete_unknown(id), id)
            self.spawn(self._persist(partial(self._read_again, id), id), name=f"record-{id[:12]}")
        for id in found.unknown:
            log.warning("container without record removed", container=id)
            self.spawn(self._persist(partial(self._discard_unknown, id), id), name=f"remove-{id[:12]}")
        self._has_found = True
        live = [
            (sandbox_config(one), one.sandbox)
            for one in found.known
            if one.sandbox is not None and has_sandbox(one)
        ]
        await self._persist_restoring(partial(self._network.restore, live), "networks not restored")
        connected = {config.id for config, _ in live}
        for container in self._store.list():
            work = self._adopt(
                container, has_network=container.id in connected or container.mode is NetworkMode.HOST
            )
            await isolate(
                work,
                "container not adopted",
                on_error=partial(self._show, container.id),
                container=container.id,
            )
        unmounting = retry(self._volumes.unmount_unused, "volumes not unmounted", clock=self._clock)
        self.spawn(unmounting, name="unused-volumes")

    async def _persist_restoring(self, work: Callable[[], Awaitable[T]], event: str) -> T:
        """Return the result of ``work``.  Retries errors and reports the reason meanwhile."""

        def show(error: Exception) -> None:
            self._report_restore(f"earlier containers are not adopted yet: {describe_error(error)}")

        result = await retry(work, event, clock=self._clock, longest_s=10.0, on_error=show)
        self._report_restore("")
        return result

    async def _read_again(self, id: ContainerId) -> None:
        """Adopt a container whose record could not be read.  Raises: Unavailable: it still cannot be read."""
        container = await asyncio.to_thread(self._bundles.read, id)
        if container is None:
            await self._discard_unknown(id)
        else:
            self._store.restore(container)
            await self._adopt(container, has_network=False)

    async def _adopt(self, container: Container, *, has_network: bool) -> None:
        """Continue where the previous process stopped."""
        if container.state is ContainerState.REMOVING:
            id = container.id
            self.spawn(
                self._persist(lambda: self.locks.run(id, self._discard(id)), id),
                name=f"remove-{id[:12]}",
            )
        elif container.is_running:
            self._volumes.adopt(container.id, container.config.mounts)
            await self._adopt_api(container)
            self._watch(container)  # records the end at once if it has ended meanwhile
        elif not container.was_started and not container.is_retired:
            await self._adopt_created(container, has_network=has_network)
        elif container.is_at_rest:  # its policy takes effect from now on, as after a machine's boot
            self._store.observe(container.id, is_at_rest=False)

    async def _adopt_api(self, container: Container) -> None:
        apis, id = self._bundles.apis, container.id
        adopt = partial(asyncio.to_thread, apis.adopt, container, self._bundles.api(id))
        try:
            await adopt()
        except Exception:  # the container keeps running meanwhile
            event = "API socket not adopted yet"
            self.spawn(retry(adopt, event, clock=self._clock, container=id), name=f"api-{id[:12]}")

    async def _adopt_created(self, container: Container, *, has_network: bool) -> None:
        """Adopt it if the previous process started it just before its end.  Otherwise prepare it again."""
        id = container.id
        if container.process is not None and await self._runtime.status(id) in ("running", "stopped"):
            started_at = timestamp(self._clock.now_ns())
            self._volumes.adopt(id, container.config.mounts)
            container = self._store.observe(id, state=ContainerState.RUNNING, started_at=started_at)
            await self._adopt_api(container)
            self._watch(container)
            return
        await self._runtime.delete(container)
        container = self._store.observe(id, process=None, monitor=None)
        if container.plain is not None:
            if container.sandbox is not None:  # the previous process ended in the middle of its start
                await self._free(self._network.detach(id, container.sandbox), id)
            return
        try:
            if has_network:
                await self._write(container, runtime_spec.NOTHING_SHARED)
            elif not container.error:  # else its start has failed, and its sandbox was freed
                await self._prepare_again(container)
        except Exception as error:
            log_error(error, "container not prepared again", container=id)
            self._store.observe(id, error=describe_error(error), exit_code=128)

    # --- background work ----------------------------------------------------------------------------------------

    async def _persist(self, work: Callable[[], Awaitable[Any]], id: ContainerId) -> Any:
        """Return the result of ``work`` on a container.  Retries errors and shows them as the container's error."""
        return await retry(
            work,
            "container operation failed",
            clock=self._clock,
            longest_s=_RETRY_SECONDS_MAX,
            on_error=lambda error: self._show(id, error),
            container=id,
        )

    def _show(self, id: ContainerId, error: Exception) -> None:
        if self._store.lookup(id) is not None:
            self._store.observe(id, error=describe_error(error))
