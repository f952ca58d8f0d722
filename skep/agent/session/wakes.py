"""Tells the manager which services need a task, because this node holds requests for them."""

from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from skep.aio.clock import Clock
from skep.aio.event import Event
from skep.aio.race import wait_first
from skep.errors import PermissionDenied, Unavailable
from skep.model.values.ids import ServiceId
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import ManagerChannel

log = structlog.get_logger(__name__)

CALL_S_MAX = 5.0
"""Seconds to wait for the manager, which may have to wait for a quorum."""
PAUSE_S = 0.02
"""Seconds between two calls, in which the requests of several services become one call."""
REPEAT_S = 2.0
"""Seconds until a wake is repeated while requests are held.  A quota may have got room meanwhile."""
SERVICES_MAX = 100
"""Most services in a call."""


class HeldSource(Protocol):
    """Requests that are held for services without a task (``dataplane.door.holding``)."""

    @property
    def changed(self) -> Event:
        """Set when a service gets its first held request."""

    def held(self) -> Sequence[ServiceId]:
        """Return the services with held requests."""


class WakeCalls:
    """The wakes of one session.  Runs once."""

    def __init__(
        self, channel: ManagerChannel, source: HeldSource, clock: Clock, rng: Callable[[], float]
    ) -> None:
        """``rng`` returns numbers from 0 to 1."""
        self._channel = channel
        self._source = source
        self._clock = clock
        self._rng = rng
        self._sent = 0
        """Services in calls so far, so that each of many has its turn."""

    async def run(self, session_id: str) -> None:
        """Wake services until cancelled.  Raises: SkepError: the session has ended."""
        while True:
            self._source.changed.clear()
            held = self._source.held()
            if not held:
                await self._source.changed.wait()
                continue
            start = self._sent % len(held)
            turn = [*held[start:], *held[:start]][:SERVICES_MAX]
            self._sent += len(turn)
            request = skep.WakeRequest(session_id=session_id, service_ids=turn)
            try:
                await self._channel.call(methods.WAKE, request, timeout_s=CALL_S_MAX)
            except (PermissionDenied, Unavailable) as error:
                log.warning("services not woken, will retry", services=len(held), reason=str(error))
            await self._clock.sleep(PAUSE_S)
            pause_s = REPEAT_S * (0.75 + self._rng() / 2)
            await wait_first(self._source.changed.wait(), self._clock.sleep(pause_s))
