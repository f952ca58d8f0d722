"""Creates the gossip keys and rotates them every twelve hours.  Runs on the leader only."""

from collections.abc import Callable
from random import Random

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.gossip.keys import first_keys, rotated, seconds_to_rotation
from skep.model.networks.gossip import decoded_keys
from skep.model.values.ids import IdSource
from skep.model.values.times import Timestamp, timestamp
from skep.store.interface import LoopStore, NotLeader, Transaction
from skep.store.kinds import GOSSIP_KEYS_ID, Payload

log = structlog.get_logger(__name__)

FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
"""Delays in seconds, with jitter, before the next attempt if the store did not accept the keys."""


class GossipKeyRotation:
    """Rotates the cluster's gossip keys in the store.  Dispatchers send them to the nodes."""

    def __init__(self, term: LoopStore, clock: Clock, new_id: IdSource, random: Random) -> None:
        """``random`` is the source of the keys, so in production it must be the system's."""
        self._term = term
        self._clock = clock
        self._random = random

    async def run(self) -> None:
        """Create missing keys and rotate them, until cancelled.

        This leader's monotonic clock measures the waits.  Only the length of the first wait depends on another leader's
        timestamp.
        """
        backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, rng=self._random.random)
        while True:
            try:
                now = timestamp(self._clock.now_ns())
                wait_s = await self._term.update(step, now, self._random.randbytes)
                backoff.reset()
            except NotLeader:
                raise
            except SkepError as error:
                log.warning("gossip keys not written, will retry", reason=str(error))
                wait_s = backoff.next_delay_s()
            await self._clock.sleep(wait_s)


def step(tx: Transaction, now: Timestamp, random_bytes: Callable[[int], bytes]) -> float:
    """Create or rotate the keys if due.  Returns the seconds until the next step."""
    stored = tx.rely_on(Payload, GOSSIP_KEYS_ID)
    keys = decoded_keys(stored.data) if stored is not None else None
    if keys is not None and (wait_s := seconds_to_rotation(keys, now)) > 0:
        return wait_s
    fresh = first_keys(random_bytes, now) if keys is None else rotated(keys, random_bytes, now)
    tx.put(Payload(id=GOSSIP_KEYS_ID, data=fresh.encode()))
    return seconds_to_rotation(fresh, now)
