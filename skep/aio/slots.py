"""A limit on concurrent work, with a bounded queue."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final
from weakref import WeakValueDictionary

from skep.errors import ResourceExhausted

OWN_MAX: Final = 3
"""Largest number of requests of one owner: one at work, and one more in each of two windows of the dashboard."""


class Slots:
    """Runs ``slots`` pieces of work at one time, while at most ``waiting_max`` wait."""

    def __init__(self, slots: int, waiting_max: int, busy: str) -> None:
        """``busy`` describes the running work in the error, for example ``builds are at work on this node``."""
        self._busy = busy
        self._slots = slots
        self._free = asyncio.Semaphore(slots)
        self._waiting_max = waiting_max
        self._of_owners = Counter[str]()
        """Numbers of requests by owner."""
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
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

    @asynccontextmanager
    async def hold_share(self, owner: str) -> AsyncIterator[None]:
        """Hold a slot for ``owner``, who has at most one slot or waiting place, so that others get theirs.

        Raises: ResourceExhausted: too many are waiting, in all or of this owner.
        """
        if self._of_owners[owner] >= OWN_MAX:
            raise ResourceExhausted(f"{OWN_MAX} of your requests wait: try again when they have ended")
        self._of_owners[owner] += 1
        try:
            async with self._turns.setdefault(owner, asyncio.Semaphore(1)), self.hold():
                yield
        finally:
            self._of_owners -= Counter((owner,))
