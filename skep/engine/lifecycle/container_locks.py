"""Locks that serialize the operations on one container."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from weakref import WeakValueDictionary

from skep.aio.race import run_unless
from skep.model.values.ids import ContainerId


class ContainerLocks:
    """All locks of containers.

    *operation* makes creation, start, pause, update, change of networks, retirement and removal exclude each other.
    Without it, a removal during the creation would leave behind the namespace that is being made.

    *networks* is held while the networks of a run change, or are freed after its exit.  The exit cannot take the lock
    *operation*, because a removal holds that lock while it waits for the exit.  Taken after *operation*.
    """

    def __init__(self) -> None:
        self.operation_locks = WeakValueDictionary[ContainerId, asyncio.Lock]()
        """Locks by container.  A lock exists while it is held or waited for."""
        self.network_locks = WeakValueDictionary[ContainerId, asyncio.Lock]()

    def is_held(self, id: ContainerId) -> bool:
        """Return whether an operation on the container is running, or its networks change."""
        locks = (self.operation_locks.get(id), self.network_locks.get(id))
        return any(lock is not None and lock.locked() for lock in locks)

    @asynccontextmanager
    async def operation(self, id: ContainerId) -> AsyncIterator[None]:
        """Hold the lock of the container's operations for the block."""
        async with self.operation_locks.setdefault(id, asyncio.Lock()):
            yield

    @asynccontextmanager
    async def networks(self, id: ContainerId) -> AsyncIterator[None]:
        """Hold the lock of the container's networks for the block."""
        async with self.network_locks.setdefault(id, asyncio.Lock()):
            yield


class ForcedRemovals:
    """Lets forced removals interrupt the mount of a start, which may take minutes.

    Start and removal each clean up only their own work, so neither removes a resource of the other.
    """

    def __init__(self) -> None:
        self._waiting = Counter[ContainerId]()
        self._mounting: dict[ContainerId, asyncio.Event] = {}
        """Set to interrupt the mount of a start, by container."""

    @contextmanager
    def removing(self, id: ContainerId) -> Iterator[None]:
        """Prevent mounts of the container for the block."""
        self._waiting[id] += 1
        if (mounting := self._mounting.get(id)) is not None:
            mounting.set()
        try:
            yield
        finally:
            self._waiting[id] -= 1
            if not self._waiting[id]:
                del self._waiting[id]

    async def mount(self, id: ContainerId, work: Coroutine[Any, Any, None]) -> None:
        """Do ``work``, the mount of a start that holds the container's lock.  Raises: Preempted: it was interrupted."""
        removed = self._mounting[id] = asyncio.Event()
        if self._waiting[id]:
            removed.set()
        try:
            await run_unless(work, removed.wait())
        finally:
            del self._mounting[id]
