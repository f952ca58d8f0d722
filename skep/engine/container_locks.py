"""Locks that serialize the operations on one container."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from skep.aio.race import run_unless
from skep.model.ids import ContainerId

T = TypeVar("T")


class ContainerLocks:
    """Per-container locks for creation, start, pause, retirement and removal.

    Without them, a removal during the creation would leave behind the namespace that is being made.
    """

    def __init__(self) -> None:
        self._locks = WeakValueDictionary[ContainerId, asyncio.Lock]()
        """Locks by container.  Each exists while it is held or waited for."""

    def is_held(self, id: ContainerId) -> bool:
        """Return whether an operation on the container is running."""
        lock = self._locks.get(id)
        return lock is not None and lock.locked()

    async def run(self, id: ContainerId, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of ``work``, run under the container's lock."""
        try:
            async with self.acquire(id):
                return await work
        finally:
            work.close()  # never started if cancelled while it waited

    @asynccontextmanager
    async def acquire(self, id: ContainerId) -> AsyncIterator[None]:
        """Hold the container's lock for the block."""
        lock = self._locks.setdefault(id, asyncio.Lock())
        async with lock:
            yield


class ForcedRemovals:
    """Forced removals, which interrupt the mount of a start instead of waiting for it, since that may take minutes.

    Each side cleans up only its own work, so a cancelled or failed one takes nothing from another.
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
