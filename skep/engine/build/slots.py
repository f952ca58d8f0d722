"""How many builds are at work on a node, and how many may wait for that.

A build takes its slot before anything of its client is unpacked: what waits costs a connection.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from skep.errors import ResourceExhausted


class BuildSlots:
    """``slots``: builds at work at one time; ``waiting_max``: builds that wait for them."""

    def __init__(self, slots: int, waiting_max: int) -> None:
        self._slots = slots
        self._free = asyncio.Semaphore(slots)
        self._waiting_max = waiting_max
        self.waiting = 0

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Hold a slot while the block runs; in the order of asking.  Raises: ResourceExhausted: too many wait."""
        if self._free.locked() and self.waiting >= self._waiting_max:
            raise ResourceExhausted(
                f"{self._slots} builds are at work on this node and {self.waiting} wait: try again later"
            )
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self._free.release()
