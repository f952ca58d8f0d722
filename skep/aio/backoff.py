"""Exponential backoff with jitter."""

import random
from collections.abc import Callable

from skep.aio.clock import Clock


class Backoff:
    """Delays that double from ``first_s`` to ``longest_s``, each with jitter in its upper half.

    ``rng`` returns numbers from 0 to 1.  The simulation passes its own.
    """

    def __init__(
        self, first_s: float = 0.05, longest_s: float = 5.0, *, rng: Callable[[], float] = random.random
    ) -> None:
        if not 0 < first_s <= longest_s:
            raise ValueError(f"expected 0 < first_s <= longest_s, not {first_s}, {longest_s}")
        self._first_s = first_s
        self._longest_s = longest_s
        self._rng = rng
        self._next_s = first_s

    def next_delay_s(self) -> float:
        """Return the seconds to wait before the next attempt."""
        whole = self._next_s
        self._next_s = min(whole * 2, self._longest_s)
        return whole * (0.5 + 0.5 * self._rng())

    def reset(self) -> None:
        """Start with short delays again, after a success."""
        self._next_s = self._first_s

    async def sleep(self, clock: Clock) -> None:
        """Wait for the next delay."""
        await clock.sleep(self.next_delay_s())
