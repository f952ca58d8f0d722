"""Which revision of each network's table the nodes here have in force.

What was told is not yet what a node does: it says so when its rules and names are changed.  Until then it may still
send connections to a task that is about to stop (DESIGN, "Draining").
"""

from collections.abc import Iterable

from skep.aio.lean_grpc import Event
from skep.model.ids import NetworkId, NodeId


class Acknowledgements:
    """Of the nodes whose streams of tables are open here."""

    def __init__(self) -> None:
        self._applied: dict[NetworkId, dict[NodeId, int]] = {}
        self._networks: dict[NodeId, frozenset[NetworkId]] = {}
        self._waiting: dict[Event, None] = {}

    def take_part(self, node_id: NodeId, networks: Iterable[NetworkId]) -> None:
        """The node takes part in these and no others: what it has of new ones, it has not said yet."""
        before, now = self._networks.get(node_id, frozenset()), frozenset(networks)
        if before == now:
            return
        self._networks[node_id] = now
        for network_id in now - before:
            self._applied.setdefault(network_id, {})[node_id] = 0
        for network_id in before - now:
            del self._applied[network_id][node_id]
            if not self._applied[network_id]:
                del self._applied[network_id]
        self._tell()

    def applied(self, node_id: NodeId, network_id: NetworkId, revision: int) -> None:
        """The node has this table in force, or a later one.  What it does not take part in does not count."""
        nodes = self._applied.get(network_id, {})
        if node_id in nodes and revision > nodes[node_id]:
            nodes[node_id] = revision
            self._tell()

    def gone(self, node_id: NodeId) -> None:
        """The node's stream has ended: nobody here knows any more what it has."""
        self.take_part(node_id, ())
        self._networks.pop(node_id, None)

    def smallest(self, network_id: NetworkId) -> int | None:
        """What every node here has in force, or a later one; None: nobody here takes part."""
        nodes = self._applied.get(network_id)
        return min(nodes.values()) if nodes else None

    def has_applied(self, network_id: NetworkId, revision: int) -> bool:
        """Whether nobody here uses an earlier table."""
        smallest = self.smallest(network_id)
        return smallest is None or smallest >= revision

    async def wait_applied(self, network_id: NetworkId, revision: int) -> None:
        """Return when nobody here uses an earlier table; how long to wait for that is the caller's to say."""
        news = Event()
        self._waiting[news] = None
        try:
            while not self.has_applied(network_id, revision):
                await news.wait()
                news.clear()
        finally:
            del self._waiting[news]

    def _tell(self) -> None:
        for news in self._waiting:
            news.set()
