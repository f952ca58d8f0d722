"""Spreads the nodes' sessions over the managers, gently: what ``shares`` decides is carried out here."""

from collections.abc import Callable, Mapping

import structlog

from skep.aio.clock import Clock
from skep.manager.dispatcher import shares
from skep.manager.dispatcher.sessions import Sessions
from skep.model.ids import NodeId
from skep.model.node import Node
from skep.store.interface import Store

log = structlog.get_logger(__name__)


class Spreading:
    """Sends nodes on while this manager has far more than its share; tells them first where there is room."""

    def __init__(
        self,
        store: Store,
        own: NodeId,
        sessions: Sessions,
        clock: Clock,
        *,
        send_on: Callable[[NodeId], None],
        may_send_on: Callable[[], bool],
    ) -> None:
        """``send_on``: ends a node's session here and waits for it long enough to find another one."""
        self._store = store
        self._own = own
        self._sessions = sessions
        self._clock = clock
        self._send_on = send_on
        self._may_send_on = may_send_on
        self.weights: Mapping[NodeId, int] = {}
        """What each manager is worth to a node that chooses; those that are not named are worth ``shares.WEIGHT``."""

    async def run(self) -> None:
        """Look every ``SPREAD_S`` until cancelled."""
        while True:
            await self._clock.sleep(shares.SPREAD_S)
            held = shares.held(self._store.view().find(Node), self._own)
            weights = shares.weights(held)
            if weights != self.weights:
                self.weights = weights
                for session in self._sessions.all():
                    session.messages.wake()
            elif self._may_send_on():
                for node_id in shares.sent_on(held, self._own, self._sessions.skep_nodes()):
                    log.info("node sent on: this manager has more than its share", node=node_id)
                    self._send_on(node_id)
