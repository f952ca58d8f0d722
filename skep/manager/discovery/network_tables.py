"""The tables of all networks, updated with each commit.

The cost of a commit is proportional to its changes, not to the size of the networks.  The result equals
``derive.table_of`` for the same state (a property test compares them).  The revision of an entry is the revision of the
commit that changed it, so it is the same on all managers.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile

import msgspec

from skep.manager.control_loops.failures import isolated, object_id
from skep.manager.discovery.derive import (
    endpoint_of,
    has_endpoint,
    is_publishing,
    node_on,
    overlay_attachments,
    service_on,
    table_session,
    unread_services,
)
from skep.manager.discovery.versioned_table import VersionedTable, counted
from skep.model.door.routes import has_routes
from skep.model.door.settings import is_door
from skep.model.network import Network, most_complete
from skep.model.networks.data_planes import claimed_underlay, data_path_port, is_overlay
from skep.model.networks.overlays import head_of
from skep.model.node import Node, SessionOwner
from skep.model.options.labels import site_of
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import NetworkAttachment, Task
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId
from skep.store.interface import Commit, Created, Deleted, Event, Object, Updated, View

KINDS: tuple[type[Object], ...] = (Swarm, Network, Node, Service, Task)
"""Kinds of objects that tables are derived from."""

NO_ATTACHMENTS: Mapping[NetworkId, NetworkAttachment] = {}


class AffectedStreams(msgspec.Struct, frozen=True, kw_only=True):
    """The streams that a commit affects."""

    networks: frozenset[NetworkId] = frozenset()
    """Networks whose tables changed or were removed."""
    nodes: frozenset[NodeId] = frozenset()
    """Nodes that are down, back or removed, or whose session or set of networks changed."""
    all_nodes: bool = False
    """Whether the set of networks of every node changed."""


class TableBuilder:
    """The tables of all overlay networks.  Reads only the snapshot and commits passed to it."""

    def __init__(self) -> None:
        self.revision = 0
        """The revision of the last commit that was handled."""
        self.tables: dict[NetworkId, VersionedTable] = {}
        self.sessions: dict[NodeId, str] = {}
        """The session of each node, as of ``revision``."""
        self.table_sessions = TableSessions(0)
        self._moved: dict[tuple[NetworkId, int], frozenset[NodeId]] = {}
        """Results of ``managers_of_moved`` as of ``revision``, because thousands of stops may need the same result."""
        self._port = data_path_port(())
        self._nodes: dict[NodeId, Node] = {}
        self._claiming: dict[str, dict[NodeId, None]] = {}
        """Nodes by the source address of their VXLAN packets.  Usually one per address."""
        self._services: dict[ServiceId, Service] = {}
        self._tasks: dict[TaskId, Task] = {}
        """Tasks with attachments to overlay networks."""
        self._tasks_of_node: dict[NodeId, dict[TaskId, None]] = {}
        self._networks_of_service: dict[ServiceId, frozenset[NetworkId]] = {}
        """Networks whose tables have the service also without a task."""
        self._doors: set[NetworkId] = set()
        """Networks of front doors."""
        self._tasks_of_service: dict[ServiceId, dict[NetworkId, int]] = {}
        """Networks on which the service has tasks, and how many."""
        self._networks_of_node: dict[NodeId, dict[NetworkId, int]] = {}
        """Networks of the node, with the number of its tasks on each."""
        self._publishing: set[ServiceId] = set()
        self._unread: set[ServiceId] = set()
        """Services whose objects are unreadable.  Nodes keep the entries of these services."""
        self._headless: set[ServiceId] = set()
        """Services without any readable data.  Each may publish ports."""
        self._copies: dict[NetworkId, Network] = {}
        """The copies of removed networks in their tasks, as of the present refresh."""
        self._stale = Stale()

    # -- reading ------------------------------------------------------------------------------------------------

    def networks_of(self, node_id: NodeId) -> list[NetworkId]:
        """Return the networks whose tables a node receives, in order of their ids."""
        by_tasks = self._networks_of_node.get(node_id, {})
        everywhere = self._ingress() if self._publishing else []
        return sorted({*by_tasks, *everywhere} & self.tables.keys())

    def nodes_on(self, network_id: NetworkId) -> Collection[NodeId] | None:
        """Return the nodes that receive a network's table, or None for all nodes."""
        table = self.tables.get(network_id)
        if table is None:
            return ()
        if self._publishing and table.head is not None and table.head.is_ingress:
            return None
        return table.tasks_of_node

    def _ingress(self) -> list[NetworkId]:
        return [
            table.id for table in self.tables.values() if table.head is not None and table.head.is_ingress
        ]

    def nodes(self) -> Sequence[NodeId]:
        """Return all nodes."""
        return tuple(self._nodes)

    def session_with(self, manager: NodeId, id: NodeId) -> str | None:
        """Return the session over which ``manager`` sends the node its tables, or None if it does not."""
        session = self.table_sessions.of(id)
        return session.session_id if session is not None and session.manager_id == manager else None

    def managers_on(self, network_id: NetworkId) -> Collection[NodeId]:
        """Return the managers that send the network's table to nodes."""
        if self.nodes_on(network_id) is None:
            return self.table_sessions.managers.keys()
        table = self.tables.get(network_id)
        return table.managers.keys() if table is not None else ()

    def managers_of_moved(self, network_id: NetworkId, revision: int) -> frozenset[NodeId]:
        """Return the managers of nodes on the network whose sessions changed after ``revision``."""
        moved = self._moved.get((network_id, revision))
        if moved is None:
            nodes = self.nodes_on(network_id)
            moved = self._moved[network_id, revision] = frozenset(
                session.manager_id
                for id, session in self.table_sessions.changed_since(revision)
                if nodes is None or id in nodes
            )
        return moved

    # -- keeping up ---------------------------------------------------------------------------------------------

    def begin(self, view: View) -> Iterator[None]:
        """Load all objects of ``view``.  Pauses after each object, so that the caller can let other tasks run.

        All objects are read from the view before the first pause.
        """
        self.revision = view.revision
        found: list[Object] = [*view.find(Swarm), *view.find(Network), *view.find(Node), *view.find(Service)]
        found += [task for task in view.find(Task) if task.networks_attachments]
        self._unread |= unread_services(view)
        self._headless = {id for id in self._unread if view.lookup(Service, id) is None}
        self._publishing |= self._headless
        for object in found:
            with isolated("tables", object.id):  # type: ignore[attr-defined]
                self._enter(object)
            self._refresh()
            yield
        for table in self.tables.values():
            table.reset_changes(self.revision)

    def note(self, commit: Commit) -> AffectedStreams:
        """Handle the next commit."""
        self.revision = commit.revision
        self._moved.clear()
        for event in commit.events:
            with isolated("tables", object_id(event)):
                self._handle(event)
        return self._refresh()

    def _handle(self, event: Event) -> None:
        match event:
            case Created(object) | Updated(_, object):
                self._enter(object)
            case Deleted(object):
                self._leave(object)

    def _enter(self, object: Object) -> None:
        match object:
            case Task():
                self._set_attachments(object, overlay_attachments(object))
            case Service():
                self._enter_service(object)
            case Node():
                self._enter_node(object)
            case Network() if is_overlay(object):
                self._table(object.id).network = object
                self._stale.networks[object.id] = None
            case Network():
                self._remove_network(object.id)
            case Swarm():
                self._port = data_path_port((object,))
                self._stale.heads.update(dict.fromkeys(self.tables))

    def _leave(self, object: Object) -> None:
        match object:
            case Task():
                self._set_attachments(object, NO_ATTACHMENTS)
            case Service():
                self._services.pop(object.id, None)
                self._note_readable(object.id)
                self._publish(object.id, is_publishing=False)
                self._mark_service(object.id, frozenset())
            case Node():
                node = self._nodes.pop(object.id, None)
                self.sessions.pop(object.id, None)
                self._set_session(object.id, None)
                self._claim(node, None)
                self._mark_node(object.id)
            case Network():
                self._remove_network(object.id)

    # -- tasks --------------------------------------------------------------------------------------------------

    def _set_attachments(self, task: Task, attachments: Mapping[NetworkId, NetworkAttachment]) -> None:
        before = self._tasks.pop(task.id, None)
        if before is not None and (before.node_id, before.service_id, overlay_attachments(before).keys()) == (
            task.node_id,
            task.service_id,
            attachments.keys(),
        ):
            self._tasks[task.id] = task
            self._stale.endpoints.update(dict.fromkeys((network_id, task.id) for network_id in attachments))
            return
        if before is not None:
            self._count(before, -1)
        if attachments:
            self._tasks[task.id] = task
            self._count(task, 1)

    def _count(self, task: Task, by: int) -> None:
        """Add the task to its networks (``by`` is 1) or remove it from them (-1)."""
        here = self._tasks_of_node.setdefault(task.node_id, {})
        if by > 0:
            here[task.id] = None
        else:
            here.pop(task.id, None)
        if not here:
            del self._tasks_of_node[task.node_id]
        of_node = self._networks_of_node.setdefault(task.node_id, {})
        of_service = self._tasks_of_service.setdefault(task.service_id, {})
        for network_id in overlay_attachments(task):
            table = self._table(network_id)
            if by > 0:
                table.tasks[task.id] = None
            else:
                table.tasks.pop(task.id, None)
            self._stale.endpoints[network_id, task.id] = None
            if counted(table.tasks_of_node, task.node_id, by):
                self._stale.nodes[network_id, task.node_id] = None
                self._stale.resubscribed.add(task.node_id)
                if (session := self.table_sessions.of(task.node_id)) is not None:
                    counted(table.managers, session.manager_id, by)
            if counted(of_service, network_id, by):
                self._stale.services[network_id, task.service_id] = None
            counted(of_node, network_id, by)
            if table.network is None:
                self._stale.networks[network_id] = None
        if not of_node:
            del self._networks_of_node[task.node_id]
        if not of_service:
            del self._tasks_of_service[task.service_id]

    # -- services -----------------------------------------------------------------------------------------------

    def _enter_service(self, service: Service) -> None:
        if service.id in self._headless or has_endpoint(service) or service.removed_at is not None:
            self._note_readable(service.id)
        before = self._services.get(service.id)
        self._services[service.id] = service
        self._publish(service.id, is_publishing=is_publishing(service))
        self._mark_service(service.id, self._networks_without_tasks(service))
        if before is None or _naming(before) != _naming(service):
            self._mark_endpoints_of(service.id)

    def _note_readable(self, id: ServiceId) -> None:
        """Let nodes drop entries of a service that were kept while it was unreadable."""
        if id in self._unread:
            self._unread.discard(id)
            self._headless.discard(id)
            self._stale.readable.add(id)
            self._stale.services.update(dict.fromkeys((network_id, id) for network_id in self.tables))

    def _networks_without_tasks(self, service: Service) -> frozenset[NetworkId]:
        """Return the networks that have the service also without a task."""
        addressed = {one.network_id for one in service.endpoint.virtual_ips if one.addr}
        return frozenset(addressed | self._doors if has_routes(service.spec.labels) else addressed)

    def _note_door(self, network: Network) -> None:
        """Add the services with routes to the table of a front door."""
        if not is_door(network.spec.labels) or network.id in self._doors:
            return
        self._doors.add(network.id)
        for service in self._services.values():
            if has_routes(service.spec.labels):
                self._mark_service(service.id, self._networks_without_tasks(service))

    def _mark_service(self, id: ServiceId, networks: frozenset[NetworkId]) -> None:
        before = self._networks_of_service.pop(id, frozenset())
        if networks:
            self._networks_of_service[id] = networks
        for network_id in sorted({*before, *networks, *self._tasks_of_service.get(id, ())}):
            self._stale.services[network_id, id] = None
        if id not in self._services:
            self._mark_endpoints_of(id)

    def _mark_endpoints_of(self, id: ServiceId) -> None:
        """Mark the endpoints of an unknown service, whose tasks were created earlier or still exist after its removal.

        Such services are rare, so all tasks of the network are checked.
        """
        for network_id in self._tasks_of_service.get(id, ()):
            for task_id in self.tables[network_id].tasks:
                if self._tasks[task_id].service_id == id:
                    self._stale.endpoints[network_id, task_id] = None

    def _publish(self, id: ServiceId, *, is_publishing: bool) -> None:
        before = bool(self._publishing)
        if is_publishing:
            self._publishing.add(id)
        else:
            self._publishing.discard(id)
        if bool(self._publishing) is not before:
            self._stale.all_nodes = True
            for network_id in self._ingress():
                self._stale.nodes.update(dict.fromkeys((network_id, node_id) for node_id in self._nodes))

    # -- nodes --------------------------------------------------------------------------------------------------

    def _enter_node(self, node: Node) -> None:
        before = self._nodes.get(node.id)
        self._nodes[node.id] = node
        self._set_session(node.id, table_session(node))
        session_id = node.session.session_id if node.session is not None else ""
        if self.sessions.get(node.id, "") != session_id:
            self.sessions[node.id] = session_id
            self._stale.resubscribed.add(node.id)
        self._claim(before, node)
        if before is None or _relevant_fields(before) != _relevant_fields(node):
            self._mark_node(node.id)

    def _set_session(self, id: NodeId, session: SessionOwner | None) -> None:
        before = self.table_sessions.of(id)
        if not self.table_sessions.set(id, session, self.revision):
            return
        self._stale.resubscribed.add(id)
        for network_id in self._networks_of_node.get(id, ()):
            managers = self.tables[network_id].managers
            if before is not None:
                counted(managers, before.manager_id, -1)
            if session is not None:
                counted(managers, session.manager_id, 1)

    def _claim(self, before: Node | None, after: Node | None) -> None:
        """Update the claims on underlay addresses.  As a result, another node may own an address or lose its own."""
        was = claimed_underlay(before) if before is not None else None
        now = claimed_underlay(after) if after is not None else None
        if before is not None and was is not None and (here := self._claiming.get(was)) is not None:
            here.pop(before.id, None)
            if not here:
                del self._claiming[was]
        if after is not None and now is not None:
            self._claiming.setdefault(now, {})[after.id] = None
        if was != now or _is_elsewhere(before, after):
            for address in dict.fromkeys((was or "", now or "")):
                for id in self._claiming.get(address, ()):
                    self._mark_node(id)

    def _mark_node(self, id: NodeId) -> None:
        for network_id in (*self._networks_of_node.get(id, ()), *self._ingress()):
            self._stale.nodes[network_id, id] = None
        for task_id in self._tasks_of_node.get(id, ()):
            for network_id in overlay_attachments(self._tasks[task_id]):
                self._stale.endpoints[network_id, task_id] = None

    # -- networks -----------------------------------------------------------------------------------------------

    def _table(self, id: NetworkId) -> VersionedTable:
        """Return the network's table, and create it if necessary."""
        table = self.tables.get(id)
        if table is None:
            table = self.tables[id] = VersionedTable(id, self.revision, self._unread)
            there = (one for one, networks in self._networks_of_service.items() if id in networks)
            self._stale.services.update(dict.fromkeys((id, service_id) for service_id in there))
        return table

    def _remove_network(self, id: NetworkId) -> None:
        """Mark the network as removed.  The table is kept until the last task on the network has ended."""
        table = self.tables.get(id)
        if table is not None:
            table.network = None
            self._stale.networks[id] = None

    def _network_of(self, table: VersionedTable) -> Network | None:
        """Return the network object, else the most complete copy in its tasks, else None."""
        if table.network is not None or not table.tasks:
            return table.network
        if table.id not in self._copies:
            attached = (one for id in table.tasks for one in self._tasks[id].networks_attachments)
            copies = (one.network for one in attached if one.network is not None)
            self._copies[table.id] = most_complete(one for one in copies if one.id == table.id)
        return self._copies[table.id]

    # -- entries ------------------------------------------------------------------------------------------------

    def _refresh(self) -> AffectedStreams:
        """Derive the stale entries again.  Returns the affected streams."""
        stale, self._stale = self._stale, Stale()
        self._copies.clear()
        changed: set[NetworkId] = set()
        for network_id in stale.networks:
            with isolated("table", network_id):
                self._refresh_network(network_id, stale, changed)
        # A new front door marks the services with routes.
        stale.services |= self._stale.services
        self._stale.services.clear()
        for network_id in stale.heads:
            with isolated("head of a table", network_id):
                self._refresh_head(network_id, changed)
        for network_id, task_id in stale.endpoints:
            if (table := self.tables.get(network_id)) is not None:
                with isolated("endpoint", task_id):
                    self._refresh_endpoint(table, task_id, changed)
        for network_id, service_id in stale.services:
            if (table := self.tables.get(network_id)) is not None:
                with isolated("service in a table", service_id):
                    was_unread = service_id in stale.readable
                    self._refresh_service(table, service_id, changed, was_unread=was_unread)
        for network_id, node_id in stale.nodes:
            if (table := self.tables.get(network_id)) is not None:
                with isolated("node in a table", node_id):
                    self._refresh_node(table, node_id, changed)
        return AffectedStreams(
            networks=frozenset(changed), nodes=frozenset(stale.resubscribed), all_nodes=stale.all_nodes
        )

    def _refresh_network(self, id: NetworkId, stale: "Stale", changed: set[NetworkId]) -> None:
        table = self.tables.get(id)
        if table is None:
            return
        network = self._network_of(table)
        if network is None:
            del self.tables[id]
            self._doors.discard(id)
            changed.add(id)
            # Nodes with tasks on it were already notified when their last task there ended.
            stale.all_nodes |= table.head is not None and table.head.is_ingress
            return
        self._note_door(network)
        self._refresh_head(id, changed)
        if network.spec.ingress:
            stale.all_nodes = True
            stale.nodes.update(dict.fromkeys((id, node_id) for node_id in self._nodes))

    def _refresh_head(self, id: NetworkId, changed: set[NetworkId]) -> None:
        table = self.tables.get(id)
        network = self._network_of(table) if table is not None else None
        if table is None or network is None:
            return
        if table.set_head(head_of(network, self._port), self.revision):
            changed.add(id)

    def _refresh_endpoint(self, table: VersionedTable, id: TaskId, changed: set[NetworkId]) -> None:
        task, endpoint = self._tasks.get(id), None
        if task is not None:
            service, node = self._services.get(task.service_id), self._nodes.get(task.node_id)
            endpoint = endpoint_of(task, service, node, table.id)
        if table.set_endpoint(id, endpoint, self.revision):
            changed.add(table.id)

    def _refresh_service(
        self, table: VersionedTable, id: ServiceId, changed: set[NetworkId], *, was_unread: bool
    ) -> None:
        service, network = self._services.get(id), self._network_of(table)
        entry = None
        if service is not None and network is not None and id not in self._unread:
            entry = service_on(service, network, has_tasks=table.id in self._tasks_of_service.get(id, ()))
        if table.set_service(id, entry, self.revision, is_forced=was_unread):
            changed.add(table.id)

    def _refresh_node(self, table: VersionedTable, id: NodeId, changed: set[NetworkId]) -> None:
        node, network = self._nodes.get(id), self._network_of(table)
        entry = None
        if node is not None and network is not None:
            is_everywhere = network.spec.ingress and bool(self._publishing)
            if is_everywhere or id in table.tasks_of_node:
                claiming = self._claiming.get(claimed_underlay(node) or "", ())
                entry = node_on(node, network, [self._nodes[one] for one in claiming])
        if table.set_node(id, entry, self.revision):
            changed.add(table.id)


