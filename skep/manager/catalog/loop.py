"""The leader's loop for the leases of registrations.  Leader only.

A lease is over if the leader has seen no renewal for its time, on the leader's own monotonic clock.  So no two clocks
are compared, and a new leader begins every lease again: after the loss of all managers, registrars have a whole lease
to renew.
"""

from collections.abc import Iterable, Iterator
from random import Random

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock, tick
from skep.errors import SkepError
from skep.manager.catalog.registrations import RegistrationRecord, expire, name_of, records_in
from skep.store.interface import LoopStore, NotLeader

log = structlog.get_logger(__name__)

CHECK_S = 1.0
"""Seconds between two looks at the registrations, which is a fifth of the shortest lease."""
NO_CHECK_S = 5.0
"""The same without registrations.  An idle leader shall wake up rarely, and no lease is shorter."""
RETRY_S = 1.0, 10.0
"""First and longest delay in seconds, with jitter, until the next attempt to remove registrations."""


class LeaseTimes:
    """The time of each registration's last renewal, as the leader has seen it."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float]] = {}

    def expired(self, records: Iterable[RegistrationRecord], now: float) -> Iterator[tuple[str, int]]:
        """Note the renewals, and yield name and renewals of each registration whose lease is over.

        Args:
            now: Monotonic seconds.
        """
        seen: dict[str, tuple[int, float]] = {}
        for record in records:
            name = name_of(record.registration)
            known = self._seen.get(name)
            if known is None or known[0] != record.renewals:
                known = record.renewals, now
            seen[name] = known
            if now - known[1] > record.registration.ttl:
                yield name, record.renewals
        self._seen = seen

    @property
    def is_empty(self) -> bool:
        """Whether the last look found nothing."""
        return not self._seen


class RegistrationLeases:
    """Removes the registrations that their registrars no longer renew."""

    def __init__(self, term: LoopStore, clock: Clock, random: Random) -> None:
        self._term = term
        self._clock = clock
        self._random = random
        self._times = LeaseTimes()

    async def run(self) -> None:
        """Remove them until cancelled."""
        backoff = Backoff(*RETRY_S, rng=self._random.random)
        while True:
            try:
                for name, renewals in list(
                    self._times.expired(records_in(self._term.view()), self._clock.monotonic())
                ):
                    if await self._term.update(expire, name, renewals):
                        log.info("registration removed: not renewed in time", registration=name)
                backoff.reset()
            except NotLeader:
                raise
            except SkepError as error:
                log.warning("registration not removed, will retry", reason=str(error))
                await backoff.sleep(self._clock)
                continue
            await tick(self._clock, NO_CHECK_S if self._times.is_empty else CHECK_S)
