"""Runs the lives of this node's containers: applies ``machine.TABLE``, and carries out the effects that it names.

The driver decides nothing about a container.  It has three tasks: it serializes the operations on a container
(``ContainerLocks``), runs the effects of one event after the other and writes the record between them (``_run``), and
decides what a cancellation interrupts.  ``docs/design/runtime.md`` has a table of the latter.

Each background task handles one container.  Its error is retried, logged and shown as that container's error, and does
not affect other containers.
"""

import asyncio
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from typing import Any, TypeVar

import msgspec
import structlog

from skep.aio.clock import Clock, tick
from skep.aio.failures import describe_error, isolate, log_error, retry
from skep.aio.race import afterwards, run_to_end, thread_to_end
from skep.engine.containers.container import Container
from skep.engine.containers.execs import Execs
from skep.engine.containers.health import HealthMonitor
from skep.engine.containers.state import ContainerStore
from skep.engine.lifecycle import life_events, machine
from skep.engine.lifecycle.adoption import Adoption
from skep.engine.lifecycle.container_locks import ContainerLocks
from skep.engine.lifecycle.effects import Effects, Program
from skep.engine.lifecycle.life_events import LifeEvent
from skep.engine.lifecycle.machine import BEST_EFFORT, Effect, LifeStep, Saving
from skep.engine.networks.networking import Networking
from skep.engine.runtime.bundle import RootFiles
from skep.engine.runtime.conmon import StartError
from skep.engine.runtime.runtime import Runtime
from skep.engine.volumes.volumes import Volumes
from skep.errors import Unavailable, reason_of
from skep.model.values.ids import ContainerId

log = structlog.get_logger()

T = TypeVar("T")

SWEEP_SECONDS = 20.0
"""Interval between searches for network resources of removed containers."""
_RETRY_SECONDS_MAX = 30.0
"""Longest pause between two attempts."""
KILLED_S_MAX = 60.0
"""Seconds from SIGKILL until the container's end must be recorded.  Docker allows 12 s.  Skep frees the networks first,
which may take long on an overloaded machine."""