def _naming(service: Service) -> tuple[str, Mapping[str, str]]:
    """Return the parts of a service that affect the names of its tasks: templates of host names may use all labels."""
    return service.spec.name, service.spec.labels


def _relevant_fields(node: Node) -> tuple[object, ...]:
    """Return the parts of a node that entries of tables are derived from."""
    return node.status, node.description, node.attachments, site_of(node.spec.labels)


def _is_elsewhere(before: Node | None, after: Node | None) -> bool:
    """Return whether the node connects from another address."""
    return before is not None and after is not None and before.status.addr != after.status.addr


class Stale:
    """Entries of the tables to derive again after a change."""

    def __init__(self) -> None:
        # A dict is ordered, so that every run of a simulation is the same.
        self.networks: dict[NetworkId, None] = {}
        """Networks whose existence, and everything that depends on it, must be checked."""
        self.heads: dict[NetworkId, None] = {}
        self.endpoints: dict[tuple[NetworkId, TaskId], None] = {}
        self.services: dict[tuple[NetworkId, ServiceId], None] = {}
        self.nodes: dict[tuple[NetworkId, NodeId], None] = {}
        self.readable: set[ServiceId] = set()
        """Services that can be read again, or were removed."""
        self.resubscribed: set[NodeId] = set()
        self.all_nodes = False


