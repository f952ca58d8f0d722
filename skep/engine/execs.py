"""Execs: further processes in running containers (``docker exec``).

Each has a conmon, so its exit code and its terminal do not depend on this process; what is known of an exec
is kept in memory only, as in Docker, until its container is removed or this process ends.
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
from skep.engine.attachment import Attachment
from skep.engine.bundle import Bundles
from skep.engine.conmon import StartError, resize_terminal
from skep.engine.container import Container, ContainerState, Exec, ExecConfig, NotRunning, ProcessName
from skep.engine.events import Events
from skep.engine.runtime import Runtime, StartedExec
from skep.errors import AlreadyExists, NotFound, ResourceExhausted, SkepError, Unavailable
from skep.model.ids import ContainerId

log = structlog.get_logger()

STARTS_MAX = 8
"""Execs of all containers that are started at the same moment: each takes a conmon, a runc and a runc init."""
STARTS_MAX_PER_CONTAINER = 2
"""Of them: in a container whose processor time is used up a start takes seconds."""
SLOW_S = 5.0
"""A start that takes longer waits for its container's processor time, most of the time, and uses none of the node's."""
SLOW_MAX = 16
"""Starts that take longer and leave their places to others; further ones keep theirs, as the whole node may be slow."""
KILLED_S = 10.0
"""How long a killed process may take to end: its conmon has to see it."""
_NOT_STARTED = 126
EXECS_MAX = 1000
"""Per container, ended ones included; the oldest ended ones are forgotten first."""


class AlreadyStarted(AlreadyExists):
    """An exec is started once.  The Engine API responds with 409, as where a name is taken."""


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
        """``container`` finds a container by id or name; ``spawn`` starts a supervised task."""
        self._bundles = bundles
        self._runtime = runtime
        self._events = events
        self._clock = clock
        self._container = container
        self._spawn = spawn
        self._execs: dict[str, Exec] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._starting = asyncio.Semaphore(STARTS_MAX)
        self._slow = 0
        """Starts that have left their places to others."""
        self._own: WeakValueDictionary[ContainerId, asyncio.Semaphore] = WeakValueDictionary()
        """Of each container, as long as an exec of it starts or waits for that."""

    def create(self, word: str, config: ExecConfig, console_size: tuple[int, int] | None = None) -> str:
        """A new exec, not started yet; gives its id (64 hexadecimal characters).

        ``console_size``: rows and columns of its terminal from its start on.

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
        """Raises: NotFound: ``No such exec instance: <id>``."""
        try:
            return self._execs[exec_id]
        except KeyError:
            raise NotFound(f"No such exec instance: {exec_id}") from None

    def has(self, exec_id: str) -> bool:
        """Whether there is such an exec."""
        return exec_id in self._execs

    def of(self, container_id: ContainerId) -> tuple[Exec, ...]:
        """The execs of a container that run (``ExecIDs`` of inspect)."""
        return tuple(one for one in self._execs.values() if one.container_id == container_id and one.running)

    async def start(self, exec_id: str, on_turn: Callable[[], None] = lambda: None) -> Attachment:
        """Start it; gives its standard streams, which the caller closes (at once, to detach).

        ``on_turn`` is called when it has waited for others and begins.  If the caller is cancelled then, the process
        is killed as soon as there is one; until it is gone, the exec is one that runs.
        Raises: NotFound, also when its container is removed meanwhile; NotRunning: its container has ended;
        AlreadyStarted: it was started before;
        StartError: the runtime refused (the exit code stays in the exec).
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
                await held.enter_async_context(self._turn(container.id))
            except BaseException:  # cancelled while it waited
                self._finish(exec_id, _NOT_STARTED)
                raise
            on_turn()
            outcome: asyncio.Future[Attachment] = asyncio.get_running_loop().create_future()
            # A task of its own: a conmon that is cut off while it starts a process leaves that behind.
            work = self._run(exec_id, outcome, held.pop_all())
            self._spawn(work, name=f"exec-{exec_id[:12]}")
        try:
            return await outcome
        except asyncio.CancelledError:
            if outcome.done() and not outcome.cancelled() and outcome.exception() is None:
                outcome.result().close()  # it had started at the same moment
                self.kill(exec_id)
            raise

    def publish_detach(self, exec_id: str) -> None:
        """Publish that a client has detached from an exec by its keys; nothing if the exec is gone."""
        with suppress(NotFound):
            exec = self.get(exec_id)
            self._events.publish("exec_detach", self._container(exec.container_id), execID=exec_id)

    def kill(self, exec_id: str) -> None:
        """Kill its process, if it has one.  A failure is logged."""
        exec = self._execs.get(exec_id)
        if exec is None or not exec.pid:
            return
        try:
            self._runtime.kill_exec(self._container(exec.container_id), exec.pid)
        except (OSError, SkepError) as error:
            log_error(error, "exec not killed", exec=exec_id)

    def resize(self, exec_id: str, height: int, width: int) -> None:
        """Size of its terminal, in characters; kept for one that is about to start.

        Raises: NotFound; NotRunning.
        """
        exec = self.get(exec_id)
        if not exec.running:
            raise NotRunning(f"Exec {exec_id} is not running")
        self._execs[exec_id] = msgspec.structs.replace(exec, console_size=(height, width))
        resize_terminal(exec.monitor, height, width)

    async def wait(self, exec_id: str) -> Exec:
        """Return the exec once it has ended; its exit code is set then.  Raises: NotFound."""
        await self._ended[self.get(exec_id).id].wait()
        return self.get(exec_id)

    def drop(self, exec_id: str) -> None:
        """Forget one exec, if it has ended or was never started; a running one is forgotten with its container."""
        exec = self._execs.get(exec_id)
        if exec is not None and not exec.running:
            del self._execs[exec_id], self._ended[exec_id]

    def forget(self, container_id: ContainerId) -> None:
        """Drop the execs of a container that is being removed."""
        for exec_id in [one.id for one in self._execs.values() if one.container_id == container_id]:
            self._finish(exec_id, 137)
            del self._execs[exec_id], self._ended[exec_id]

    @asynccontextmanager
    async def _turn(self, id: ContainerId) -> AsyncIterator[None]:
        """One of the few starts of a container, then of the node: slow containers leave places for the others."""
        own = self._own.setdefault(id, asyncio.Semaphore(STARTS_MAX_PER_CONTAINER))
        is_slow = False

        def leave_place() -> None:
            nonlocal is_slow
            if self._slow < SLOW_MAX:
                is_slow = True
                self._slow += 1
                self._starting.release()

        async with own:
            await self._starting.acquire()
            timer = asyncio.get_running_loop().call_later(SLOW_S, leave_place)
            try:
                yield
            finally:
                timer.cancel()
                if is_slow:
                    self._slow -= 1
                else:
                    self._starting.release()

    async def _run(self, exec_id: str, outcome: asyncio.Future[Attachment], turn: AsyncExitStack) -> None:
        """Start an exec whose turn it is, and give its streams to its caller; without a caller, end it."""
        try:
            async with turn:
                started = await self._begin(exec_id)
                if not outcome.done():
                    outcome.set_result(started.attachment)
                    return
                started.attachment.close()
                self.kill(exec_id)
                # Its place is free when it is gone.  What the kernel does not let die keeps no other from starting.
                with suppress(TimeoutError, NotFound):
                    async with asyncio.timeout(KILLED_S):
                        await self.wait(exec_id)
        except Exception as error:
            if not outcome.done():
                outcome.set_exception(error)
            elif not isinstance(error, SkepError | OSError):
                raise
        finally:
            outcome.cancel()  # this process ends

    async def _begin(self, exec_id: str) -> StartedExec:
        exec = self.get(exec_id)
        try:
            container = self._running_container(exec.container_id)  # it may have waited for long
            path = await asyncio.to_thread(self._bundles.prepare_exec, container, exec_id, exec.config)
            started = await self._runtime.exec(
                container, exec_id, path, terminal=exec.config.tty, stdin=exec.config.attach_stdin
            )
        except BaseException as error:
            # Health checks fail again and again; the container's other files stay for as long as it does.
            failed = self._bundles.exec_path(exec.container_id, exec_id)
            if isinstance(error, Unavailable):
                # A conmon that does not respond is there, and uses the directory.
                await self._runtime.end_exec(container, failed)
            self._finish(exec_id, error.exit_code if isinstance(error, StartError) else _NOT_STARTED)
            with suppress(RuntimeError):  # this process ends: it goes with the container
                self._spawn(discard_tree(failed), name=f"failed exec {exec_id[:12]}")
            raise
        try:
            exec = msgspec.structs.replace(self.get(exec_id), pid=started.pid, monitor=started.monitor)
            self._execs[exec_id] = exec
        except NotFound:  # forgotten with its container, whose end was the process's too
            started.attachment.close()
            raise
        self._spawn(self._watch(container, exec_id, path, started.monitor), name=f"exec-{exec_id[:12]}")
        if exec.console_size is not None:  # asked for while it started
            resize_terminal(exec.monitor, *exec.console_size)
        return started

    async def _watch(
        self, container: Container, exec_id: str, path: Path, monitor: ProcessName | None
    ) -> None:
        code = await retry(
            lambda: self._runtime.wait_exec(container, path, monitor),
            "end of exec not seen",
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
        container = self._container(word)
        if container.state is ContainerState.PAUSED:
            raise NotRunning(f"Container {word} is paused, unpause the container before exec")
        container.require_running()
        return container

    def _make_room(self, container_id: ContainerId) -> None:
        execs = [one for one in self._execs.values() if one.container_id == container_id]
        if len(execs) < EXECS_MAX:
            return
        ended = next((one for one in execs if not one.running), None)
        if ended is None:
            raise ResourceExhausted(f"container {container_id} has {EXECS_MAX} execs already")
        del self._execs[ended.id], self._ended[ended.id]

    def _publish(self, action: str, container: Container, exec: Exec) -> None:
        path, *arguments = exec.config.command
        self._events.publish(f"{action}: {path} {' '.join(arguments)}", container, execID=exec.id)
