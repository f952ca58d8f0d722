"""Reads the records of earlier node processes, and continues the lives of their containers."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import describe_error, isolate, retry
from skep.aio.race import is_set_within
from skep.engine.containers.container import Container
from skep.engine.containers.state import ContainerStore
from skep.engine.lifecycle.container_locks import ContainerLocks
from skep.engine.lifecycle.effects import Effects
from skep.engine.lifecycle.life_events import LifeEvent
from skep.engine.lifecycle.machine import AT_REST, State
from skep.engine.networks.networking import Networking, sandbox_config
from skep.engine.runtime.runtime import Runtime
from skep.errors import Unavailable
from skep.model.networks.sandbox import NetworkMode, Sandbox
from skep.model.values.ids import ContainerId

log = structlog.get_logger()

T = TypeVar("T")

_READ_TRIES_MAX = 5
"""Attempts to read a container's record, because the machine may be short of memory or descriptors for a moment."""
RESTORED_S_MAX = 60.0
"""Seconds that a start waits for the networks of this node.  Restoring takes longer only if a command hangs or is
retried, and then a condition of the node shows the reason.
"""


class AdoptedLives(Protocol):
    """The driver's interface for the adoption."""

    locks: ContainerLocks

    async def run(self, id: ContainerId, event: LifeEvent) -> Container:
        """Apply an event and carry out its effects."""

    def is_watched(self, id: ContainerId) -> bool:
        """Return whether this process watches a run of the container."""

    async def remove_locked(self, id: ContainerId, event: LifeEvent) -> None:
        """Remove a container, whose lock the caller holds."""

    async def persist(self, work: Callable[[], Awaitable[Any]], id: ContainerId) -> Any:
        """Return the result of ``work`` on a container.  Retries errors."""

    def spawn(self, work: Any, *, name: str) -> Any:
        """Start background work."""

    def show(self, id: ContainerId, error: Exception) -> None:
        """Show an error in the container's status."""


