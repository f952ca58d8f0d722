"""A limit on concurrent work, with a bounded queue."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from skep.errors import ResourceExhausted


class Slots:
    """Runs ``slots`` pieces of work at one time, while at most ``waiting_max`` wait."""

    def __init__(self, slots: int, waiting_max: int, busy: str) -> None:
        """``busy`` describes the running work in the error, for example ``builds are at work on this node``."""
        self._busy = busy
        self._slots = slots
        self._free = asyncio.Semaphore(slots)
        self._waiting_max = waiting_max
        self.waiting = 0
        self.held = 0

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Hold a slot during the block.  Waiting callers get slots in order.  Raises: ResourceExhausted: too many are
        waiting.
        """
        if self._free.locked() and self.waiting >= self._waiting_max:
            raise ResourceExhausted(f"{self._slots} {self._busy} and {self.waiting} wait: try again later")
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1
            self._free.release()
