"""Long work in slices: everything else gets its turn in between."""

import asyncio

from skep.aio.clock import Clock

SLICE_S = 0.005
"""How long is worked before others get their turn: several such works at a time still leave a request quick."""


class Slices:
    """Of one piece of work that goes through many things.  Ask ``give_way`` after each of them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = clock.monotonic()

    async def give_way(self) -> None:
        """Let others run if the present slice is over."""
        if self._clock.monotonic() - self._began >= SLICE_S:
            await asyncio.sleep(0)
            self._began = self._clock.monotonic()
