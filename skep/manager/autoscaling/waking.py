"""Gives services a task whose requests a node holds.  Active on every manager.

The manager with the node's session writes the number itself, so no leader and no timer delay it.  A wake is a hint: the
transaction does nothing unless the service is scaled to zero.
"""

from collections.abc import Callable, Sequence

import structlog

from skep.aio.clock import Clock
from skep.errors import PermissionDenied, SkepError, Unavailable
from skep.manager.autoscaling.state import CheckQuota, door_nodes, put_replicas
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

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (unary(methods.WAKE, self._wake),)

    async def _wake(self, request: skep.WakeRequest, caller: Caller) -> skep.WakeResponse:
        self._session(caller.node_id, request.session_id)
        view = self._store.view()
        if caller.node_id not in door_nodes(view):
            raise PermissionDenied("only nodes with a task of the front door may wake services")
        if caller.node_id in self._busy:
            raise Unavailable("the node's last wake is still being written: the node tries again by itself")
        self._busy.add(caller.node_id)
        try:
            for id in map(ServiceId, request.service_ids[:WAKES_MAX]):
                service = view.lookup(Service, id)
                if service is not None and is_at_zero(service.spec):
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
