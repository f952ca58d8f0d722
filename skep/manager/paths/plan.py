"""Who probes whom.

A node answers the probes of those it knows only, so pairs are told to both ends, and whether two nodes are a pair is
the same whichever of them is asked about: each manager works it out for the nodes that it has sessions with.

Up to ``ALL_PAIRS_MAX`` nodes, all are pairs.  In a larger cluster a node has at most ``PEERS_MAX`` peers, whatever the
size of the cluster:

* its neighbours on a ring of all nodes.  So each node is probed by some others, and whoever cannot be reached is
  noticed; and since places on the ring have nothing to do with racks, so is a rack that is cut off.
* its neighbours on a ring of the nodes on a network, whose containers talk to each other, for each of a few networks of
  the two that both count among their first few.

A place on a ring is a digest of the node's id: managers agree on it without asking each other, and a node that comes
or goes changes the peers of its neighbours and of nobody else.
"""

from collections.abc import Iterable, Mapping
from hashlib import blake2b

from skep.model.ids import NetworkId, NodeId

ALL_PAIRS_MAX = 24
NEIGHBOURS = 4
"""To each side of a node, on the ring of all."""
NETWORKS_MAX = 6
NEIGHBOURS_ON_NETWORK = 2
PEERS_MAX = 2 * (NEIGHBOURS + NETWORKS_MAX * NEIGHBOURS_ON_NETWORK)

_PLACE_BYTES = 8


class Ring:
    """Nodes in the order of their places; the first follows the last."""

    def __init__(self, nodes: Iterable[NodeId]) -> None:
        self._order = sorted(nodes, key=_place)
        self._position = {id: position for position, id in enumerate(self._order)}

    def beside(self, node: NodeId, distance: int) -> Iterable[NodeId]:
        """Those up to ``distance`` before and behind a node; the node itself, too, where the ring is short."""
        position = self._position.get(node)
        if position is None:
            return ()
        count = len(self._order)
        return (self._order[(position + step) % count] for step in range(-distance, distance + 1) if step)


class Plan:
    """The peers of each node.

    Args:
        nodes: that take part.
        networks: of each node; asked in a large cluster only.
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
        """Whom ``node`` probes and is probed by, in order of their ids; nobody, if it takes no part."""
        if node not in self._nodes:
            return ()
        if len(self._nodes) <= ALL_PAIRS_MAX:
            return tuple(sorted(self._nodes - {node}))
        peers = set(self._ring.beside(node, NEIGHBOURS))
        for network in self._networks[node]:
            if (ring := self._rings.get(network)) is not None:
                peers.update(ring.beside(node, NEIGHBOURS_ON_NETWORK))
        return tuple(sorted(peers - {node}))


def _place(id: NodeId) -> tuple[bytes, NodeId]:
    return blake2b(id.encode(), digest_size=_PLACE_BYTES).digest(), id
