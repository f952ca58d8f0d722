"""Tracks which revision of each network's table the nodes of this manager have applied.

A node acknowledges a table once its rules and names are changed.  Until then it may still send connections to a task
that is about to stop (docs/architecture.md, "Stopping").  A node counts as long as the store says that its session is
with this manager, even without a stream, because its data plane still uses its tables after a stream has ended.

A thousand nodes acknowledge each change, and a thousand tasks may wait for that.  Therefore the smallest revision is
recalculated only once the last node with that revision has acknowledged a later one, and waiters are woken only if it
has risen.
"""

from collections.abc import Iterable, Sequence

from skep.aio.event import Event
from skep.model.values.ids import NetworkId, NodeId


class Acknowledgements:
    """Acknowledgements of the nodes whose sessions are with this manager."""

    def __init__(self) -> None:
        self._networks: dict[NetworkId, _Network] = {}
        self._networks_of: dict[NodeId, frozenset[NetworkId]] = {}
        self._sessions: dict[NodeId, str] = {}

    def set_networks(self, node_id: NodeId, session_id: str, networks: Iterable[NetworkId]) -> None:
        """Set the networks of a node.  In a new session, or for a new network, the node has not acknowledged anything
        yet.
        """
        if self._sessions.get(node_id) != session_id:
            self.reset_node(node_id)
            self._sessions[node_id] = session_id
        before, now = self._networks_of.get(node_id, frozenset()), frozenset(networks)
        if before == now:
            return
        self._networks_of[node_id] = now
        for network_id in now - before:
            self._network(network_id).put(node_id, 0)
        for network_id in before - now:
            self._network(network_id).remove(node_id)
            self._forget_unused(network_id)

    def applied(self, node_id: NodeId, network_id: NetworkId, revision: int) -> None:
        """Record that the node has applied this table or a later one.  Ignored for networks other than its own."""
        network = self._networks.get(network_id)
        if network is not None and revision > network.revisions.get(node_id, revision):
            network.put(node_id, revision)

    def reset_node(self, node_id: NodeId) -> None:
        """Discard the node's acknowledgements, because it may still apply tables of an earlier session."""
        for network_id in self._networks_of.get(node_id, ()):
            self._network(network_id).put(node_id, 0)

    def remove_node(self, node_id: NodeId) -> None:
        """Remove a node that is down, was removed, or has its session elsewhere."""
        for network_id in self._networks_of.pop(node_id, ()):
            self._network(network_id).remove(node_id)
            self._forget_unused(network_id)
        self._sessions.pop(node_id, None)

    def nodes(self) -> Sequence[NodeId]:
        """Return the nodes whose sessions are with this manager."""
        return tuple(self._sessions)

    def smallest(self, network_id: NetworkId) -> int | None:
        """Return the smallest revision that all nodes have applied, or None without nodes on the network here."""
        network = self._networks.get(network_id)
        return network.smallest if network is not None else None

    def has_applied(self, network_id: NetworkId, revision: int) -> bool:
        """Return whether no node uses an earlier table."""
        smallest = self.smallest(network_id)
        return smallest is None or smallest >= revision

    async def wait_applied(self, network_id: NetworkId, revision: int) -> None:
        """Wait until no node uses an earlier table.  The caller sets a timeout."""
        # a node with an earlier table may join before the waiter resumes
        while not self.has_applied(network_id, revision):
            network, reached = self._network(network_id), Event()
            network.waiting[reached] = revision
            try:
                await reached.wait()
            finally:
                network.waiting.pop(reached, None)
                self._forget_unused(network_id)

    def _network(self, id: NetworkId) -> "_Network":
        return self._networks.setdefault(id, _Network())

    def _forget_unused(self, id: NetworkId) -> None:
        network = self._networks.get(id)
        if network is not None and not network.revisions and not network.waiting:
            del self._networks[id]


class _Network:
    """The nodes and waiters of one network."""

    def __init__(self) -> None:
        self.revisions: dict[NodeId, int] = {}
        self.smallest: int | None = None
        self.waiting: dict[Event, int] = {}
        """Waiters, with the revision for which they wait."""
        self._at_smallest = 0

    def put(self, node_id: NodeId, revision: int) -> None:
        before = self.revisions.get(node_id)
        self.revisions[node_id] = revision
        if self.smallest is None or revision < self.smallest:
            self.smallest, self._at_smallest = revision, 1
        elif revision == self.smallest:
            self._at_smallest += 1
        if before is not None:
            self._leave(before)

    def remove(self, node_id: NodeId) -> None:
        self._leave(self.revisions.pop(node_id))

    def _leave(self, revision: int) -> None:
        """Count a node that has left ``revision``, and wake waiters if it was the last one there."""
        if revision != self.smallest:
            return
        self._at_smallest -= 1
        if self._at_smallest > 0:
            return
        self.smallest = min(self.revisions.values(), default=None)
        self._at_smallest = sum(one == self.smallest for one in self.revisions.values())
        for reached, wanted in self.waiting.items():
            if self.smallest is None or self.smallest >= wanted:
                reached.set()
