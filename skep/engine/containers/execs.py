"""Execs: additional processes in running containers (``docker exec``).

Each exec has a conmon, so its exit code and terminal do not depend on this process.  As in Docker, the state of execs
is only in memory, until their container is removed or this process ends.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from weakref import WeakValueDictionary

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.aio.failures import log_error, retry
from skep.aio.trees import discard_tree
from skep.engine.containers.attachment import Attachment
from skep.engine.containers.container import Container, Exec, ExecConfig, NotRunning, ProcessName
from skep.engine.events import Events
from skep.engine.lifecycle import life_events, machine
from skep.engine.runtime.bundle import Bundles
from skep.engine.runtime.conmon import StartError, resize_terminal
from skep.engine.runtime.runtime import Runtime, StartedExec
from skep.errors import AlreadyExists, NotFound, ResourceExhausted, SkepError, Unavailable
from skep.model.values.ids import ContainerId

log = structlog.get_logger()

STARTS_MAX = 8
"""Limit for concurrent exec starts on the node.  Each needs a conmon, a runc and a runc init."""
STARTS_MAX_PER_CONTAINER = 2
"""Limit for concurrent exec starts in one container.

If the container has used up its processor time, each start takes seconds.
"""
SLOW_S = 5.0
"""Seconds after which a start counts as slow.

Such a start usually waits for processor time of its container, and does not load the node.
"""
SLOW_MAX = 16
"""Limit for slow starts that release their slot for other starts.

