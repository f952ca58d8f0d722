"""Writing that silent nodes are down, but for those that are heard before that is done."""

from collections.abc import Callable, Sequence

import structlog

from skep.errors import SkepError
from skep.manager.dispatcher.registration import NotRegistered, Silence, mark_down, mark_heard
from skep.manager.dispatcher.sessions import Sessions
from skep.store.interface import Store, Transaction

log = structlog.get_logger(__name__)


async def take_down(
    store: Store, sessions: Sessions, silent: Sequence[Silence], own_time: Callable[[], float], now_ns: int
) -> None:
    """Write that these nodes are down and end their sessions; what cannot be written stays silent.

    The write may wait for seconds, perhaps for what kept the heartbeats away.  A node that is heard meanwhile keeps its
    session: the attempt after that writes nothing, and what was written all the same is taken back.
    """

    def down(tx: Transaction, silence: Silence) -> bool:
        return sessions.is_silent(silence, own_time()) and mark_down(tx, silence, now_ns)

    results = await store.update_each(down, silent)
    for silence, result in zip(silent, results, strict=True):
        if isinstance(result, SkepError):
            log.warning("silent node not written yet", node=silence.node_id, error=str(result))
        elif sessions.is_silent(silence, own_time()):
            sessions.forget(silence, NotRegistered())
            if result:
                log.info("node is down", node=silence.node_id)
        elif result:
            log.info("node was heard while it was called down", node=silence.node_id)
            await _take_back(store, sessions, silence)


async def _take_back(store: Store, sessions: Sessions, silence: Silence) -> None:
    try:
        await store.update(mark_heard, silence.node_id, silence.session_id)
    except SkepError as error:
        # The node registers anew, which says that it is ready, too.
        log.warning("a node's return is not written", node=silence.node_id, error=str(error))
        sessions.forget(silence, NotRegistered())
