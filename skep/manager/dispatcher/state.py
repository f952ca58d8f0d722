"""State of the dispatcher: what a commit means for the sessions and streams of nodes.  Nothing here waits.

The other loops' states queue keys that are decided later.  Here a commit only wakes streams.  Each stream then compares
the store with its earlier messages.
"""

from typing import NamedTuple

from skep.manager.acme.door_files import DoorFiles
from skep.manager.control_loops.failures import isolated
from skep.manager.dispatcher.changed_labels import ChangedLabels
from skep.manager.dispatcher.delayed_stops import Stops
from skep.manager.dispatcher.node_sessions.down_nodes import LateMarks
from skep.manager.dispatcher.node_sessions.heartbeat_deadlines import HeartbeatDeadlines
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer, managers_of
from skep.manager.dispatcher.node_sessions.registration import NotRegistered, SessionInvalid
from skep.manager.services.volume_index import VolumeIndex
from skep.model.door.settings import is_door
from skep.model.networks.data_planes import is_docker_node
from skep.model.node import Node, NodeState, differ_in_load_alone
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.volume import Volume
from skep.store.interface import Commit, Created, Deleted, Store, Updated, View
from skep.store.kinds import GOSSIP_KEYS_ID, Payload

KINDS = (Node, Task, Service, Swarm, Payload, Volume)


class SentObjects(NamedTuple):
    """Objects that nodes get with their tasks."""

    volumes: VolumeIndex
    door: DoorFiles


class DispatcherState:
    """The managers that nodes are sent, and the streams that a commit wakes."""

    def __init__(
        self,
        store: Store,
        own: ManagerPeer,
        deadlines: HeartbeatDeadlines,
        late_marks: LateMarks,
        sent: SentObjects,
        stops: Stops,
        labels: ChangedLabels,
    ) -> None:
        """Create the state.

        Args:
            own: This manager, as nodes reach it.
        """
        self._store = store
        self.own = own
        self._deadlines = deadlines
        self._sessions = deadlines.sessions
        self._late_marks = late_marks
        self._volumes, self._door = sent
        self._stops = stops
        self._labels = labels
        self.managers: tuple[ManagerPeer, ...] = (own,)

    def on_snapshot(self, view: View) -> None:
        """Start from a snapshot: expect the nodes of an earlier run, and wake every stream for everything.

        Objects that were deleted since an earlier snapshot leave no trace in this one.
        """
        nodes = view.find(Node)
        known = {*view.ids(Node), *view.unreadable(Node)}
        for session in tuple(self._sessions.all()):
            if session.node_id not in known:
                self._sessions.lose(session.node_id, None, NotRegistered())
        self._deadlines.configure(view)
        self.managers = managers_of(nodes, self.own)
        for node in nodes:
            with isolated("session", node.id):
                self._on_node(node, is_start=True)
        self._volumes.reset(view.find(Volume))
        self._door.reset()
        for session in self._sessions.all():
            session.wake_for_all()

    def on_commit(self, commit: Commit) -> None:
        """Wake the streams of the nodes that the commit concerns."""
        has_new_managers = has_new_certificates = False
        for event in commit.events:
            has_new_certificates |= self._door.on_event(event)
            match event:
                case Created(Task() as task) | Deleted(Task() as task):
                    self._stops.release(task)
                case Updated(Task() as old, Task() as new):
                    self._stops.on_update(old, new, commit.revision)
                case Updated(Service() as before, Service() as service):
                    self._labels.on_update(before, service)
                    self._stops.on_service(before, service)
                case Created(Node() as node):
                    has_new_managers |= node.manager_status is not None
                case Updated(Node() as old, Node() as node) if not differ_in_load_alone(old, node):
                    has_new_managers |= old.manager_status != node.manager_status
                    self._on_node(node)
                    if old.attachments != node.attachments:
                        # Tasks may have waited for the attachment.
                        tasks = self._store.view().find(Task, node_id=node.id)
                        self._stops.wake(node.id, (task.id for task in tasks))
                case Deleted(Node() as node):
                    has_new_managers |= node.manager_status is not None
                    self._sessions.lose(node.id, None, NotRegistered())
                case Created(Volume() as volume):
                    self._wake_for(None, volume)
                case Deleted(Volume() as volume):
                    self._wake_for(volume, None)
                case Updated(Volume() as old, Volume() as volume):
                    self._wake_for(old, volume)
                case Updated(Swarm(), Swarm()):
                    has_new_managers = True  # or new roots, which every session message contains
                case Created(Payload(id=id)) | Updated(_, Payload(id=id)) if id == GOSSIP_KEYS_ID:
                    self._wake_messages()
        if has_new_managers:
            self.managers = managers_of(self._store.view().find(Node), self.own)
            self._wake_messages()

        if has_new_certificates:
            self._wake_proxies()

    def _wake_proxies(self) -> None:
        """Send the front door's certificates and challenges to the nodes of its tasks."""
        view = self._store.view()
        doors = [one.id for one in view.find(Service) if is_door(one.spec.labels)]
        nodes = {task.node_id for id in doors for task in view.find(Task, service_id=id) if task.node_id}
        for node_id in sorted(nodes):
            if (session := self._sessions.live(node_id)) is not None:
                session.wake_assignments(())

    def _wake_messages(self) -> None:
        for session in self._sessions.all():
            session.messages.wake()

    def _wake_for(self, old: Volume | None, new: Volume | None) -> None:
        """Send a volume's change to the nodes on which it is, or was, published."""
        for node_id in self._volumes.change(old, new):
            if (session := self._sessions.live(node_id)) is not None:
                session.wake_assignments(())

    def _on_node(self, node: Node, *, is_start: bool = False) -> None:
        """End a session that another manager has now, wake one of ours, or expect its node if it is not connected."""
        held, is_down = node.session, node.status.state is NodeState.DOWN
        if held is not None:
            self._sessions.lose(node.id, held.session_id, SessionInvalid())
        session = self._sessions.live(node.id)
        if session is not None:
            session.messages.wake()
            if is_down:
                self._late_marks.note(node.id)
        elif held is not None and held.manager_id == self.own.node_id and not is_down:
            if is_start:
                self._deadlines.expect_after_restart(node.id, held.session_id)
            else:
                is_skep = not is_docker_node(node)
                self._deadlines.expect_adopted(node.id, held.session_id, is_skep=is_skep)
