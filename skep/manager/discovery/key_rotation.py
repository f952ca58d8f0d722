"""The loop that makes the secrets of encrypted overlays and rotates them.  Runs on the leader only."""

import asyncio
from collections.abc import Callable
from random import Random

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.discovery.overlay_keys import (
    ROTATION_S,
    decoded_ring,
    first_ring,
    rotated,
    seconds_to_rotation,
)
from skep.manager.informer import LoopStore, run_informer
from skep.model.network import Network
from skep.model.overlays import is_encrypted
from skep.model.times import Timestamp, timestamp
from skep.store.interface import Commit, Created, NotLeader, Transaction, Updated, View
from skep.store.kinds import OVERLAY_KEYS_ID, Payload

log = structlog.get_logger(__name__)


class OverlayKeyRotation:
    """Makes the ring when the first encrypted network is made, and keeps it young from then on."""

    def __init__(
        self,
        term: LoopStore,
        clock: Clock,
        random: Random,
        *,
        incarnation: int = 0,
        period_s: float = ROTATION_S,
    ) -> None:
        """
        Args:
            random: secrets are made of it, so in production it has to be the system's.
            incarnation: of the cluster that this manager serves.
            period_s: between two rotations.
        """
        self._term = term
        self._clock = clock
        self._random = random
        self._incarnation = incarnation
        self._period_s = period_s
        self._is_wanted = asyncio.Event()

    async def run(self) -> None:
        """Work until cancelled.  The wait is measured on this leader's monotonic clock."""
        await run_informer(
            self._term, (Network,), on_snapshot=self._on_snapshot, on_commit=self._on_commit, work=self._work
        )

    def _on_snapshot(self, view: View) -> None:
        if any(is_encrypted(network) for network in view.find(Network)):
            self._is_wanted.set()

    def _on_commit(self, commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Created(Network() as network) | Updated(_, Network() as network) if is_encrypted(
                    network
                ):
                    self._is_wanted.set()

    async def _work(self) -> None:
        backoff = Backoff(chance=self._random.random)
        await self._is_wanted.wait()
        while True:
            try:
                now = timestamp(self._clock.now_ns())
                wait_s = await self._term.update(
                    step, now, self._random.randbytes, self._incarnation, self._period_s
                )
                backoff.reset()
            except NotLeader:
                raise
            except SkepError as error:
                log.warning("overlay keys not written, trying again", reason=str(error))
                wait_s = backoff.next_delay_s()
            await self._clock.sleep(wait_s)


def step(
    tx: Transaction,
    now: Timestamp,
    random_bytes: Callable[[int], bytes],
    incarnation: int,
    period_s: float,
) -> float:
    """Make or rotate the ring if that is due; gives seconds until the next look."""
    stored = tx.rely_on(Payload, OVERLAY_KEYS_ID)
    ring = decoded_ring(stored.data) if stored is not None else None
    if ring is None:
        fresh = first_ring(random_bytes, now, incarnation)
    elif (wait_s := seconds_to_rotation(ring, now, incarnation, period_s)) > 0:
        return wait_s
    else:
        fresh = rotated(ring, random_bytes, now, incarnation)
    tx.put(Payload(id=OVERLAY_KEYS_ID, data=fresh.encode()))
    return seconds_to_rotation(fresh, now, incarnation, period_s)