class TableSessions:
    """The sessions over which nodes receive tables.  A node without one is down, a Docker node or removed."""

    def __init__(self, revision: int) -> None:
        self.changed_at = revision
        """The revision of the last change."""
        self.managers: dict[NodeId, int] = {}
        """Number of such sessions by manager."""
        self._sessions: dict[NodeId, SessionOwner] = {}
        self._changes: dict[NodeId, int] = {}
        """The revision of each session's last change, the earliest first."""

    def of(self, node_id: NodeId) -> SessionOwner | None:
        """Return the node's session, or None."""
        return self._sessions.get(node_id)

    def set(self, node_id: NodeId, session: SessionOwner | None, revision: int) -> bool:
        """Set the node's session.  Returns whether it changed."""
        before = self._sessions.pop(node_id, None)
        if session is not None:
            self._sessions[node_id] = session
        if session == before:
            return False
        self._changes.pop(node_id, None)
        if before is not None:
            counted(self.managers, before.manager_id, -1)
        if session is not None:
            counted(self.managers, session.manager_id, 1)
            self._changes[node_id] = revision
        self.changed_at = revision
        return True

    def changed_since(self, revision: int) -> Iterator[tuple[NodeId, SessionOwner]]:
        """Iterate over the sessions that changed after ``revision``, at a cost proportional to their number."""
        for node_id, _ in takewhile(lambda change: change[1] > revision, reversed(self._changes.items())):
            yield node_id, self._sessions[node_id]
