"""Marks silent nodes down, unless a heartbeat arrives before that is written."""

from collections.abc import Callable, Sequence

import structlog

from skep.errors import SkepError
from skep.manager.dispatcher.node_sessions.registration import (
    NotRegistered,
    SilentNode,
    mark_down,
    revert_down,
)
from skep.manager.dispatcher.node_sessions.sessions import Sessions
from skep.store.interface import Store, Transaction

log = structlog.get_logger(__name__)


async def mark_nodes_down(
    store: Store, sessions: Sessions, silent: Sequence[SilentNode], own_time: Callable[[], float], now_ns: int
) -> None:
    """Write that these nodes are down and end their sessions.  Nodes whose write fails stay silent.

    The write may take seconds, perhaps for the same reason that delayed the heartbeats.  A node with a heartbeat
    meanwhile keeps its session: a later attempt writes nothing, and a written mark is reverted.
    """

    def down(tx: Transaction, silent_node: SilentNode) -> bool:
        return sessions.is_silent(silent_node, own_time()) and mark_down(tx, silent_node, now_ns)

    results = await store.update_each(down, silent)
    for silent_node, result in zip(silent, results, strict=True):
        if isinstance(result, SkepError):
            log.warning("node not marked down, will retry", node=silent_node.node_id, reason=str(result))
        elif sessions.is_silent(silent_node, own_time()):
            sessions.forget(silent_node, NotRegistered())
            if result:
                log.info("node is down", node=silent_node.node_id)
        elif result:
            log.info("heartbeat while the node was marked down: reverting", node=silent_node.node_id)
            await revert(store, sessions, silent_node)


async def revert(store: Store, sessions: Sessions, silent_node: SilentNode) -> None:
    """Write that a node which was marked down is ready.  If that fails, end its session."""
    try:
        await store.update(revert_down, silent_node.node_id, silent_node.session_id)
    except SkepError as error:
        # The node registers again, which also marks it ready.
        log.warning("node not marked ready", node=silent_node.node_id, reason=str(error))
        sessions.forget(silent_node, NotRegistered())
