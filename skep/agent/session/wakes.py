"""Tells the manager which services need a task, because this node holds requests for them."""

from collections.abc import Callable, Collection, Iterable, Sequence
from math import inf
from typing import Protocol

import msgspec
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
"""Seconds after a call until the next one, in which the requests of several services become one call."""
PAUSE_S_MAX = 0.5
"""Most seconds of that pause, which doubles with each further call, because anyone can send requests for many services.
"""
REPEAT_S = 2.0
"""Seconds until the first repetition of a service's wake.  A quota may have got room meanwhile."""
REPEAT_S_MAX = 8.0
"""Most seconds until the next repetition.  The time doubles with each one, and a request is held for 30 s."""
SERVICES_MAX = 100
"""Most services in a call."""


class HeldSource(Protocol):
    """Requests that are held for services without a task (``dataplane.door.holding``)."""

    @property
    def changed(self) -> Event:
        """Set when a service gets its first held request."""

    def held(self) -> Sequence[ServiceId]:
        """Return the services with held requests."""

    def take_served(self) -> Collection[ServiceId]:
        """Return the services that have got a serving task since the last call."""


class _Repetition(msgspec.Struct, frozen=True):
    """When the next wake of a service is due, and the seconds from the last one to it."""

    due: float
    delay_s: float


class Turns:
    """Decides which services are in a call.  Pure.

    A service has its wakes at growing intervals, also if clients come and go, until it is served.
    """

    def __init__(self, rng: Callable[[], float]) -> None:
        self._rng = rng
        self._called: dict[ServiceId, _Repetition] = {}

    def due(self, held: Sequence[ServiceId], now: float) -> list[ServiceId]:
        """Return the services whose wakes are due, the longest due ones first, and count them as called."""
        # A service without a request when its wake was due has a task, or nobody waits for it.
        self._called = {id: one for id, one in self._called.items() if now <= one.due + one.delay_s}
        dues = sorted((self._due_at(id, now), id) for id in held)
        turn = [id for due, id in dues if due <= now][:SERVICES_MAX]
        for id in turn:
            before = self._called.get(id)
            delay_s = min(2 * before.delay_s, REPEAT_S_MAX) if before is not None else REPEAT_S
            self._called[id] = _Repetition(now + delay_s * (0.75 + self._rng() / 2), delay_s)
        return turn

    def forget(self, served: Iterable[ServiceId]) -> None:
        """Let the next wake of these services be due at once, because a former one had its effect."""
        for id in served:
            self._called.pop(id, None)

    def next_due(self, held: Sequence[ServiceId], now: float) -> float:
        """Return when the next wake of one of the services is due."""
        return min((self._due_at(id, now) for id in held), default=now)

    def _due_at(self, id: ServiceId, now: float) -> float:
        return self._called[id].due if id in self._called else now


class WakeCalls:
    """The wakes of one session.  Runs once."""

    def __init__(
        self, channel: ManagerChannel, source: HeldSource, clock: Clock, rng: Callable[[], float]
    ) -> None:
        """``rng`` returns numbers from 0 to 1."""
        self._channel = channel
        self._source = source
        self._clock = clock
        self._turns = Turns(rng)

    async def run(self, session_id: str) -> None:
        """Wake services until cancelled.  Raises: SkepError: the session has ended."""
        pause_s, called_at = PAUSE_S, -inf
        while True:
            self._source.changed.clear()
            held, now = self._source.held(), self._clock.monotonic()
            self._turns.forget(self._source.take_served())
            if turn := self._turns.due(held, now):
                pause_s = min(2 * pause_s, PAUSE_S_MAX) if now - called_at < 2 * PAUSE_S_MAX else PAUSE_S
                request = skep.WakeRequest(session_id=session_id, service_ids=turn)
                try:
                    await self._channel.call(methods.WAKE, request, timeout_s=CALL_S_MAX)
                except (PermissionDenied, Unavailable) as error:
                    log.warning("services not woken, will retry", services=len(turn), reason=str(error))
                called_at = self._clock.monotonic()
                await self._clock.sleep(pause_s)
            elif held:
                left_s = self._turns.next_due(held, now) - now
                await wait_first(self._source.changed.wait(), self._clock.sleep(left_s))
            else:
                await self._source.changed.wait()
