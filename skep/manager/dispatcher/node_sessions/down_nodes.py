"""Marks silent nodes down, unless a heartbeat arrives before that is written."""

from collections.abc import Callable, Sequence

import structlog

from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.dispatcher.node_sessions.admission import RegistrationQueue
from skep.manager.dispatcher.node_sessions.heartbeat_deadlines import HeartbeatDeadlines
from skep.manager.dispatcher.node_sessions.quorum_contact import QuorumContact
from skep.manager.dispatcher.node_sessions.registration import (
    NotRegistered,
    SilentNode,
    mark_down,
    revert_down,
)
from skep.manager.dispatcher.node_sessions.sessions import Sessions
from skep.manager.peer_reports import REGISTERING_MAX, PeerReport, PeerReports
from skep.model.node import Node, NodeState
from skep.model.values.ids import NodeId
from skep.store.interface import Store, Transaction

log = structlog.get_logger(__name__)


class LateMarks:
    """Nodes that are shown as down but send heartbeats here.

    A mark whose outcome was unknown may be committed after the next heartbeat.
    """

    def __init__(self, store: Store, deadlines: HeartbeatDeadlines) -> None:
        self._store = store
        self._deadlines = deadlines
        self._noted: set[NodeId] = set()

    def note(self, node_id: NodeId) -> None:
        """Record that a node with a session here is shown as down."""
        self._noted.add(node_id)

    async def revert_all(self) -> None:
        """Mark the nodes ready again whose deadlines have not passed."""
        sessions = self._deadlines.sessions
        for id in sorted(self._noted):
            node, session = self._store.view().lookup(Node, id), sessions.live(id)
            if node is None or session is None or node.status.state is not NodeState.DOWN:
                self._noted.discard(id)
            elif not self._deadlines.has_passed(session):
                log.info("heartbeats of a node that is marked down: reverting", node=id)
                await revert(self._store, sessions, SilentNode(node_id=id, session_id=session.id))


class SilenceCheck:
    """Checks for silent nodes when a deadline passes, and reports missed heartbeats to the other managers."""

    def __init__(
        self,
        store: Store,
        deadlines: HeartbeatDeadlines,
        late_marks: LateMarks,
        contact: QuorumContact,
        queue: RegistrationQueue,
        reports: PeerReports,
        clock: Clock,
    ) -> None:
        self._store = store
        self._deadlines = deadlines
        self._late_marks = late_marks
        self._contact = contact
        self._queue = queue
        self._reports = reports
        self._clock = clock

    async def run(self) -> None:
        """Mark nodes down that were silent for their grace period, until cancelled."""
        deadlines, reports = self._deadlines, self._reports
        while True:
            await self._clock.sleep(deadlines.next_tick(is_alone=reports.is_alone))
            now = self._clock.monotonic()
            deadlines.configure(self._store.view())
            missed = deadlines.missed()
            reports.own = self._own_report(missed)
            deadlines.advance(
                has_quorum=not self._contact.is_lost,
                is_overloaded=reports.is_overloaded_anywhere(now),
            )
            for id in sorted(reports.registering_elsewhere(now)):
                deadlines.extend(id)
            silent = deadlines.silent(with_others=missed + reports.missed_elsewhere(now) > 1)
            if silent:
                await mark_nodes_down(
                    self._store, deadlines.sessions, silent, lambda: deadlines.now, self._clock.now_ns()
                )
            await self._late_marks.revert_all()

    def movable_nodes(self) -> Sequence[NodeId]:
        """Return the nodes that can find another manager if they are redirected now."""
        if self._contact.is_lost or self._reports.is_overloaded_anywhere(self._clock.monotonic()):
            return ()
        return self._deadlines.movable()

    def _own_report(self, missed: int) -> PeerReport:
        return PeerReport(
            is_overloaded=self._queue.is_overloaded(),
            missed=missed,
            registering=self._deadlines.sessions.registering_now(REGISTERING_MAX),
            is_without_quorum=not self._contact.is_current(),
        )


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
