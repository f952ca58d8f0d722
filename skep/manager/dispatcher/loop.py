"""The dispatcher: node sessions, assignments to nodes, and statuses from nodes.  Active on every manager.

It composes the parts of this package.  ``state.py`` says what a commit changes for nodes.  A part with ``services``
serves nodes, and a part with ``run`` waits for the clock.
"""

import asyncio
from collections.abc import Mapping, Sequence
from random import Random

from skep.aio.clock import Clock
from skep.manager.acme.door_files import DoorFiles
from skep.manager.control_loops.informer import run_informer
from skep.manager.dispatcher.assignment_streams import AssignmentStreams
from skep.manager.dispatcher.changed_labels import ChangedLabels
from skep.manager.dispatcher.delayed_stops import Stops, WaitUnused
from skep.manager.dispatcher.loads import Loads
from skep.manager.dispatcher.node_reports import NodeReports
from skep.manager.dispatcher.node_sessions.admission import RegistrationQueue
from skep.manager.dispatcher.node_sessions.balancing import Balancing
from skep.manager.dispatcher.node_sessions.down_nodes import LateMarks, SilenceCheck
from skep.manager.dispatcher.node_sessions.heartbeat_deadlines import HeartbeatDeadlines, Heartbeats
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer
from skep.manager.dispatcher.node_sessions.quorum_contact import QuorumContact
from skep.manager.dispatcher.node_sessions.registrar import Registrar
from skep.manager.dispatcher.node_sessions.sessions import LiveSession, Sessions
from skep.manager.dispatcher.session_streams import SessionStreams
from skep.manager.dispatcher.state import KINDS, DispatcherState, SentObjects
from skep.manager.dispatcher.usages import MeasuredTasks
from skep.manager.peer_reports import PeerReport, PeerReports
from skep.manager.services.volume_index import VolumeIndex
from skep.model.options.autoscaling import TaskUsage
from skep.model.staging.updates import TaskRequests
from skep.model.values.ids import IdSource, NodeId, ServiceId, TaskId
from skep.store.interface import Store
from skep.wire.service import Handler


class Dispatcher:
    """Sends nodes their tasks and records their reports."""

    def __init__(
        self,
        store: Store,
        own: ManagerPeer,
        clock: Clock,
        new_id: IdSource,
        random: Random,
        wait_unused: WaitUnused | None = None,
        reports: PeerReports | None = None,
    ) -> None:
        """Create a dispatcher.

        Args:
            own: This manager, as nodes reach it.
            wait_unused: See ``Stops``.  Without it, tasks are stopped without draining.
            reports: Reports of and for the other managers, or None for a single manager.
        """
        self._store = store
        self.reports = reports or PeerReports()
        self.sessions = Sessions()
        self.deadlines = HeartbeatDeadlines(self.sessions, random, clock.monotonic, own.node_id)
        self._contact = QuorumContact(store, self.deadlines, clock)
        self.stops = Stops(store, self.sessions, clock, wait_unused)
        labels = ChangedLabels(store, clock, self.stops.wake)
        late_marks, sent = LateMarks(store, self.deadlines), SentObjects(VolumeIndex(), DoorFiles())
        self.state = DispatcherState(store, own, self.deadlines, late_marks, sent, self.stops, labels)
        queue = RegistrationQueue(clock, random)
        self.registrar = Registrar(store, own.node_id, self.deadlines, self._contact, queue, clock, new_id)
        silence = SilenceCheck(store, self.deadlines, late_marks, self._contact, queue, self.reports, clock)
        balancing = Balancing(
            *(store, own.node_id, self.sessions, clock),
            redirect=self.deadlines.redirect,
            movable=silence.movable_nodes,
        )
        self.node_reports = NodeReports(store, self.sessions, clock)
        self._usages = MeasuredTasks(store, self.sessions, clock)
        self._handlers = (
            *SessionStreams(store, self.registrar, self.state, balancing).services(),
            *Heartbeats(self.deadlines).services(),
            *AssignmentStreams(store, self.sessions, sent).services(),
            *self._usages.services(),
            *self.node_reports.services(),
        )
        self._tasks = {
            "find silent nodes": silence.run,
            "stay current": self._contact.run,
            "spread sessions": balancing.run,
            "write loads": Loads(store, self.sessions.all, self.sessions.live, clock).run,
            "stops": self.stops.run,
            "changed labels": labels.run,
            "repeated reports": self.node_reports.run,
            "usage of tasks": self._usages.run,
        }

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return self._handlers

    def session(self, node_id: NodeId, session_id: str) -> LiveSession:
        """Return a session held here.  Raises NotRegistered, or SessionInvalid if the node has a later session."""
        return self.sessions.require(node_id, session_id)

    def session_count(self) -> int:
        """Return how many nodes have their session here."""
        return sum(self.sessions.count())

    def usages(self) -> Mapping[TaskId, TaskUsage]:
        """Return the reported usage of autoscaled services' tasks on nodes with a session here."""
        return self._usages.present()

    def requests(self) -> Mapping[TaskId, TaskRequests]:
        """Return the requests of new tasks over the front doors of nodes with a session here."""
        return self._usages.requests()

    def idle(self) -> Mapping[NodeId, Mapping[ServiceId, float]]:
        """Return the idle times at the front doors of nodes with a session here."""
        return self._usages.idle()

    def is_current(self) -> bool:
        """Whether this manager has contact with a quorum.  See ``QuorumContact``."""
        return self._contact.is_current()

    def without_quorum_s(self) -> float:
        """Return the seconds since the last contact with a quorum.  0 while there is contact."""
        return self._contact.without_quorum_s()

    async def run(self) -> None:
        """Follow the store and mark silent nodes down, until cancelled."""
        try:
            await run_informer(
                self._store,
                KINDS,
                on_snapshot=self.state.on_snapshot,
                on_commit=self.state.on_commit,
                work=self._run_tasks,
            )
        finally:
            # A stopping leader waits for the outcome of its writes, and answers pings meanwhile.
            self.reports.own = PeerReport(is_without_quorum=True)

    async def _run_tasks(self) -> None:
        async with asyncio.TaskGroup() as group:
            for name, run in self._tasks.items():
                group.create_task(run(), name=name)
