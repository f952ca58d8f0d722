"""Gives services a task whose requests a node holds.  Active on every manager.

The manager with the node's session writes the number itself, so no leader and no timer delay it.  A wake is a hint: the
transaction does nothing unless the service is scaled to zero.
"""

from collections.abc import Callable, Sequence

import structlog

from skep.aio.clock import Clock
from skep.errors import PermissionDenied, SkepError, Unavailable
from skep.manager.autoscaling.state import CheckQuota, has_door, put_replicas
from skep.manager.nodes.node_session import NodeSession
from skep.model.options.autoscaling import is_at_zero
from skep.model.service import Service
from skep.model.values.ids import NodeId, ServiceId
from skep.store.interface import Store, Transaction
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.service import Handler, unary

log = structlog.get_logger(__name__)

WAKES_MAX = 100
"""Most services in a call.  A node sends the others in its next call."""
REFUSED_S = 2.0
"""Seconds after a refused wake in which the service is not tried again.  They double with each further refusal."""
REFUSED_S_MAX = 8.0
"""Most of these seconds.  A request is held for 30 s, in which a quota may get room."""


class RefusedWakes:
    """The services whose wakes were refused lately, however many nodes ask for them.  Pure."""

    def __init__(self) -> None:
        self._until: dict[ServiceId, tuple[float, float]] = {}
        """When the next wake is possible, and the seconds from the last refusal to it."""

    def add(self, id: ServiceId, now: float) -> None:
        """Record that a wake was refused at ``now``."""
        self._until = {id: one for id, one in self._until.items() if now <= one[0] + REFUSED_S_MAX}
        _, seconds = self._until.get(id, (0.0, REFUSED_S / 2))
        seconds = min(2 * seconds, REFUSED_S_MAX)
        self._until[id] = now + seconds, seconds

    def allow(self, id: ServiceId, now: float) -> bool:
        """Return whether a wake may be tried."""
        return id not in self._until or self._until[id][0] <= now


class Wakes:
    """Serves the wakes of nodes with a session here."""

    def __init__(
        self,
        store: Store,
        session: Callable[[NodeId, str], NodeSession],
        clock: Clock,
        check_quota: CheckQuota,
    ) -> None:
        """``session`` returns a node's session here by its id, or raises SkepError."""
        self._store = store
        self._session = session
        self._clock = clock
        self._check_quota = check_quota
        self._busy: set[NodeId] = set()
        self._refused = RefusedWakes()

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (unary(methods.WAKE, self._wake),)

    async def _wake(self, request: skep.WakeRequest, caller: Caller) -> skep.WakeResponse:
        self._session(caller.node_id, request.session_id)
        if caller.node_id in self._busy:
            raise Unavailable("the node's last wake is still being written: the node tries again by itself")
        # Anyone can make a node call, so whatever is quick to find out comes first.
        view, now = self._store.view(), self._clock.monotonic()
        due = [
            id
            for id in dict.fromkeys(map(ServiceId, request.service_ids[:WAKES_MAX]))
            if (service := view.lookup(Service, id)) is not None
            and is_at_zero(service.spec)
            and self._refused.allow(id, now)
        ]
        if not due:
            return skep.WakeResponse()
        if not has_door(view, caller.node_id):
            raise PermissionDenied("only nodes with a task of the front door may wake services")
        self._busy.add(caller.node_id)
        try:
            for id in due:
                await self._write(id)
        finally:
            self._busy.discard(caller.node_id)
        return skep.WakeResponse()

    async def _write(self, id: ServiceId) -> None:
        try:
            if await self._store.update(write_wake, id, self._clock.now_ns(), self._check_quota):
                log.info("service woken by a request", service=id)
        except Unavailable:
            raise
        except SkepError as error:
            self._refused.add(id, self._clock.monotonic())
            log.warning("service not woken, will retry", service=id, reason=str(error))


def write_wake(tx: Transaction, id: ServiceId, now_ns: int, check_quota: CheckQuota) -> bool:
    """Give a service that is scaled to zero a task.  Returns False if it is not, so a wake may be repeated.

    Raises:
        PermissionDenied: The stack's quota does not allow a task at present.
    """
    service = tx.rely_on(Service, id)
    if service is None or service.removed_at is not None or not is_at_zero(service.spec):
        return False
    put_replicas(tx, service, 1, "a request at the front door", now_ns, check_quota)
    return True
