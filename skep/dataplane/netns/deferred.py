"""Changes without a waiting caller, done a moment later and several at once.

A container's end need not wait for the kernel to take away its ports and rules: a deletion there waits until no
processor looks at what is deleted any more, which takes tens of milliseconds.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable

from skep.aio.clock import Clock
from skep.aio.failures import isolate

PAUSE_SECONDS = 0.2

Settle = Callable[[], Awaitable[None]]


class DeferredChanges:
    """What is to be settled soon, each thing once."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._due: dict[Hashable, Settle] = {}
        self._wake = asyncio.Event()

    def soon(self, key: Hashable, settle: Settle) -> None:
        """Call ``settle`` in a moment; one with the same ``key`` that waits already is enough."""
        self._due[key] = settle
        self._wake.set()

    async def run(self) -> None:
        """Settle until cancelled.  What fails is left to the next comparison."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._clock.sleep(PAUSE_SECONDS)
            due, self._due = self._due, {}
            for settle in due.values():
                await isolate(settle(), "network not cleared yet")
