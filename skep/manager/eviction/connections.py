"""Ends connections that were made under a root whose key an evicted node had."""

import structlog

from skep.manager.eviction.steps import eviction_of
from skep.model.node import NodeRole
from skep.store.interface import Store
from skep.wire.server import Bound

log = structlog.get_logger(__name__)


def end_connections(store: Store, bound: Bound) -> None:
    """End every connection if the root has changed because of an eviction.

    Connections survive a rotation, as they do in Docker.  But with the old root's key some of them may have been made
    in the names of other nodes.
    """
    eviction = eviction_of(store.view())
    if eviction is not None and eviction.next_step is not None:
        log.warning("root replaced by an eviction: all connections are closed", node=eviction.node_id)
        # Connections of managers have more rights, and there are few of them, so they are closed at once.
        bound.disconnect_all(
            lambda caller: caller.role is NodeRole.MANAGER or caller.node_id in eviction.nodes
        )
