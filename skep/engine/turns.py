"""Operations on one container run one after the other."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from skep.aio.race import run_unless
from skep.model.ids import ContainerId

T = TypeVar("T")


class Turns:
    """Creation, start, pause, retirement and removal of one container do not overtake each other.

    A removal that overtook the creation would leave the namespace that is being made behind.
    """

    def __init__(self) -> None:
        self._locks = WeakValueDictionary[ContainerId, asyncio.Lock]()
        """Each as long as an operation has it or waits for it."""

    def is_taken(self, id: ContainerId) -> bool:
        """Whether an operation on the container is under way."""
        lock = self._locks.get(id)
        return lock is not None and lock.locked()

    async def exclusively(self, id: ContainerId, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, in its turn."""
        try:
            async with self.turn(id):
                return await work
        finally:
            work.close()  # of one that was cancelled before its turn

    @asynccontextmanager
    async def turn(self, id: ContainerId) -> AsyncIterator[None]:
        """Wait for the container's operations before this one; those after it wait until the block ends."""
        lock = self._locks.setdefault(id, asyncio.Lock())
        async with lock:
            yield


class ForcedRemovals:
    """Removals by force, which cut off the mount of a start instead of waiting for it: it may take minutes.

    Each side ends what it has begun itself, so that one that is given up or fails takes nothing from another one.
    """

    def __init__(self) -> None:
        self._waiting = Counter[ContainerId]()
        self._mounting: dict[ContainerId, asyncio.Event] = {}
        """Set: the mount is cut off."""

    @contextmanager
    def removing(self, id: ContainerId) -> Iterator[None]:
        """As long as the block waits or works, no mount of the container goes on."""
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
        """Do ``work``, the mount of a start in its turn.  Raises: Preempted: it was cut off."""
        removed = self._mounting[id] = asyncio.Event()
        if self._waiting[id]:
            removed.set()
        try:
            await run_unless(work, removed.wait())
        finally:
            del self._mounting[id]
