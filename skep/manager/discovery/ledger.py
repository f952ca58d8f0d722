"""All networks' tables, kept up to date commit by commit.

The cost of a commit is in proportion to what it changes, not to the size of the networks.  What comes out is what
``derive.table_of`` gives for the same state (a property test says so); every entry's revision is that of the commit
that changed it, so all managers agree on it.
"""

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from skep.manager.discovery.book import Book, counted
from skep.manager.discovery.derive import (
    endpoint_of,
    has_endpoint,
    is_publishing,
    node_on,
    places_of,
    service_on,
    unread_services,
)
from skep.manager.discovery.stale import Stale
from skep.manager.failures import isolated, object_id
from skep.model.ids import NetworkId, NodeId, ServiceId, TaskId
from skep.model.network import Network
from skep.model.node import Node
from skep.model.overlays import head_of
from skep.model.planes import claimed_underlay, data_path_port, is_overlay
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import NetworkAttachment, Task
from skep.store.interface import Commit, Created, Deleted, Event, Object, Updated, View

KINDS: tuple[type[Object], ...] = (Swarm, Network, Node, Service, Task)
"""What tables are made of."""

NOWHERE: Mapping[NetworkId, NetworkAttachment] = {}


class Stirred(msgspec.Struct, frozen=True, kw_only=True):
    """What a commit meant for whoever reads tables."""

    networks: frozenset[NetworkId] = frozenset()
    """Their tables changed, or are no more."""
    nodes: frozenset[NodeId] = frozenset()
    """They take part in other networks than before, or have another session."""
    is_everybody: bool = False
    """Every node takes part in another network than before."""


