"""Waiting before the next attempt: longer each time, never the same for two who failed together."""

import random
from collections.abc import Callable

from skep.aio.clock import Clock


class Backoff:
    """Delays that double from ``first_s`` to ``longest_s``, each spread over its upper half.

    ``chance`` gives numbers from 0 to 1; a simulation hands in its own.
    """

    def __init__(
        self, first_s: float = 0.05, longest_s: float = 5.0, *, chance: Callable[[], float] = random.random
    ) -> None:
        if not 0 < first_s <= longest_s:
            raise ValueError(f"want 0 < first_s <= longest_s, not {first_s}, {longest_s}")
        self._first_s = first_s
        self._longest_s = longest_s
        self._chance = chance
        self._next_s = first_s

    def next_delay_s(self) -> float:
        """Seconds to wait before the next attempt."""
        whole = self._next_s
        self._next_s = min(whole * 2, self._longest_s)
        return whole * (0.5 + 0.5 * self._chance())

    def reset(self) -> None:
        """It worked: begin with short delays again."""
        self._next_s = self._first_s

    async def sleep(self, clock: Clock) -> None:
        """Wait for the next delay."""
        await clock.sleep(self.next_delay_s())
