"""The end of containers: what follows when one has ended, its removal, and the tasks that see to both.

Every task here is about one container, and no error of it reaches another one: it is tried again, logged, and shown as
the container's error.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import structlog

from skep.aio.guard import contain, explain, persist
from skep.engine.attachment import WaitingClients
from skep.engine.changing import ContainerChanger
from skep.engine.conmon import StartError
from skep.engine.container import Container, ContainerState, NotRunning
from skep.engine.execs import Execs
from skep.engine.health_checks import HealthChecks
from skep.engine.networking import Networking
from skep.errors import Unavailable
from skep.model.ids import ContainerId
from skep.model.times import timestamp

log = structlog.get_logger()

T = TypeVar("T")

_RETRY_SECONDS_MAX = 30.0
SWEEP_SECONDS = 20.0
"""Between two comparisons of what the network holds for containers with the containers there are."""


class ContainerSettler(ContainerChanger):
    """Waits for ends, and frees what ended containers and removed ones held."""

    def __init__(self, *, network: Networking, **parts: Any) -> None:
        """``parts``: of ``ContainerChanger``."""
        super().__init__(**parts)
        self._network = network
        self._waiting = WaitingClients()
        self._turns: dict[ContainerId, asyncio.Lock] = {}
        self._watches: dict[ContainerId, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._group: asyncio.TaskGroup | None = None
        self.execs = Execs(
            self._bundles, self._runtime, self.events, self._clock, container=self.get, spawn=self._spawn
        )
        self.health = HealthChecks(self._registry, self.execs, self.events, self._cgroups, self._clock)

    # --- ends ---------------------------------------------------------------------------------------------------

    def _watch(self, container: Container) -> None:
        id = container.id
        task = self._spawn(self._wait_and_settle(container), name=f"container-{id[:12]}")
        self._watches[id] = task
        task.add_done_callback(lambda done: self._forget_watch(id, done))
        if container.health is not None:
            self._spawn(self._persist(lambda: self.health.run(id), id), name=f"health-{id[:12]}")

    def _forget_watch(self, id: ContainerId, done: asyncio.Task[None]) -> None:
        if self._watches.get(id) is done:  # it may have been started again meanwhile
            del self._watches[id]

    async def _wait_settled(self, id: ContainerId) -> None:
        """Return when everything is freed that an ended container does not need."""
        watch = self._watches.get(id)
        if watch is not None:
            await asyncio.wait([watch])

    async def _wait_and_settle(self, container: Container) -> None:
        """Wait for its end, free what only a running container needs, then say that it ended."""
        id = container.id
        ended = await self._persist(lambda: self._runtime.wait(container), id)
        if container.sandbox is not None:
            await self._free(self._network.detach(id, container.sandbox), id)
        container = self._registry.observe(
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
        await self._free(self._runtime.clear(id), id)
        await self._free(asyncio.to_thread(self._bundles.release, id), id)

    async def _give_up(self, id: ContainerId, error: BaseException) -> None:
        """A start failed: nothing of it stays but the record, which says why."""
        container = self.get(id)
        await self._free(self._runtime.delete(id), id)
        if container.sandbox is not None:
            await self._free(self._network.detach(id, container.sandbox), id)
        await self._free(asyncio.to_thread(self._bundles.release, id), id)
        code = error.exit_code if isinstance(error, StartError) else 128
        self._waiting.fail(id, NotRunning(str(error)))
        self._registry.observe(
            id, process=None, monitor=None, sandbox=None, exit_code=code, error=explain(error)
        )

    async def _free(self, work: Awaitable[None], id: ContainerId) -> None:
        """Free one thing; a failure is logged and the next start of the node process finds the rest."""
        await contain(work, "not freed", container=id)

    # --- turns ----------------------------------------------------------------------------------------------------

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

    async def _keep_sweeping(self) -> None:
        while True:
            await self._clock.sleep(SWEEP_SECONDS)
            sweeping = self._network.sweep(self._needs_network)
            await contain(sweeping, "leftovers of networks not removed yet")

    def _needs_network(self, id: ContainerId) -> bool:
        """Whether it has a network, or somebody is just giving it one or taking it back."""
        turn, container = self._turns.get(id), self._registry.lookup(id)
        if turn is not None and turn.locked():
            return True
        if container is None or container.sandbox is None:
            return False
        return container.is_running or not container.was_started

    async def _retire(self, id: ContainerId) -> None:
        container = self.get(id)
        if container.state is not ContainerState.CREATED or container.plain is not None:
            return
        await self._free(self._runtime.delete(id), id)
        if container.sandbox is not None:
            await self._free(self._network.detach(id, container.sandbox), id)
        await self._free(asyncio.to_thread(self._bundles.release, id), id)
        self._registry.observe(id, process=None, monitor=None, sandbox=None, is_retired=True)

    # --- removal ------------------------------------------------------------------------------------------------

    async def _discard(self, id: ContainerId) -> None:
        """Free everything.  Raises: Unavailable: something is left; the container is known until that has gone."""
        container = self.get(id)
        self.execs.forget(id)
        if container.state in (ContainerState.CREATED, ContainerState.REMOVING):
            await self._free(self._runtime.delete(id), id)
            if container.sandbox is not None:
                await self._free(self._network.detach(id, container.sandbox), id)
        self._registry.observe(id, state=ContainerState.REMOVING)
        try:
            await self._bundles.discard(id)
        except OSError as error:
            self._registry.observe(id, error=explain(error))
            raise Unavailable(f"cannot remove container {id}: {explain(error)}") from error
        self._registry.forget(id)

    async def _remove_unknown(self, id: ContainerId) -> None:
        """End and remove a container whose record cannot be read: a task's is replaced, as if it had failed."""
        await self._runtime.delete(id)
        await self._bundles.discard(id)

    # --- tasks --------------------------------------------------------------------------------------------------

    async def _persist(self, work: Callable[[], Awaitable[Any]], id: ContainerId) -> Any:
        """What comes of ``work`` on a container in the end; until then its error says what keeps it."""
        return await persist(
            work,
            "container's work failed",
            clock=self._clock,
            longest_s=_RETRY_SECONDS_MAX,
            on_error=lambda error: self._show(id, error),
            container=id,
        )

    def _show(self, id: ContainerId, error: Exception) -> None:
        if self._registry.lookup(id) is not None:
            self._registry.observe(id, error=explain(error))

    def _spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Work of one container: an error ends that alone."""
        if self._group is None:
            work.close()
            raise RuntimeError("containers are used outside of running()")
        task = self._group.create_task(contain(work, "container's work ended", work=name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
