"""Keys of Docker nodes' gossip and encrypted overlays, and their rotation by the leader every twelve hours.

An engine keeps three keys for each subsystem, sorts them by their logical time, and encrypts with the second one.  With
fewer than two keys it panics.  So the newest key is distributed before it is used, and the oldest still decrypts data
in transit.

Source: swarmkit, manager/keymanager/keymanager.go; moby, libnetwork/agent.go (getPrimaryKeyTag).
"""

from collections.abc import Callable
from random import Random

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.model.networks.gossip import GossipKey, GossipKeys, decoded_keys
from skep.model.values.ids import IdSource
from skep.model.values.times import SECOND_NS, Timestamp, timestamp, unix_ns
from skep.store.interface import LoopStore, NotLeader, Transaction
from skep.store.kinds import GOSSIP_KEYS_ID, Payload

SUBSYSTEMS = ("networking:gossip", "networking:ipsec")
KEYS_PER_SUBSYSTEM = 3
"""SwarmKit's keyring: the next, the current and the previous key."""
KEY_BYTES = 16
"""Length of a key, as in SwarmKit."""
ROTATION_S = 12 * 3600.0
"""Seconds between two rotations, as in SwarmKit (12 hours)."""

log = structlog.get_logger(__name__)
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
"""Delays in seconds, with jitter, before the next attempt if the store did not accept the keys."""


def first_keys(random_bytes: Callable[[int], bytes], now: Timestamp) -> GossipKeys:
    """Return the keys of a new cluster."""
    subsystems = [subsystem for subsystem in SUBSYSTEMS for _ in range(KEYS_PER_SUBSYSTEM)]
    keys = (
        GossipKey(subsystem=subsystem, key=random_bytes(KEY_BYTES), lamport_time=number)
        for number, subsystem in enumerate(subsystems, 1)
    )
    return GossipKeys(keys=tuple(keys), rotated_at=now)


def rotated(keys: GossipKeys, random_bytes: Callable[[int], bytes], now: Timestamp) -> GossipKeys:
    """Return the keys with the oldest key of each subsystem replaced by a new one."""
    time = max(key.lamport_time for key in keys.keys)
    kept: list[GossipKey] = []
    for subsystem in SUBSYSTEMS:
        time += 1
        own = sorted(
            (key for key in keys.keys if key.subsystem == subsystem), key=lambda key: key.lamport_time
        )
        fresh = GossipKey(subsystem=subsystem, key=random_bytes(KEY_BYTES), lamport_time=time)
        kept += [*own[-(KEYS_PER_SUBSYSTEM - 1) :], fresh]
    return GossipKeys(keys=tuple(kept), rotated_at=now)


def seconds_to_rotation(keys: GossipKeys, now: Timestamp) -> float:
    """Return the seconds until the next rotation.  The result is at most a whole period, because another leader's clock
    may have been ahead.
    """
    age_s = (unix_ns(now) - unix_ns(keys.rotated_at)) / SECOND_NS
    return min(max(ROTATION_S - age_s, 0.0), ROTATION_S)


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
