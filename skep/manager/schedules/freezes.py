"""Ends change freezes that are over, and opens and closes the maintenance window.  Leader only."""

from random import Random

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.services.freezes import bring_up_to_date, is_out_of_date
from skep.store.interface import LoopStore, NotLeader

log = structlog.get_logger(__name__)

CHECK_S = 1.0
"""Seconds between two checks, which only read one object.  A window opens and closes at whole minutes.

The wall clock may be set, so no check waits for a due time.
"""
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 10.0
"""Delays in seconds, with jitter, before the next attempt if the store did not accept a change."""


class ChangeFreezes:
    """Keeps the freezes and the window in the store up to date, so that no other loop needs their times."""

    def __init__(self, term: LoopStore, clock: Clock, random: Random) -> None:
        self._term = term
        self._clock = clock
        self._random = random

    async def run(self) -> None:
        """Keep them up to date until cancelled."""
        backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, rng=self._random.random)
        while True:
            wait_s, now_ns = CHECK_S, self._clock.now_ns()
            if is_out_of_date(self._term.view(), now_ns):
                try:
                    await self._term.update(bring_up_to_date, now_ns)
                    backoff.reset()
                except NotLeader:
                    raise
                except SkepError as error:
                    log.warning("end of a freeze not written, will retry", reason=str(error))
                    wait_s = backoff.next_delay_s()
            await self._clock.sleep(wait_s)