class Adoption:
    """Adopts the containers of earlier processes.

    Args:
        report: Called with the reason while containers cannot be adopted, and with "" once they are.
    """

    def __init__(
        self,
        lives: AdoptedLives,
        effects: Effects,
        runtime: Runtime,
        network: Networking,
        store: ContainerStore,
        report: Callable[[str], None],
    ) -> None:
        self._lives = lives
        self._effects = effects
        self._runtime = runtime
        self._bundles = runtime.bundles
        self._network = network
        self._store = store
        self._report = report
        self.has_found = False
        """Whether all records have been read."""
        self._awaited: set[ContainerId] = set()
        """Containers of earlier processes that are not adopted yet."""
        self._connected: frozenset[ContainerId] = frozenset()
        """Containers whose networks were restored."""
        self._has_networks = asyncio.Event()
        """Set once the networks of earlier processes are restored.  Restoring frees the networks of unknown containers.
        """
        self.is_complete = asyncio.Event()
        """Set once all containers are adopted, so their volumes have users."""

    async def restore(self, clock: Clock) -> None:
        """Read the records and adopt their containers.  Errors are retried."""
        load = partial(asyncio.to_thread, self._bundles.load)
        found = await self._persist(load, "records of containers not read", clock)
        backoff = Backoff(0.1, 2.0)
        for _ in range(_READ_TRIES_MAX):
            if not found.unreadable:
                break
            await backoff.sleep(clock)
            found = await self._persist(load, "records of containers not read", clock)
        for container in found.known:
            self._store.restore(container)
            self._awaited.add(container.id)
            if container.is_running:  # before a request for another container could unmount its volumes
                self._effects.hold_volumes(container)
        for id in found.unreadable:  # its addresses are unknown, and may be assigned to others now
            log.error("container ended: record not readable", container=id)
            await isolate(self._runtime.delete_unknown(id), "resource not freed", container=id)
            self._spawn(partial(self._read_again, id), id, "record")
        for id in found.unknown:
            log.warning("container without record removed", container=id)
            self._spawn(partial(self._discard_unknown, id), id, "remove")
        self.has_found = True
        live = [
            (sandbox_config(one), one.sandbox)
            for one in found.known
            if one.sandbox is not None and self._keeps(one, one.sandbox)
        ]
        await self._persist(partial(self._network.restore, live), "networks not restored", clock)
        self._connected = frozenset(config.id for config, _ in live)
        self._has_networks.set()
        for container in found.known:  # containers created meanwhile have nothing to adopt
            await isolate(
                self._adopt(container.id),
                "container not adopted",
                on_error=partial(self._adopt_later, container.id),
                container=container.id,
            )
        if not self._awaited:
            self.is_complete.set()

    def _settle(self, id: ContainerId) -> None:
        self._awaited.discard(id)
        if not self._awaited:
            self.is_complete.set()

    async def adopt_first(self, id: ContainerId) -> None:
        """Adopt a container that does not run, if it is not adopted yet.  The caller holds its lock.

        Called before a start, which would otherwise mistake an earlier process's leftovers for its own resources.
        Raises: Unavailable: its state cannot be read now; OSError.
        """
        container = self._store.lookup(id)
        if id in self._awaited and container is not None and container.state in AT_REST:
            await self._lives.run(id, await self._look(container))
            self._settle(id)

    async def await_networks(self, container: Container) -> None:
        """Wait until the networks of earlier processes are restored.  Raises: Unavailable: that takes too long."""
        if container.mode is NetworkMode.HOST:  # it has no namespace that restoring could free
            return
        if not await is_set_within(self._has_networks, RESTORED_S_MAX):
            raise Unavailable("the networks of this node's earlier containers are not restored yet")

    async def _look(self, container: Container) -> LifeEvent:
        await self.await_networks(container)
        has_network = container.id in self._connected or container.mode is NetworkMode.HOST
        return await self._effects.look(container, has_network=has_network)

    def _keeps(self, container: Container, sandbox: Sandbox) -> bool:
        """Return whether a container keeps its sandbox, because it runs or may still be started."""
        return (
            container.state is not State.REMOVING
            and self._network.is_present(sandbox)
            and (
                not (container.was_started or container.is_retired)
                or (container.process is not None and self._runtime.is_alive(container.process))
            )
        )

    async def _adopt(self, id: ContainerId) -> None:
        """Continue where the previous process stopped.

        Users may send requests already, so the record is read again, and a stopped container is locked.  A running
        container is not locked, because a forced removal holds the lock while it waits for the exit that the adoption
        watches.
        """
        container = self._store.lookup(id)
        if container is None or self._lives.is_watched(id):
            self._settle(id)  # removed, or started by this process
        elif container.state is State.REMOVING:
            event = await self._look(container)
            self._settle(id)
            self._spawn(partial(self._remove, id, event), id, "remove")
        elif container.is_running:
            await self._lives.run(id, await self._look(container))
            self._settle(id)
        elif self._lives.locks.is_held(id):  # a start, for example, whose volumes may take minutes
            self._spawn(partial(self._adopt_ended, id), id, "adopt")
        else:
            await self._adopt_ended(id)

    def _adopt_later(self, id: ContainerId, error: Exception) -> None:
        """Retry a failed adoption in the background, because nothing else watches the container."""
        self._lives.show(id, error)
        self._spawn(partial(self._adopt, id), id, "adopt")

    async def _adopt_ended(self, id: ContainerId) -> None:
        """Adopt a container that does not run, unless a user has started or removed it meanwhile."""
        async with self._lives.locks.operation(id):
            await self.adopt_first(id)
            self._settle(id)  # removed or started meanwhile

    async def _remove(self, id: ContainerId, event: LifeEvent) -> None:
        """Continue a removal.  Raises: Unavailable: the container was not removed completely."""
        async with self._lives.locks.operation(id):
            if self._store.lookup(id) is not None:  # a user may have removed it meanwhile
                await self._lives.remove_locked(id, event)

    async def _read_again(self, id: ContainerId) -> None:
        """Adopt a container whose record could not be read.  Raises: Unavailable: it still cannot be read."""
        container = await asyncio.to_thread(self._bundles.read, id)
        if container is None:
            await self._discard_unknown(id)
        else:
            if self._store.lookup(id) is None:  # else an earlier attempt has failed later
                self._store.restore(container)
            self._awaited.add(id)
            await self._adopt(id)

    async def _discard_unknown(self, id: ContainerId) -> None:
        """Kill and remove a container whose record cannot be decoded.  Its task is replaced as after a failure."""
        await self._runtime.delete_unknown(id)
        await self._bundles.discard(id)

    def _spawn(self, work: Callable[[], Awaitable[None]], id: ContainerId, verb: str) -> None:
        self._lives.spawn(self._lives.persist(work, id), name=f"{verb}-{id[:12]}")

    async def _persist(self, work: Callable[[], Awaitable[T]], event: str, clock: Clock) -> T:
        """Return the result of ``work``.  Retries errors and reports the reason meanwhile."""

        def show(error: Exception) -> None:
            self._report(f"earlier containers are not adopted yet: {describe_error(error)}")

        result = await retry(work, event, clock=clock, longest_s=10.0, on_error=show)
        self._report("")
        return result
