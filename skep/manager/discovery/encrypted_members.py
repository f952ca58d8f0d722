"""Which nodes share encrypted networks, kept up to date commit by commit.

A node takes part in a network while a task of it that has not ended is attached to it.  The cost of a commit is in
proportion to the tasks on encrypted networks that it changes; other tasks are passed over.
"""

from collections import Counter
from collections.abc import Iterable

from skep.model.ids import NetworkId, NodeId, TaskId
from skep.model.network import Network
from skep.model.node import Node
from skep.model.overlays import is_encrypted
from skep.model.pair_keys import ENCRYPTION_LABEL, Method
from skep.model.task import Task, TaskState
from skep.store.interface import Commit, Created, Deleted, Event, Object, Updated, View

KINDS: tuple[type[Object], ...] = (Network, Node, Task)


class EncryptedMembers:
    """Who is on which encrypted network.  Reads nothing but what it is handed."""

    def __init__(self) -> None:
        self._encrypted: set[NetworkId] = set()
        self._places: dict[TaskId, tuple[NodeId, frozenset[NetworkId]]] = {}
        self._members: dict[NetworkId, Counter[NodeId]] = {}
        self._networks: dict[NodeId, Counter[NetworkId]] = {}
        self._with_wireguard: set[NodeId] = set()

    def start(self, view: View) -> None:
        """As ``view`` shows it; once, before anything is noted."""
        self._encrypted = {network.id for network in view.find(Network) if is_encrypted(network)}
        for node in view.find(Node):
            self._see_node(node)
        for task in view.find(Task):
            self._see_task(task.id, task)

    def note(self, commit: Commit) -> frozenset[NodeId]:
        """Take a commit in; gives the nodes whose peers it may have changed."""
        changed: set[NodeId] = set()
        # A network comes before the tasks of it, though both may come with one commit.
        for event in sorted(commit.events, key=_is_of_network, reverse=True):
            match event:
                case Created(Network() as network) | Updated(_, Network() as network):
                    if is_encrypted(network):
                        self._encrypted.add(network.id)
                case Created(Node() as node) | Updated(_, Node() as node):
                    if self._see_node(node):
                        changed |= {node.id, *self.peers(node.id)}
                case Deleted(Node() as node):
                    self._with_wireguard.discard(node.id)
                case Created(Task() as task) | Updated(_, Task() as task):
                    changed |= self._see_task(task.id, task)
                case Deleted(Task() as task):
                    changed |= self._see_task(task.id, None)
        return frozenset(changed)

    def peers(self, node: NodeId) -> frozenset[NodeId]:
        """All other nodes that ``node`` shares an encrypted network with."""
        shared: set[NodeId] = set()
        for network in self._networks.get(node, ()):
            shared |= self._members[network].keys()
        return frozenset(shared - {node})

    def have_wireguard(self, one: NodeId, other: NodeId) -> bool:
        """Whether both say that they use it: then they do for each other, else neither does."""
        return one in self._with_wireguard and other in self._with_wireguard

    def _see_node(self, node: Node) -> bool:
        """Whether what it encrypts with has changed."""
        has = node.description.engine.labels.get(ENCRYPTION_LABEL) == Method.WIREGUARD.value
        if has == (node.id in self._with_wireguard):
            return False
        (self._with_wireguard.add if has else self._with_wireguard.discard)(node.id)
        return True

    def _see_task(self, id: TaskId, task: Task | None) -> set[NodeId]:
        before = self._places.get(id)
        now = self._place(task)
        if before == now:
            return set()
        affected: set[NodeId] = set()
        if before is not None:
            affected |= self._count(*before, -1)
            del self._places[id]
        if now is not None:
            self._places[id] = now
            affected |= self._count(*now, +1)
        return affected

    def _place(self, task: Task | None) -> tuple[NodeId, frozenset[NetworkId]] | None:
        if task is None or not task.node_id or not task.networks_attachments:
            return None
        if not TaskState.ASSIGNED.number <= task.status.state.number <= TaskState.RUNNING.number:
            return None
        attached = (one.network.id for one in task.networks_attachments if one.network is not None)
        networks = self._encrypted.intersection(attached)
        return (task.node_id, frozenset(networks)) if networks else None

    def _count(self, node: NodeId, networks: Iterable[NetworkId], by: int) -> set[NodeId]:
        """Add to both counts; gives who is affected if the node came to a network or left it."""
        affected: set[NodeId] = set()
        for network in networks:
            members = self._members.setdefault(network, Counter())
            was = members[node]
            members[node] += by
            own = self._networks.setdefault(node, Counter())
            own[network] += by
            if bool(was) != bool(members[node]):
                affected |= {node, *members.keys()}
            if not members[node]:
                del members[node]
            if not own[network]:
                del own[network]
        return affected


def _is_of_network(event: Event) -> bool:
    return isinstance(event.new if isinstance(event, Updated) else event.object, Network)
