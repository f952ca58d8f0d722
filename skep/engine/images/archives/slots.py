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
        self._free = slots
        self._patience_s = patience_s
        self._slow_left = slow_max
        self._working: Counter[str] = Counter()
        self._overdue: list[_Request] = []
        """Requests that will continue without a slot once ``slow_max`` allows it."""
        self._waiting: list[_Request] = []

    @asynccontextmanager
    async def of(self, image: str) -> AsyncIterator[None]:
        """Wait for a slot for ``image``, and hold it while the block runs."""
        request = _Request(image)
        self._waiting.append(request)
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
        while self._free and self._waiting:
            request = min(self._waiting, key=lambda one: self._working[one.image])
            self._waiting.remove(request)
            self._working[request.image] += 1
            self._free -= 1
            request.is_granted.set()

    def _is_slow(self, request: "_Request") -> None:
        self._overdue.append(request)
        self._release_overdue()

    def _release_overdue(self) -> None:
        while self._slow_left and self._overdue:
            request = self._overdue.pop(0)
            request.is_slow = True
            self._slow_left -= 1
            self._free += 1
        self._next()

    def _end(self, request: "_Request") -> None:
        if request in self._waiting:
            self._waiting.remove(request)
            return
        self._working[request.image] -= 1
        self._working += Counter()  # removes entries that are zero
        if request in self._overdue:
            self._overdue.remove(request)
        if request.is_slow:
            self._slow_left += 1
            self._release_overdue()
        else:
            self._free += 1


class _Request:
    """One layer's request for a slot."""

    def __init__(self, image: str) -> None:
        self.image = image
        self.is_granted = asyncio.Event()
        self.is_slow = False
