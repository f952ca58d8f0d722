"""Makes changes for which no caller waits, a moment later and several at once.

For example, the end of a container does not wait until its ports and rules are removed.  In the kernel, a deletion
waits until no processor uses the deleted object, which takes tens of milliseconds.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable

from skep.aio.clock import Clock
from skep.aio.failures import isolate

PAUSE_SECONDS = 0.2
"""Seconds between changes, in which further changes are collected."""

Settle = Callable[[], Awaitable[None]]


class DeferredChanges:
    """Pending changes, at most one for each key."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._due: dict[Hashable, Settle] = {}
        self._wake = asyncio.Event()

    def soon(self, key: Hashable, settle: Settle) -> None:
        """Call ``settle`` in a moment, once for all calls with the same ``key`` until then."""
        self._due[key] = settle
        self._wake.set()

    async def run(self) -> None:
        """Make pending changes until cancelled.

        A failed change is not repeated here: the next comparison of the namespace repairs it.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._clock.sleep(PAUSE_SECONDS)
            due, self._due = self._due, {}
            for settle in due.values():
                await isolate(settle(), "network not cleared yet")