class LifecycleDriver:
    """Moves containers from state to state.

    Args:
        starts_max: Maximum number of containers that start at the same time.
        report_restore: Called with the reason while containers of an earlier process cannot be adopted, and with ""
            afterwards.
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
        self._clock = clock
        self._background = volumes.background
        self.starting = asyncio.Semaphore(starts_max)
        self.watches: dict[ContainerId, asyncio.Task[None]] = {}
        self.events = volumes.events
        self.locks = ContainerLocks()
        self.spawn, self.carry_out = self._background.spawn, self._background.carry_out
        self.effects = Effects(runtime, network, volumes, store, clock)
        self.waiting = self.effects.waiting
        self.execs = Execs(self._bundles, runtime, self.events, clock, container=store.get, spawn=self.spawn)
        self.health = HealthMonitor(store, self.execs, clock, report=self.run)
        self.adoption = Adoption(self, self.effects, runtime, network, store, report_restore)
        self.actions = {
            **self.effects.actions,
            Effect.AWAIT_NETWORKS: self._await_networks,
            Effect.AWAIT_RELEASE: self._await_release,
            Effect.TAKE_START_SLOT: self._take_start_slot,
            Effect.WATCH: self._watch,
            Effect.SEND_SIGNAL: self._send_signal,
            Effect.END_PROCESS: self._end_process,
            Effect.FORGET_EXECS: self._forget_execs,
        }

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Adopt the containers of earlier processes, then watch all containers until the block ends."""
        async with self._background.running():
            await self.adoption.restore(self._clock)
            self.spawn(self._unmount_unused(), name="unused-volumes")
            self.spawn(self._store.run(self._clock), name="records")
            self.spawn(self._keep_sweeping(), name="network-sweep")
            self.spawn(self._keep_unmounting(), name="unfinished-volumes")
            try:
                yield
            finally:
                self._runtime.close()

    # --- operations ---------------------------------------------------------------------------------------------

    def note(self, id: ContainerId, event: LifeEvent) -> Container:
        """Apply an event without effects.  Does not wait for operations.  Raises: NotFound; OSError; a refusal."""
        step = machine.step(self._store.require(id), event)
        assert not step.rule.effects, "only its record changes"
        return self._write(step)

    async def prepare(self, container: Container) -> None:
        """Create everything that a new container needs.  Cleans up on failure.  Raises: SkepError."""
        try:
            async with self.locks.operation(container.id):
                await self.run(container.id, life_events.Create())
        except OSError as error:
            raise StartError(f"cannot prepare the container: {reason_of(error)}") from error

    async def start(self, id: ContainerId, secret_env: Sequence[str] = ()) -> Container:
        """Start the process.  Does nothing if it runs.

        ``secret_env`` are additional variables for this run, which no record contains.
        Raises: NotFound; BeingRemoved; StartError; MountFailed; NotRunning: a forced removal interrupted the start.
        """
        async with self.locks.operation(id):
            await self.adoption.adopt_first(
                id
            )  # which makes the policy active, as at each start of the node process
            if self._store.require(id).plain is not None:
                self.note(id, life_events.UserStarts())
            return await self.run(id, life_events.Start(secret_env=tuple(secret_env)))

    async def restart(self, id: ContainerId, *, ignore_stop: bool) -> None:
        """Start a plain container by its policy, unless it runs or the policy has changed.

        Raises: NotFound; BeingRemoved; SkepError, OSError: it cannot be started.
        """
        async with self.locks.operation(id):
            await self.adoption.adopt_first(id)
            await self.run(id, life_events.Start(by_policy=True, ignore_stop=ignore_stop))

    async def retire(self, id: ContainerId) -> None:
        """Free the resources that only a running container needs.  For containers that never ran.  Raises: NotFound."""
        async with self.locks.operation(id):
            await self.run(id, life_events.Retire())

    async def update(self, id: ContainerId, event: life_events.Update) -> Container:
        """Change limits and the restart policy without a restart.

        Raises: NotFound; BeingRemoved; errors of ``event.change``; InvalidArgument: this node does not have the
        processors or memory nodes; RuntimeFailed.
        """
        async with self.locks.operation(id):
            await self.adoption.adopt_first(id)  # otherwise its processes would keep the old limits
            return await self.run(id, event)

    async def change_networks(
        self, id: ContainerId, event: life_events.Connect | life_events.Disconnect | life_events.Rename
    ) -> Container:
        """Change the networks of a container or its name on them.

        Its exit is not recorded meanwhile.  Raises: NotFound; OSError; SkepError, in Docker's words.
        """
        async with self.locks.operation(id):
            await self.adoption.adopt_first(id)  # otherwise a run would keep its old networks or name
            async with self.locks.networks(id):
                return await self.run(id, event)

    async def pause(self, container: Container) -> None:
        """Freeze the run that ``container`` shows.  Raises: NotFound; NotRunning; RuntimeFailed."""
        async with self.locks.operation(container.id):
            # Otherwise runc would freeze a run that starts meanwhile.
            await self.run(container.id, life_events.Pause(container.process))

    async def unpause(self, container: Container) -> None:
        """Thaw the run that ``container`` shows.  Raises: NotFound; NotRunning; RuntimeFailed."""
        async with self.locks.operation(container.id):
            await self.run(container.id, life_events.Unpause(container.process))

    async def remove(self, id: ContainerId, *, force: bool) -> None:
        """Remove a container.  Raises: NotFound; StillRunning; Unavailable: it was not removed completely."""
        with self.effects.forced.removing(id) if force else nullcontext():
            async with self.locks.operation(id):
                await self.remove_locked(id, life_events.RemoveContainer(force))

    async def remove_locked(self, id: ContainerId, event: LifeEvent) -> None:
        """Remove a container, whose lock the caller holds.  Raises: as ``remove``."""
        try:
            await self.run(id, event)
        except OSError as error:
            raise Unavailable(f"cannot remove container {id}: {describe_error(error)}") from error

    async def signal(self, container: Container, number: int) -> None:
        """Send a signal to the first process.  If the process no longer exists, record its exit.

        A signal that ends a container first resumes it if it is paused, because a frozen process handles only SIGKILL.
        """
        await self.run(container.id, life_events.Signal(number))

    async def stop(self, id: ContainerId, number: int, grace_s: float) -> Container:
        """Send a signal, then SIGKILL after ``grace_s`` seconds, or never if that is negative.  Return the stopped
        container.

        Raises: NotFound; Unavailable: it did not end although it was killed.
        """
        before = self._store.require(id)
        container = await self.end_restarting(before)
        if not container.is_running:
            if before.is_restarting:
                self.events.publish("stop", container)
            return container
        await self.signal(container, number)
        try:
            async with asyncio.timeout(grace_s if grace_s >= 0 else None):
                ended = await self._store.wait(id, since=container)
        except TimeoutError:
            present = self._store.lookup(id)
            ended = container if present is None else await self.kill(present)
        self.events.publish("stop", ended)
        return ended

    async def kill(self, container: Container) -> Container:
        """Kill a container and return it once it has ended.

        Bounded, because the caller waits, and during a removal also the container's other operations.
        Raises: NotFound; Unavailable: it does not end (a process may wait for a device forever).
        Source: moby 24.0, daemon/kill.go, daemon/delete.go.
        """
        await self.signal(container, signal.SIGKILL)
        try:
            async with asyncio.timeout(KILLED_S_MAX):
                return await self._store.wait(container.id, since=container)
        except TimeoutError as error:
            raise Unavailable("tried to kill container, but did not receive an exit event") from error

    async def end_restarting(self, container: Container) -> Container:
        """Record that the user stopped it, and wait until a start in progress has finished.  Raises: NotFound."""
        noted = self.note(container.id, life_events.UserStops())
        return noted if container.is_running else await self.await_start(container.id)

    async def await_start(self, id: ContainerId) -> Container:
        """Return the container once a start in progress has finished.  Raises: NotFound."""
        async with self.locks.operation(id):
            return self._store.require(id)

    @asynccontextmanager
    async def mount_root(self, id: ContainerId) -> AsyncIterator[RootFiles]:
        """Mount the root file system and the volumes for the block, even if the container does not run.

        Raises: NotFound; MountFailed; Unavailable: it cannot be mounted.
        """
        container, user = self._store.require(id), f"files of {id}: {secrets.token_hex(8)}"
        borrowed: list[RootFiles] = []

        def borrow() -> None:
            try:
                borrowed.append(self._bundles.borrow(self._store.require(id)))
            except OSError as error:
                raise Unavailable(f"cannot mount container {id}: {describe_error(error)}") from error

        async def give_back() -> None:
            if borrowed:
                await self._free(asyncio.to_thread(self._bundles.give_back, id), id)
            await self._free(self._volumes.unmount(user), id)

        async with afterwards(give_back):
            await self._volumes.mount(user, container.config.mounts)
            async with self.locks.operation(id):
                await thread_to_end(borrow)
            yield borrowed[0]

    async def sweep(self) -> Collection[ContainerId]:
        """Free network resources of containers that do not exist, have stopped or never ran.  Return the containers'
        ids.

        A failure for one container is logged, and the next sweep retries it.  Raises: OSError: network namespaces.
        """
        freed = []
        for id in await self._network.holders():
            if self.locks.is_held(id):
                continue  # its sandbox is being attached or freed now
            # A start waits for this lock. Without the lock, the sweep could free resources that the start has just
            # received.
            async with self.locks.operation(id), self.locks.networks(id):
                if not self._needs_network(id):
                    await self._free(self._network.free(id), id)
                    freed.append(id)
        await self._network.sweep()
        return freed

    def is_watched(self, id: ContainerId) -> bool:
        """Return whether this process watches a run of the container."""
        return id in self.watches

    def may_have(self, id: ContainerId) -> bool:
        """Return whether the container exists or, until all records are read, may exist."""
        return not self.adoption.has_found or self._store.lookup(id) is not None

    # --- running the table --------------------------------------------------------------------------------------

    async def run(self, id: ContainerId, event: LifeEvent) -> Container:
        """Apply ``event``, then carry out its effects.  Return the container.

        A cancellation interrupts only interruptible effects.  All other effects, and the cleanup after a failure,
        finish first.  Raises: NotFound; the refusal of a request; the first error of an effect.
        """
        async with AsyncExitStack() as held:
            program = Program(self._store.require(id), event, held)
            self._apply(program, event)
            while program.todo:
                if program.may_be_interrupted:
                    await self._advance(program)
                else:
                    await run_to_end(self._advance_uninterrupted(program))
            if program.error is not None:
                raise program.error
            return self._store.lookup(id) or program.last

    async def _advance_uninterrupted(self, program: Program) -> None:
        """Carry out effects until the next is interruptible."""
        while program.todo and not program.may_be_interrupted:
            await self._advance(program)

    async def _advance(self, program: Program) -> None:
        """Carry out the next effect and apply the event that it reports."""
        item = program.todo.popleft()
        container = self._store.lookup(program.id) or program.last
        try:
            event = await self.actions[item](container, program) if isinstance(item, Effect) else item
            if event is not None:
                self._apply(program, event)
        except BaseException as error:
            if item in BEST_EFFORT and isinstance(error, Exception):
                log_error(error, "resource not freed", container=program.id)
            else:
                self._fail(program, error)

    def _fail(self, program: Program, error: BaseException) -> None:
        """Continue with the event that follows a failure, instead of the remaining effects."""
        if program.error is None:
            program.error = error
        elif isinstance(error, Exception):
            log_error(error, "cleanup failed", container=program.id)
        program.todo.clear()
        if (kind := program.fails) is not None:
            program.fails = None
            self._apply(program, program.failure(kind, error))

    def _apply(self, program: Program, event: LifeEvent) -> None:
        """Apply the event: write the record, and put the effects of its rule in front of the others."""
        step = machine.step(self._store.require(program.id), event)
        program.event = event
        try:
            program.last = self._write(step)
        except OSError as error:
            if step.rule.saving is Saving.REPORTED:
                self._store.keep(step.container)
                program.last, program.error = step.container, error
            else:
                if program.fails is not None:  # its cleanup frees a resource that the record names
                    self._store.keep(step.container)
                raise
        if step.rule.effects:
            program.fails = step.rule.fails
        following = (*step.rule.effects, *(() if step.then is None else (step.then,)))
        program.todo.extendleft(reversed(following))

    def _write(self, step: LifeStep) -> Container:
        """Write the record of a step, unless nothing has changed.  Raises: OSError: a required write failed."""
        container = step.container
        match step.rule.saving:
            case Saving.FIRST | Saving.REPORTED:
                self._store.put(container)
            case Saving.IF_WRITTEN:
                with suppress(OSError):
                    self._store.put(container)
            case Saving.NOTED if container is not self._store.lookup(container.id):
                self._store.note(container)
        return self._store.require(container.id)

    # --- effects of the driver itself ---------------------------------------------------------------------------

    async def _await_networks(self, container: Container, _: Program) -> None:
        await self.adoption.await_networks(container)

    async def _await_release(self, container: Container, _: Program) -> None:
        if (watch := self.watches.get(container.id)) is not None:
            await asyncio.wait([watch])

    async def _take_start_slot(self, _: Container, program: Program) -> None:
        await program.held.enter_async_context(self.starting)

    async def _send_signal(self, container: Container, program: Program) -> None:
        assert isinstance(program.cause, life_events.Signal)
        number = program.cause.number
        if container.process is not None:
            self._runtime.signal(container.process, number)
        elif container.is_running:
            await self._watch(container, program)  # otherwise waiters would block forever
        self.events.publish("kill", container, signal=str(int(number)))

    async def _end_process(self, container: Container, _: Program) -> None:
        try:
            await self.kill(container)
        except Unavailable as error:
            text = f'cannot remove container "/{container.name}": could not kill: {error}'
            raise Unavailable(text) from error

    async def _forget_execs(self, container: Container, _: Program) -> None:
        self.execs.forget(container.id)

    async def _watch(self, container: Container, _: Program) -> None:
        id = container.id
        if not self._background.is_running:
            return  # this process is ending, and the next one watches it
        if id in self.watches:
            return  # a second watch would record the exit twice
        task = self.watches[id] = self.spawn(self._see_end(container), name=f"container-{id[:12]}")
        task.add_done_callback(lambda done: self._forget_watch(id, done))
        if container.health is not None:
            self.spawn(self.persist(lambda: self.health.run(id), id), name=f"health-{id[:12]}")

    def _forget_watch(self, id: ContainerId, done: asyncio.Task[None]) -> None:
        if self.watches.get(id) is done:  # it may have been started again meanwhile
            del self.watches[id]

    async def _see_end(self, container: Container) -> None:
        """Wait for the exit, free the networks and record the exit, then free the other resources."""
        id = container.id
        ended = await self.persist(lambda: self._runtime.wait(container), id)
        async with self.locks.networks(id):
            await self.run(id, life_events.RunEnded(at=self.effects.now(), **msgspec.structs.asdict(ended)))
        await self.run(id, life_events.ReleaseRun())

    # --- background work ----------------------------------------------------------------------------------------

    async def _free(self, work: Awaitable[None], id: ContainerId) -> None:
        """Free one resource.  A failure is logged, and a sweep or the next start finds the leftovers."""
        await isolate(work, "resource not freed", container=id)

    async def _keep_sweeping(self) -> None:
        while True:
            await tick(self._clock, SWEEP_SECONDS)
            await isolate(self.sweep(), "leftover network resources not removed yet")

    async def _unmount_unused(self) -> None:
        """Unmount volumes without a container.  Keep the volumes of runs whose adoption is still being retried."""
        await self.adoption.is_complete.wait()
        await retry(self._volumes.unmount_unused, "volumes not unmounted", clock=self._clock)

    async def _keep_unmounting(self) -> None:
        """Retry unmounts separately from other sweeps, which an unresponsive device or plug-in must not delay."""
        while True:
            await tick(self._clock, SWEEP_SECONDS)
            await retry(
                self._volumes.unmount_unfinished, "volumes not unmounted yet", clock=self._clock, first_s=1.0
            )

    def _needs_network(self, id: ContainerId) -> bool:
        """Return whether the container has a sandbox and needs it."""
        container = self._store.lookup(id)
        if container is None or container.sandbox is None:
            return False
        return container.is_running or not (container.was_started or container.is_retired)

    async def persist(self, work: Callable[[], Awaitable[Any]], id: ContainerId) -> Any:
        """Return the result of ``work`` on a container.  Retries errors and shows them as the container's error."""
        return await retry(
            work,
            "container operation failed",
            clock=self._clock,
            longest_s=_RETRY_SECONDS_MAX,
            on_error=lambda error: self.show(id, error),
            container=id,
        )

    def show(self, id: ContainerId, error: Exception) -> None:
        """Show an error as the container's."""
        if self._store.lookup(id) is not None:
            self._store.observe(id, error=describe_error(error))
