"""How busy nodes say they are, and what of it the scheduler hears.

Each heartbeat tells the load; it stays in the memory of the manager that has the session.  The scheduler is on the
leader, so what matters goes through the store, as a part of the node of its own: when it is first known, and then when
it has moved by more than ``STEP``, at most once every ``INTERVAL_S`` per node, ``AT_ONCE`` nodes at a look.  So a quiet
cluster writes nothing, one of 3,000 nodes at most 100 small keys a second, and a node that wavers about a value is one
value.

Only the choice of nodes for new tasks goes by it: tasks never move because of it, so nothing can swing.
"""

from collections.abc import Callable, Iterable

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.dispatcher.registration import SessionInvalid, require_session
from skep.manager.dispatcher.sessions import LiveSession
from skep.model.ids import NodeId, SessionId
from skep.model.node import Node
from skep.store.interface import Store, Transaction, View

log = structlog.get_logger(__name__)

LOOK_S = 2.0
"""How often is looked."""
STEP = 0.1
"""A load that moved by no more than this is not news."""
INTERVAL_S = 30.0
"""Least time between two writes for one node in one session."""
AT_ONCE = 200
"""Nodes written at one look; the others wait for the next."""
_THOUSAND = 1000


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """A load to write, in the session that it was told in."""

    node_id: NodeId
    session_id: SessionId
    load: float
    """In tenths."""


def told_load(thousandths: int) -> float:
    """What a heartbeat says; more than everything is everything."""
    return min(thousandths, _THOUSAND) / _THOUSAND


def is_news(stored: float | None, told: float, *, written_s: float | None) -> bool:
    """Whether to write the load.  ``written_s``: seconds since this session's last one was, None: none was."""
    if written_s is not None and written_s < INTERVAL_S:
        return False
    return stored is None or abs(told - stored) > STEP


def reports(view: View, sessions: Iterable[LiveSession], now: float) -> list[LoadReport]:
    """What is to be written at ``now``, of the sessions that wait longest first."""
    waiting = []
    for session in sessions:
        if session.load is None:
            continue
        written_s = now - session.load_written if session.load_written is not None else None
        node = view.lookup(Node, session.node_id)
        if node is not None and is_news(node.load, session.load, written_s=written_s):
            waiting.append((session.load_written or 0.0, session))
    waiting.sort(key=lambda item: (item[0], item[1].node_id))
    return [
        LoadReport(node_id=session.node_id, session_id=session.id, load=round(session.load or 0.0, 1))
        for _, session in waiting[:AT_ONCE]
    ]


def record_load(tx: Transaction, report: LoadReport) -> None:
    """Write it.  Raises: SessionInvalid: another manager, or a later session, speaks for the node now."""
    node = require_session(tx, report.node_id, report.session_id)
    tx.put(msgspec.structs.replace(node, load=report.load))


class Loads:
    """Writes what the sessions of this manager have told."""

    def __init__(
        self,
        store: Store,
        sessions: Callable[[], Iterable[LiveSession]],
        live: Callable[[NodeId], LiveSession | None],
        clock: Clock,
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._live = live
        self._clock = clock

    async def run(self) -> None:
        """Look every ``LOOK_S`` until cancelled."""
        while True:
            await self._clock.sleep(LOOK_S)
            now = self._clock.monotonic()
            due = reports(self._store.view(), self._sessions(), now)
            results = await self._store.update_each(record_load, due) if due else ()
            for report in due:
                session = self._live(report.node_id)
                if session is not None and session.id == report.session_id:
                    session.load_written = now  # what was refused is tried again, but not at once
            failed = [
                one for one in results if isinstance(one, SkepError) and not isinstance(one, SessionInvalid)
            ]
            if failed:
                log.warning("loads not written yet", nodes=len(failed), error=str(failed[0]))
