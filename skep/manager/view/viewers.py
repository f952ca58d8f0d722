"""Counts the viewers of the dashboard, and says when rows must be kept for them."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from skep.errors import Unavailable

LINGER_S: Final = 30.0
"""Seconds for which the rows are kept after the last viewer, so that reloading a page costs nothing."""
VIEWERS_MAX: Final = 32
"""Simultaneous viewers of one manager."""


class Viewers:
    """The viewers of one manager."""

    def __init__(self) -> None:
        self.count = 0
        self._came = asyncio.Event()
        self._left = asyncio.Event()

    @contextmanager
    def viewing(self) -> Iterator[None]:
        """Count a viewer for the block.  Raises: Unavailable: there are too many viewers."""
        if self.count >= VIEWERS_MAX:
            raise Unavailable(
                f"{VIEWERS_MAX} viewers already follow the cluster through this manager: close some of them"
            )
        self.count += 1
        self._came.set()
        try:
            yield
        finally:
            self.count -= 1
            self._left.set()

    def announce(self) -> None:
        """Act as if there was a viewer, because one is about to connect."""
        self._came.set()

    async def wait_came(self) -> None:
        """Return once there is a viewer, or one is announced."""
        await self._came.wait()

    async def wait_left(self) -> None:
        """Return once there has been no viewer for ``LINGER_S``."""
        while True:
            while self.count:
                self._left.clear()
                await self._left.wait()
            self._came.clear()
            try:
                async with asyncio.timeout(LINGER_S):
                    await self._came.wait()
            except TimeoutError:
                return
