"""Plans which pairs of nodes probe each other.

A node only responds to probes of known peers, so both nodes of a pair must know it, and the plan is symmetric.  Each
manager derives the plan for the nodes that have a session with it.

Up to ``ALL_PAIRS_MAX`` nodes, all nodes probe each other.  In a larger cluster a node has at most ``PEERS_MAX`` peers,
whatever the size of the cluster:

* Its neighbors on a ring of all nodes.  So some other nodes probe each node and notice if it is unreachable.  Positions
  on the ring are unrelated to racks, so an isolated rack is noticed as well.
* Its neighbors on a ring of the nodes on a network, whose containers talk to each other, for each of a few networks
  that are among the first few of both.

The position on a ring is a digest of the node's id.  Managers agree on it without communication, and a node that joins
or leaves only changes the peers of its neighbors.
"""

from collections.abc import Iterable, Mapping
from hashlib import blake2b

from skep.model.values.ids import NetworkId, NodeId

ALL_PAIRS_MAX = 24
"""Largest number of nodes with which all pairs are probed."""
NEIGHBORS = 4
"""Neighbors on each side of a node, on the ring of all nodes."""
NETWORKS_MAX = 6
"""Largest number of networks whose rings a node joins."""
NEIGHBORS_ON_NETWORK = 2
"""Neighbors on each side of a node, on the ring of a network."""
PEERS_MAX = 2 * (NEIGHBORS + NETWORKS_MAX * NEIGHBORS_ON_NETWORK)
"""Largest number of nodes that one node probes in a large cluster."""

_DIGEST_BYTES = 8
"""Length of a position on a ring.  With as many bytes, two nodes rarely have the same position."""


class Ring:
    """Nodes in the order of their positions.  The first follows the last."""

    def __init__(self, nodes: Iterable[NodeId]) -> None:
        self._order = sorted(nodes, key=_digest)
        self._position = {id: position for position, id in enumerate(self._order)}

    def beside(self, node: NodeId, distance: int) -> Iterable[NodeId]:
        """Return the nodes up to ``distance`` before and after a node, which includes itself on a short ring."""
        position = self._position.get(node)
        if position is None:
            return ()
        count = len(self._order)
        return (self._order[(position + step) % count] for step in range(-distance, distance + 1) if step)


class ProbePlan:
    """The peers of each node.

    Args:
        nodes: Nodes that take part.
        networks: Networks of each node, which are only used in a large cluster.
    """

    def __init__(self, nodes: Iterable[NodeId], networks: Mapping[NodeId, Iterable[NetworkId]]) -> None:
        self._nodes = frozenset(nodes)
        self._ring = Ring(self._nodes)
        self._rings: dict[NetworkId, Ring] = {}
        self._networks: dict[NodeId, tuple[NetworkId, ...]] = {}
        if len(self._nodes) <= ALL_PAIRS_MAX:
            return
        on: dict[NetworkId, list[NodeId]] = {}
        for id in self._nodes:
            self._networks[id] = tuple(sorted(networks.get(id, ())))[:NETWORKS_MAX]
            for network in self._networks[id]:
                on.setdefault(network, []).append(id)
        self._rings = {network: Ring(members) for network, members in on.items() if len(members) > 1}

    def peers(self, node: NodeId) -> tuple[NodeId, ...]:
        """Return the nodes that ``node`` probes and is probed by, in order of their ids.  Empty if it does not take
        part.
        """
        if node not in self._nodes:
            return ()
        if len(self._nodes) <= ALL_PAIRS_MAX:
            return tuple(sorted(self._nodes - {node}))
        peers = set(self._ring.beside(node, NEIGHBORS))
        for network in self._networks[node]:
            if (ring := self._rings.get(network)) is not None:
                peers.update(ring.beside(node, NEIGHBORS_ON_NETWORK))
        return tuple(sorted(peers - {node}))


def _digest(id: NodeId) -> tuple[bytes, NodeId]:
    return blake2b(id.encode(), digest_size=_DIGEST_BYTES).digest(), id
