"""Schedules the unpacking of layers fairly.

A free slot goes to the image with fewest slots, and no layer keeps a slot for long.

A layer may take half an hour, because of its size or by malice.  A layer that has held its slot for longer than
``patience_s`` continues without it, together with a few others.  So three such images cannot block all others.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class UnpackSlots:
    """Slots for unpacking.

    Args:
        slots: Number of workers.
        slow_max: Limit for slow layers that continue without a slot.
    """

    def __init__(self, slots: int, *, patience_s: float, slow_max: int) -> None:
        self.free = slots
        self._patience_s = patience_s
        self.slow_left = slow_max
        self.working: Counter[str] = Counter()
        self.overdue: list[_Request] = []
        """Requests that will continue without a slot once ``slow_max`` allows it."""
        self.waiting: list[_Request] = []

    @asynccontextmanager
    async def of(self, image: str) -> AsyncIterator[None]:
        """Wait for a slot for ``image``, and hold it while the block runs."""
        request = _Request(image)
        self.waiting.append(request)
        self._next()
        try:
            await request.is_granted.wait()
            timer = asyncio.get_running_loop().call_later(self._patience_s, self._is_slow, request)
            try:
                yield
            finally:
                timer.cancel()
        finally:
            self._end(request)
            self._next()

    def _next(self) -> None:
        """Grant free slots to the images with the fewest workers, and among these to the longest waiting request."""
        while self.free and self.waiting:
            request = min(self.waiting, key=lambda one: self.working[one.image])
            self.waiting.remove(request)
            self.working[request.image] += 1
            self.free -= 1
            request.is_granted.set()

    def _is_slow(self, request: "_Request") -> None:
        self.overdue.append(request)
        self._release_overdue()

    def _release_overdue(self) -> None:
        while self.slow_left and self.overdue:
            request = self.overdue.pop(0)
            request.is_slow = True
            self.slow_left -= 1
            self.free += 1
        self._next()

    def _end(self, request: "_Request") -> None:
        if request in self.waiting:
            self.waiting.remove(request)
            return
        self.working[request.image] -= 1
        self.working += Counter()  # removes entries that are zero
        if request in self.overdue:
            self.overdue.remove(request)
        if request.is_slow:
            self.slow_left += 1
            self._release_overdue()
        else:
            self.free += 1


class _Request:
    """One layer's request for a slot."""

    def __init__(self, image: str) -> None:
        self.image = image
        self.is_granted = asyncio.Event()
        self.is_slow = False
