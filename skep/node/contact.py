"""Whether this node has a manager, and for how long it has had none.

The agent tells, the worker asks: what a task may do alone depends on it.
"""

import asyncio

from skep.aio.clock import Clock


class Contact:
    """This node's contact with its managers, in the clock's monotonic time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heard = clock.monotonic()
        self._has_manager = False
        self._gained = asyncio.Event()
        self._lost = asyncio.Event()
        self._lost.set()

    @property
    def has_manager(self) -> bool:
        """Whether there is a session."""
        return self._has_manager

    def gained(self) -> None:
        """A manager gave a session."""
        self._has_manager = True
        self._heard = self._clock.monotonic()
        self._gained.set()
        self._lost.clear()

    def heard(self, asked_at: float) -> None:
        """The manager answered what it was asked at ``asked_at``: then, at least, it knew this node to be alive."""
        self._heard = max(self._heard, asked_at)

    def lost(self) -> None:
        """The session has ended."""
        self._has_manager = False
        self._gained.clear()
        self._lost.set()

    def silence_s(self) -> float:
        """Seconds since a manager is known to have heard this node."""
        return self._clock.monotonic() - self._heard

    async def wait_gained(self) -> None:
        """Return when there is a session."""
        await self._gained.wait()

    async def wait_lost(self) -> None:
        """Return when there is none."""
        await self._lost.wait()
