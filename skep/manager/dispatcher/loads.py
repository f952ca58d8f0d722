"""Load of the nodes, and which changes of it are written for the scheduler.

Each heartbeat reports the load, which stays in the memory of the manager that has the session.  The scheduler runs on
the leader, so significant changes are stored, as a separate part of the node object: when the load is first known,
and when it has changed by more than ``STEP``, at most once every ``INTERVAL_S`` per node, ``AT_ONCE`` nodes at a time.
So a quiet cluster writes nothing, and a cluster of 3,000 nodes at most 100 small keys per second.

The load only affects the choice of nodes for new tasks: tasks are never moved because of it, so nothing oscillates.
"""

from collections.abc import Callable, Iterable

import msgspec
import structlog

from skep.aio.clock import Clock, tick
from skep.errors import SkepError
from skep.manager.dispatcher.node_sessions.registration import SessionInvalid, require_session
from skep.manager.dispatcher.node_sessions.sessions import LiveSession
from skep.model.node import Node
from skep.model.values.ids import NodeId, SessionId
from skep.store.interface import Store, Transaction, View

log = structlog.get_logger(__name__)

CHECK_S = 2.0
"""Seconds between checks."""
STEP = 0.1
"""Smaller changes of a load are not written."""
INTERVAL_S = 30.0
"""Minimum seconds between two writes for one node in one session."""
AT_ONCE = 200
"""Maximum nodes written per check.  The others wait for the next."""
_THOUSAND = 1000
"""Unit of loads in heartbeats, which have whole numbers."""


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """A load to write, with the session that reported it."""

    node_id: NodeId
    session_id: SessionId
    load: float
    """Share of the node, rounded to tenths."""


def load_from_heartbeat(thousandths: int) -> float:
    """Return the load in a heartbeat as a share, at most 1."""
    return min(thousandths, _THOUSAND) / _THOUSAND


def is_significant(stored: float | None, reported: float, *, written_s: float | None) -> bool:
    """Whether to write the load.  ``written_s`` is the time since this session's last write, or None without one."""
    if written_s is not None and written_s < INTERVAL_S:
        return False
    return stored is None or abs(reported - stored) > STEP


def reports(view: View, sessions: Iterable[LiveSession], now: float) -> list[LoadReport]:
    """Return the loads to write at ``now``, the longest waiting sessions first."""
    waiting = []
    for session in sessions:
        if session.load is None:
            continue
        written_s = now - session.load_written if session.load_written is not None else None
        node = view.lookup(Node, session.node_id)
        if node is not None and is_significant(node.load, session.load, written_s=written_s):
            waiting.append((session.load_written or 0.0, session))
    waiting.sort(key=lambda item: (item[0], item[1].node_id))
    return [
        LoadReport(node_id=session.node_id, session_id=session.id, load=round(session.load or 0.0, 1))
        for _, session in waiting[:AT_ONCE]
    ]


def record_load(tx: Transaction, report: LoadReport) -> None:
    """Write a load.  Raises SessionInvalid if another manager has the session, or the node a later one."""
    node = require_session(tx, report.node_id, report.session_id)
    tx.put(msgspec.structs.replace(node, load=report.load))


class Loads:
    """Writes the loads that this manager's sessions report."""

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
        """Write loads every ``CHECK_S`` until cancelled."""
        while True:
            await tick(self._clock, CHECK_S)
            now = self._clock.monotonic()
            due = reports(self._store.view(), self._sessions(), now)
            results = await self._store.update_each(record_load, due) if due else ()
            for report in due:
                session = self._live(report.node_id)
                if session is not None and session.id == report.session_id:
                    session.load_written = now  # even if it was refused, which delays the retry
            failed = [
                one for one in results if isinstance(one, SkepError) and not isinstance(one, SessionInvalid)
            ]
            if failed:
                log.warning("loads not written, will retry", nodes=len(failed), error=str(failed[0]))
