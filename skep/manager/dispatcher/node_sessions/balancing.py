"""Balances the nodes' sessions over the managers, as decided by ``shares``."""

from collections.abc import Callable, Collection, Mapping

import structlog

from skep.aio.clock import Clock, tick
from skep.manager.cluster import etcds_behind
from skep.manager.dispatcher.node_sessions import shares
from skep.manager.dispatcher.node_sessions.sessions import Sessions
from skep.model.node import Node
from skep.model.swarm import Swarm
from skep.model.values.ids import NodeId
from skep.store.interface import Store

log = structlog.get_logger(__name__)


class Balancing:
    """Redirects nodes if this manager has far more than its share, after sending all nodes the managers' weights."""

    def __init__(
        self,
        store: Store,
        own: NodeId,
        sessions: Sessions,
        clock: Clock,
        *,
        redirect: Callable[[NodeId], None],
        movable: Callable[[], Collection[NodeId]],
    ) -> None:
        """Create a balancer.

        Args:
            redirect: Ends a node's session here and expects the node for long enough to find another manager.
            movable: Returns the nodes that can be redirected now.
        """
        self._store = store
        self._own = own
        self._sessions = sessions
        self._clock = clock
        self._redirect = redirect
        self._movable = movable
        self.weights: Mapping[NodeId, int] = {}
        """Weight of each manager.  Missing managers have ``shares.WEIGHT``."""

    async def run(self) -> None:
        """Check every ``SPREAD_S`` until cancelled."""
        while True:
            await tick(self._clock, shares.SPREAD_S)
            view = self._store.view()
            held = shares.held(view.find(Node), self._own)
            weights = shares.weights(held)
            if weights != self.weights:
                self.weights = weights
                for session in self._sessions.all():
                    session.messages.wake()
            # A node that is redirected during a rolling restart of etcd may find no manager that takes it, and sends
            # connections to tasks that have stopped meanwhile.
            elif view.find(Swarm) and not etcds_behind(view):
                for node_id in shares.to_redirect(held, self._own, self._movable()):
                    log.info("node redirected: this manager has more than its share", node=node_id)
                    self._redirect(node_id)
