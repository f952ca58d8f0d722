"""Whether this node has a manager, and for how long it has had none.

The agent tells, the worker asks: what a task may do alone depends on it.  A planned stop of the node process is
announced here; the session says so to its manager.
"""

import asyncio

import structlog

from skep.agent.last_heard import LastHeard
from skep.aio.clock import Clock
from skep.aio.first import Overtaken, unless

log = structlog.get_logger()

FAREWELL_SECONDS_MAX = 1.0


class Contact:
    """This node's contact with its managers, in the clock's monotonic time."""

    def __init__(self, clock: Clock, last_heard: LastHeard | None = None) -> None:
        """``last_heard``: what is known from earlier processes; None: this process is the first."""
        self._clock = clock
        self._last_heard = last_heard or LastHeard(clock.monotonic, clock.monotonic())
        self._heard = clock.monotonic()
        self._has_manager = False
        self._gained = asyncio.Event()
        self._lost = asyncio.Event()
        self._lost.set()
        self._departing = asyncio.Event()
        self._departed = asyncio.Event()

    @property
    def has_manager(self) -> bool:
        """Whether there is a session."""
        return self._has_manager

    def gained(self) -> None:
        """A manager gave a session."""
        self._has_manager = True
        self._heard = self._clock.monotonic()
        self._last_heard.note(0.0)
        self._gained.set()
        self._lost.clear()

    def heard(self, asked_at: float) -> None:
        """The manager answered what it was asked at ``asked_at``: then, at least, it knew this node to be alive."""
        self._heard = max(self._heard, asked_at)
        self._last_heard.note(self._clock.monotonic() - self._heard)

    def lost(self) -> None:
        """The session has ended."""
        self._has_manager = False
        self._gained.clear()
        self._lost.set()

    def silence_s(self) -> float:
        """Seconds since a manager is known to have heard this node, or since this process began to look for one."""
        return self._clock.monotonic() - self._heard

    def unheard_s(self) -> float:
        """Seconds since a manager is known to have heard this node, whichever process spoke for it."""
        return self._last_heard.silence_s()

    async def wait_gained(self) -> None:
        """Return when there is a session."""
        await self._gained.wait()

    async def wait_lost(self) -> None:
        """Return when there is none."""
        await self._lost.wait()

    # --- a planned stop ---------------------------------------------------------------------------------------

    async def say_farewell(self) -> None:
        """Have the manager know that this process stops and means to be back: it waits longer before tasks move.

        Returns when it knows, or at once where there is no session, or after a second.
        """
        if not self._has_manager:
            return
        self._departing.set()
        try:
            await unless(self._departed.wait(), self._clock.sleep(FAREWELL_SECONDS_MAX))
        except Overtaken:
            log.warning("no manager heard that this process stops as planned")

    @property
    def is_departing(self) -> bool:
        return self._departing.is_set()

    async def wait_departing(self) -> None:
        """Return when this process is about to stop as planned."""
        await self._departing.wait()

    def departed(self) -> None:
        """A manager knows of it."""
        self._departed.set()