class Ledger:
    """The tables of all overlay networks.  Reads nothing but what it is handed."""

    def __init__(self, revision: int = 0) -> None:
        self.revision = revision
        """Everything up to here is in it."""
        self.books: dict[NetworkId, Book] = {}
        self.sessions: dict[NodeId, str] = {}
        """Whose session each node has, as of ``revision``."""
        self._port = data_path_port(())
        self._nodes: dict[NodeId, Node] = {}
        self._claiming: dict[str, dict[NodeId, None]] = {}
        """Nodes by the address that their VXLAN leaves from; mostly one."""
        self._services: dict[ServiceId, Service] = {}
        self._tasks: dict[TaskId, Task] = {}
        """Those that have places on overlays."""
        self._tasks_of_node: dict[NodeId, dict[TaskId, None]] = {}
        self._networks_of_service: dict[ServiceId, frozenset[NetworkId]] = {}
        """Where it has virtual addresses."""
        self._tasks_of_service: dict[ServiceId, dict[NetworkId, int]] = {}
        """Where it has tasks, and how many."""
        self._networks_of_node: dict[NodeId, dict[NetworkId, int]] = {}
        """Where it takes part, and with how many tasks."""
        self._publishing: set[ServiceId] = set()
        self._unread: set[ServiceId] = set()
        """What nodes know of them goes on to hold."""
        self._headless: set[ServiceId] = set()
        """Those of which nothing is known: each may publish ports."""
        self._stale = Stale()

    # -- reading ------------------------------------------------------------------------------------------------

    def networks_of(self, node_id: NodeId) -> list[NetworkId]:
        """The networks that a node is told of, in order of their ids."""
        by_tasks = self._networks_of_node.get(node_id, {})
        everywhere = self._ingress() if self._publishing else []
        return sorted({*by_tasks, *everywhere} & self.books.keys())

    def nodes_on(self, network_id: NetworkId) -> Iterable[NodeId] | None:
        """The nodes that are told of a network; None: all there are."""
        book = self.books.get(network_id)
        if book is None:
            return ()
        if self._publishing and book.head is not None and book.head.is_ingress:
            return None
        return book.tasks_of_node

    def _ingress(self) -> list[NetworkId]:
        return [book.id for book in self.books.values() if book.head is not None and book.head.is_ingress]

    # -- keeping up ---------------------------------------------------------------------------------------------

    def begin(self, view: View) -> Iterator[None]:
        """Take in everything that ``view`` shows; a step per object, so that the caller can make pauses.

        Objects are taken out of the view before the first pause.
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
        for book in self.books.values():
            book.begin_at(self.revision)

    def note(self, commit: Commit) -> Stirred:
        """Take in a commit that follows all that was taken in before."""
        self.revision = commit.revision
        for event in commit.events:
            with isolated("tables", object_id(event)):
                self._note(event)
        return self._refresh()

    def _note(self, event: Event) -> None:
        match event:
            case Created(object) | Updated(_, object):
                self._enter(object)
            case Deleted(object):
                self._leave(object)

    def _enter(self, object: Object) -> None:
        match object:
            case Task():
                self._place(object, places_of(object))
            case Service():
                self._enter_service(object)
            case Node():
                self._enter_node(object)
            case Network() if is_overlay(object):
                self._book(object.id).network = object
                self._stale.networks[object.id] = None
            case Network():
                self._remove_network(object.id)
            case Swarm():
                self._port = data_path_port((object,))
                self._stale.heads.update(dict.fromkeys(self.books))

    def _leave(self, object: Object) -> None:
        match object:
            case Task():
                self._place(object, NOWHERE)
            case Service():
                self._services.pop(object.id, None)
                self._unread.discard(object.id)
                self._headless.discard(object.id)
                self._publish(object.id, is_publishing=False)
                self._note_service(object.id, frozenset())
            case Node():
                self._claim(self._nodes.pop(object.id, None), None)
                self.sessions.pop(object.id, None)
                self._note_node(object.id)
            case Network():
                self._remove_network(object.id)

    # -- tasks --------------------------------------------------------------------------------------------------

    def _place(self, task: Task, places: Mapping[NetworkId, NetworkAttachment]) -> None:
        before = self._tasks.pop(task.id, None)
        if before is not None and (before.node_id, before.service_id, places_of(before).keys()) == (
            task.node_id,
            task.service_id,
            places.keys(),
        ):
            self._tasks[task.id] = task
            self._stale.endpoints.update(dict.fromkeys((network_id, task.id) for network_id in places))
            return
        if before is not None:
            self._count(before, -1)
        if places:
            self._tasks[task.id] = task
            self._count(task, 1)

    def _count(self, task: Task, by: int) -> None:
        """``by`` 1: the task comes to its places; -1: it leaves them."""
        here = self._tasks_of_node.setdefault(task.node_id, {})
        if by > 0:
            here[task.id] = None
        else:
            here.pop(task.id, None)
        if not here:
            del self._tasks_of_node[task.node_id]
        of_node = self._networks_of_node.setdefault(task.node_id, {})
        of_service = self._tasks_of_service.setdefault(task.service_id, {})
        for network_id in places_of(task):
            book = self._book(network_id)
            if by > 0:
                book.tasks[task.id] = None
            else:
                book.tasks.pop(task.id, None)
            self._stale.endpoints[network_id, task.id] = None
            if counted(book.tasks_of_node, task.node_id, by):
                self._stale.nodes[network_id, task.node_id] = None
                self._stale.takers.add(task.node_id)
            if counted(of_service, network_id, by):
                self._stale.services[network_id, task.service_id] = None
            counted(of_node, network_id, by)
            if book.network is None:
                self._stale.networks[network_id] = None
        if not of_node:
            del self._networks_of_node[task.node_id]
        if not of_service:
            del self._tasks_of_service[task.service_id]

    # -- services -----------------------------------------------------------------------------------------------

    def _enter_service(self, service: Service) -> None:
        if service.id in self._headless or has_endpoint(service) or service.removed_at is not None:
            self._unread.discard(service.id)
            self._headless.discard(service.id)
        before = self._services.get(service.id)
        self._services[service.id] = service
        self._publish(service.id, is_publishing=is_publishing(service))
        networks = frozenset(one.network_id for one in service.endpoint.virtual_ips if one.addr)
        self._note_service(service.id, networks)
        if before is None or before.spec.name != service.spec.name:
            self._stale_endpoints_of(service.id)

    def _note_service(self, id: ServiceId, networks: frozenset[NetworkId]) -> None:
        before = self._networks_of_service.pop(id, frozenset())
        if networks:
            self._networks_of_service[id] = networks
        for network_id in sorted({*before, *networks, *self._tasks_of_service.get(id, ())}):
            self._stale.services[network_id, id] = None
        if id not in self._services:
            self._stale_endpoints_of(id)

    def _stale_endpoints_of(self, id: ServiceId) -> None:
        """Tasks that were there before their service, or are still there without it: rare, and all are asked."""
        for network_id in self._tasks_of_service.get(id, ()):
            for task_id in self.books[network_id].tasks:
                if self._tasks[task_id].service_id == id:
                    self._stale.endpoints[network_id, task_id] = None

    def _publish(self, id: ServiceId, *, is_publishing: bool) -> None:
        before = bool(self._publishing)
        if is_publishing:
            self._publishing.add(id)
        else:
            self._publishing.discard(id)
        if bool(self._publishing) is not before:
            self._stale.is_everybody = True
            for network_id in self._ingress():
                self._stale.nodes.update(dict.fromkeys((network_id, node_id) for node_id in self._nodes))

    # -- nodes --------------------------------------------------------------------------------------------------

    def _enter_node(self, node: Node) -> None:
        before = self._nodes.get(node.id)
        self._nodes[node.id] = node
        self._claim(before, node)
        session_id = node.session.session_id if node.session is not None else ""
        if self.sessions.get(node.id, "") != session_id:
            self.sessions[node.id] = session_id
            self._stale.takers.add(node.id)
        if before is None or (before.status, before.description, before.attachments) != (
            node.status,
            node.description,
            node.attachments,
        ):
            self._note_node(node.id)

    def _claim(self, before: Node | None, after: Node | None) -> None:
        """A node has changed: another may have its address now, or lose its own."""
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
                    self._note_node(id)

    def _note_node(self, id: NodeId) -> None:
        for network_id in (*self._networks_of_node.get(id, ()), *self._ingress()):
            self._stale.nodes[network_id, id] = None
        for task_id in self._tasks_of_node.get(id, ()):
            for network_id in places_of(self._tasks[task_id]):
                self._stale.endpoints[network_id, task_id] = None

    # -- networks -----------------------------------------------------------------------------------------------

    def _book(self, id: NetworkId) -> Book:
        """The network's book; a new one if there is none."""
        book = self.books.get(id)
        if book is None:
            book = self.books[id] = Book(id, self.revision, self._unread)
            there = (one for one, networks in self._networks_of_service.items() if id in networks)
            self._stale.services.update(dict.fromkeys((id, service_id) for service_id in there))
        return book

    def _remove_network(self, id: NetworkId) -> None:
        """Its tasks keep it until the last has ended."""
        book = self.books.get(id)
        if book is not None:
            book.network = None
            self._stale.networks[id] = None

    def _network_of(self, book: Book) -> Network | None:
        """As the store has it, else as its earliest task does; None: nobody has it any more."""
        if book.network is not None or not book.tasks:
            return book.network
        place = places_of(self._tasks[min(book.tasks)])[book.id]
        return place.network

    # -- entries ------------------------------------------------------------------------------------------------

    def _refresh(self) -> Stirred:
        """Work out anew what may have changed."""
        stale, self._stale = self._stale, Stale()
        changed: set[NetworkId] = set()
        for network_id in stale.networks:
            with isolated("table", network_id):
                self._refresh_network(network_id, stale, changed)
        for network_id in stale.heads:
            with isolated("head of a table", network_id):
                self._refresh_head(network_id, changed)
        for network_id, task_id in stale.endpoints:
            if (book := self.books.get(network_id)) is not None:
                with isolated("endpoint", task_id):
                    self._refresh_endpoint(book, task_id, changed)
        for network_id, service_id in stale.services:
            if (book := self.books.get(network_id)) is not None:
                with isolated("service in a table", service_id):
                    self._refresh_service(book, service_id, changed)
        for network_id, node_id in stale.nodes:
            if (book := self.books.get(network_id)) is not None:
                with isolated("node in a table", node_id):
                    self._refresh_node(book, node_id, changed)
        return Stirred(
            networks=frozenset(changed), nodes=frozenset(stale.takers), is_everybody=stale.is_everybody
        )

    def _refresh_network(self, id: NetworkId, stale: Stale, changed: set[NetworkId]) -> None:
        book = self.books.get(id)
        if book is None:
            return
        network = self._network_of(book)
        if network is None:
            del self.books[id]
            changed.add(id)
            return
        self._refresh_head(id, changed)
        if network.spec.ingress:
            stale.is_everybody = True
            stale.nodes.update(dict.fromkeys((id, node_id) for node_id in self._nodes))

    def _refresh_head(self, id: NetworkId, changed: set[NetworkId]) -> None:
        book = self.books.get(id)
        network = self._network_of(book) if book is not None else None
        if book is None or network is None:
            return
        if book.set_head(head_of(network, self._port), self.revision):
            changed.add(id)

    def _refresh_endpoint(self, book: Book, id: TaskId, changed: set[NetworkId]) -> None:
        task, endpoint = self._tasks.get(id), None
        if task is not None:
            service, node = self._services.get(task.service_id), self._nodes.get(task.node_id)
            endpoint = endpoint_of(task, service, node, book.id)
        if book.set_endpoint(id, endpoint, self.revision):
            changed.add(book.id)

    def _refresh_service(self, book: Book, id: ServiceId, changed: set[NetworkId]) -> None:
        service, network = self._services.get(id), self._network_of(book)
        entry = None
        if service is not None and network is not None and id not in self._unread:
            entry = service_on(service, network, has_tasks=book.id in self._tasks_of_service.get(id, ()))
        if book.set_service(id, entry, self.revision):
            changed.add(book.id)

    def _refresh_node(self, book: Book, id: NodeId, changed: set[NetworkId]) -> None:
        node, network = self._nodes.get(id), self._network_of(book)
        entry = None
        if node is not None and network is not None:
            is_everywhere = network.spec.ingress and bool(self._publishing)
            if is_everywhere or id in book.tasks_of_node:
                claiming = self._claiming.get(claimed_underlay(node) or "", ())
                entry = node_on(node, network, [self._nodes[one] for one in claiming])
        if book.set_node(id, entry, self.revision):
            changed.add(book.id)


def _is_elsewhere(before: Node | None, after: Node | None) -> bool:
    """Whether the node connects from another address."""
    return before is not None and after is not None and before.status.addr != after.status.addr