Further slow starts keep their slots, because then the whole node may be slow.
"""
KILLED_S = 10.0
"""Seconds to wait until conmon has noticed the end of a killed process."""
_NOT_STARTED = 126
"""Exit code of an exec that could not be started."""
EXECS_MAX = 1000
"""Limit for the execs of a container, including ended ones.  The oldest ended exec is forgotten first."""


class AlreadyStarted(AlreadyExists):
    """The exec was started before.  The Engine API responds with 409, as for a taken name."""


class Execs:
    """All execs of this node, by id."""

    def __init__(
        self,
        bundles: Bundles,
        runtime: Runtime,
        events: Events,
        clock: Clock,
        *,
        container: Callable[[str], Container],
        spawn: Callable[..., asyncio.Task[None]],
    ) -> None:
        """``container`` finds a container by id or name.  ``spawn`` starts a supervised task."""
        self._bundles = bundles
        self._runtime = runtime
        self._events = events
        self._clock = clock
        self._container = container
        self._spawn = spawn
        self._execs: dict[str, Exec] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self.starting = asyncio.Semaphore(STARTS_MAX)
        self._slow = 0
        """Number of slow starts that have given their slot to others."""
        self.own_events: WeakValueDictionary[ContainerId, asyncio.Semaphore] = WeakValueDictionary()
        """Start slots of each container in which an exec starts or waits to start."""

    def create(self, word: str, config: ExecConfig, console_size: tuple[int, int] | None = None) -> str:
        """Create an exec without starting it.  Return its id (64 hexadecimal characters).

        ``console_size`` has the terminal's initial rows and columns.

        Raises: NotFound: no such container; NotRunning; ResourceExhausted.
        """
        container = self._running_container(word)
        self._make_room(container.id)
        self._runtime.expect_exec()
        exec_id = secrets.token_hex(32)
        self._execs[exec_id] = Exec(
            id=exec_id, container_id=container.id, config=config, console_size=console_size
        )
        self._ended[exec_id] = asyncio.Event()
        self._publish("exec_create", container, self._execs[exec_id])
        return exec_id

    def get(self, exec_id: str) -> Exec:
        """Return an exec.  Raises: NotFound: ``No such exec instance: <id>``."""
        try:
            return self._execs[exec_id]
        except KeyError:
            raise NotFound(f"No such exec instance: {exec_id}") from None

    def has(self, exec_id: str) -> bool:
        """Return whether the exec exists."""
        return exec_id in self._execs

    def of(self, container_id: ContainerId) -> tuple[Exec, ...]:
        """Return a container's running execs (``ExecIDs`` of inspect)."""
        return tuple(one for one in self._execs.values() if one.container_id == container_id and one.running)

    async def start(self, exec_id: str, on_begin: Callable[[], None] = lambda: None) -> Attachment:
        """Start an exec.  Return its standard streams, which the caller must close.  To detach, it closes them at once.

        ``on_begin`` is called after the wait for other starts.  If the caller is cancelled after that, the process is
        killed as soon as it exists, and the exec counts as running until then.  Raises: NotFound, also if its container
        is removed meanwhile; NotRunning: its container has ended; AlreadyStarted; StartError: the runtime refused, and
        the exec has the exit code.
        """
        exec = self.get(exec_id)
        if exec.exit_code is not None:
            raise AlreadyStarted(f"Error: Exec command {exec_id} has already run")
        if exec.running:
            raise AlreadyStarted(f"Error: Exec command {exec_id} is already running")
        container = self._running_container(exec.container_id)
        self._execs[exec_id] = msgspec.structs.replace(exec, running=True)
        self._publish("exec_start", container, exec)
        async with AsyncExitStack() as held:
            try:
                await held.enter_async_context(self._hold_start_slot(container.id))
            except BaseException:  # cancelled while waiting for a slot
                self._finish(exec_id, _NOT_STARTED)
                raise
            on_begin()
            outcome: asyncio.Future[Attachment] = asyncio.get_running_loop().create_future()
            # In a separate task, because conmon must not be cancelled while it starts a process, which would be left
            # behind.
            work = self._run(exec_id, outcome, held.pop_all())
            self._spawn(work, name=f"exec-{exec_id[:12]}")
        try:
            return await outcome
        except asyncio.CancelledError:
            if outcome.done() and not outcome.cancelled() and outcome.exception() is None:
                outcome.result().close()  # the exec has started at the same moment
                self.kill(exec_id)
            raise

    def publish_detach(self, exec_id: str) -> None:
        """Publish that a client has detached from an exec by its keys.  Does nothing if the exec no longer exists."""
        with suppress(NotFound):
            exec = self.get(exec_id)
            self._events.publish("exec_detach", self._container(exec.container_id), execID=exec_id)

    def kill(self, exec_id: str) -> None:
        """Kill the exec's process, if any.  A failure is logged."""
        exec = self._execs.get(exec_id)
        if exec is None or not exec.pid:
            return
        try:
            self._runtime.kill_exec(self._container(exec.container_id), exec.pid)
        except (OSError, SkepError) as error:
            log_error(error, "exec not killed", exec=exec_id)

    def resize(self, exec_id: str, height: int, width: int) -> None:
        """Set the terminal's size, in characters.  A starting exec gets it once it has started.

        Raises: NotFound; NotRunning.
        """
        exec = self.get(exec_id)
        if not exec.running:
            raise NotRunning(f"Exec {exec_id} is not running")
        self._execs[exec_id] = msgspec.structs.replace(exec, console_size=(height, width))
        resize_terminal(exec.monitor, height, width)

    async def wait(self, exec_id: str) -> Exec:
        """Return the exec once it has ended and has an exit code.  Raises: NotFound."""
        await self._ended[self.get(exec_id).id].wait()
        return self.get(exec_id)

    def drop(self, exec_id: str) -> None:
        """Forget an exec that has ended or was never started.  A running exec is forgotten with its container."""
        exec = self._execs.get(exec_id)
        if exec is not None and not exec.running:
            del self._execs[exec_id], self._ended[exec_id]

    def forget(self, container_id: ContainerId) -> None:
        """Drop the execs of a container that is being removed."""
        for exec_id in [one.id for one in self._execs.values() if one.container_id == container_id]:
            self._finish(exec_id, 137)
            del self._execs[exec_id], self._ended[exec_id]

    @asynccontextmanager
    async def _hold_start_slot(self, id: ContainerId) -> AsyncIterator[None]:
        """Hold a start slot of the container and one of the node.

        If the start is slow, the node's slot is given to others.
        """
        own = self.own_events.setdefault(id, asyncio.Semaphore(STARTS_MAX_PER_CONTAINER))
        is_slow = False

        def leave_place() -> None:
            nonlocal is_slow
            if self._slow < SLOW_MAX:
                is_slow = True
                self._slow += 1
                self.starting.release()

        async with own:
            await self.starting.acquire()
            timer = asyncio.get_running_loop().call_later(SLOW_S, leave_place)
            try:
                yield
            finally:
                timer.cancel()
                if is_slow:
                    self._slow -= 1
                else:
                    self.starting.release()

    async def _run(self, exec_id: str, outcome: asyncio.Future[Attachment], slot: AsyncExitStack) -> None:
        """Start an exec and pass its streams to its caller, or end it if the caller was cancelled."""
        try:
            async with slot:
                started = await self._begin(exec_id)
                if not outcome.done():
                    outcome.set_result(started.attachment)
                    return
                started.attachment.close()
                self.kill(exec_id)
                # Keep the slot until the process has ended, but not forever, because the process may hang in the
                # kernel.
                with suppress(TimeoutError, NotFound):
                    async with asyncio.timeout(KILLED_S):
                        await self.wait(exec_id)
        except Exception as error:
            if not outcome.done():
                outcome.set_exception(error)
            elif not isinstance(error, SkepError | OSError):
                raise
        finally:
            outcome.cancel()  # this process is ending

    async def _begin(self, exec_id: str) -> StartedExec:
        exec = self.get(exec_id)
        try:
            container = self._running_container(
                exec.container_id
            )  # again, because it may have waited for long
            path = await asyncio.to_thread(self._bundles.prepare_exec, container, exec_id, exec.config)
            started = await self._runtime.exec(
                container, exec_id, path, terminal=exec.config.tty, stdin=exec.config.attach_stdin
            )
        except BaseException as error:
            # Remove the exec's files now and not with the container, because health checks may fail again and again.
            failed = self._bundles.exec_path(exec.container_id, exec_id)
            if isinstance(error, Unavailable):
                # The unresponsive conmon still runs and uses the directory.
                await self._runtime.end_exec(container, failed)
            self._finish(exec_id, error.exit_code if isinstance(error, StartError) else _NOT_STARTED)
            with suppress(RuntimeError):  # this process ends, so the container's removal includes the files
                self._spawn(discard_tree(failed), name=f"failed exec {exec_id[:12]}")
            raise
        try:
            exec = msgspec.structs.replace(self.get(exec_id), pid=started.pid, monitor=started.monitor)
            self._execs[exec_id] = exec
        except NotFound:  # forgotten with its container, whose end also ended the process
            started.attachment.close()
            raise
        self._spawn(self._watch(container, exec_id, path, started.monitor), name=f"exec-{exec_id[:12]}")
        if exec.console_size is not None:  # requested while the exec started
            resize_terminal(exec.monitor, *exec.console_size)
        return started

    async def _watch(
        self, container: Container, exec_id: str, path: Path, monitor: ProcessName | None
    ) -> None:
        code = await retry(
            lambda: self._runtime.wait_exec(container, path, monitor),
            "exec exit not observed",
            clock=self._clock,
            longest_s=5.0,
            exec=exec_id,
        )
        self._finish(exec_id, code)
        await discard_tree(path)

    def _finish(self, exec_id: str, exit_code: int) -> None:
        exec = self._execs.get(exec_id)
        if exec is None or exec.exit_code is not None:
            return
        self._execs[exec_id] = exec = msgspec.structs.replace(exec, running=False, pid=0, exit_code=exit_code)
        self._ended[exec_id].set()
        try:
            container = self._container(exec.container_id)
        except NotFound:
            return
        self._events.publish("exec_die", container, execID=exec_id, exitCode=str(exit_code))

    def _running_container(self, word: str) -> Container:
        """Return the container of an exec.  Raises: NotFound; NotRunning."""
        return machine.step(self._container(word), life_events.Exec(word)).container

    def _make_room(self, container_id: ContainerId) -> None:
        execs = [one for one in self._execs.values() if one.container_id == container_id]
        if len(execs) < EXECS_MAX:
            return
        ended = next((one for one in execs if not one.running), None)
        if ended is None:
            raise ResourceExhausted(f"container {container_id} already has {EXECS_MAX} running execs")
        del self._execs[ended.id], self._ended[ended.id]

    def _publish(self, action: str, container: Container, exec: Exec) -> None:
        path, *arguments = exec.config.command
        self._events.publish(f"{action}: {path} {' '.join(arguments)}", container, execID=exec.id)
