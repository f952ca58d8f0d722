"""Chooses the nodes that tasks on overlay networks avoid, so that the remaining nodes all reach each other.

A pair of nodes fails only if both nodes report it, because a node process that hangs or restarts does not respond to
probes although its data path works.  A failing pair does not show which of the two nodes is the cause.  So the node
with the most failing pairs is removed first, and this is repeated until no failing pair is left.  If a single node is
broken, it is that node.  Otherwise the choice is arbitrary but stable.  At least one node always remains.

Finding the smallest such set is hard (vertex cover).  The greedy set is larger by a logarithm at most.
"""

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from skep.model.networks.data_planes import probes_paths
from skep.model.networks.paths import PathCheck
from skep.model.node import Availability, CutOff, Node, NodeState
from skep.model.values.ids import NodeId

N = TypeVar("N", bound=str)

DATA_CHECKS = (PathCheck.ENCRYPTED, PathCheck.OVERLAY)
"""Checks of containers' traffic.  If one fails, tasks that need it are not assigned."""

NAMED_MAX = 3
"""Peers named in one reason.  The others are counted."""


def avoided(pairs: Iterable[tuple[N, N]], nodes: Sequence[N]) -> list[N]:
    """Return the nodes to avoid, in the order in which they are removed.

    Args:
        pairs: Failing pairs, in either order or in both.  Pairs with a node that is not in ``nodes`` do not count.
        nodes: All nodes.  Of two nodes with as many failing pairs, the later one is removed.
    """
    rank = {id: -position for position, id in enumerate(nodes)}
    failing: dict[N, set[N]] = {}
    for one, other in pairs:
        if one != other and one in rank and other in rank:
            failing.setdefault(one, set()).add(other)
            failing.setdefault(other, set()).add(one)
    heap = [(-len(peers), rank[id], id) for id, peers in failing.items()]
    heapq.heapify(heap)
    taken: list[N] = []
    while heap:
        number, _, id = heapq.heappop(heap)
        peers = failing[id]
        if -number != len(peers):  # the node has lost pairs since it was pushed
            heapq.heappush(heap, (-len(peers), rank[id], id))
        elif peers:
            for peer in peers:
                failing[peer].discard(id)
            failing[id] = set()
            taken.append(id)
    return taken


def avoidances(nodes: Collection[Node]) -> Mapping[NodeId, tuple[CutOff, ...]]:
    """Return the reasons to write on each node to avoid.  All other nodes have no reasons.

    Only nodes that are up and take part in probing count, because a pair with a node that is down says nothing about
    the network.
    """
    present = {
        node.id: node
        for node in sorted(nodes, key=_order)
        if node.status.state is NodeState.READY and probes_paths(node)
    }
    found: dict[NodeId, list[CutOff]] = {}
    for check in DATA_CHECKS:
        reported = {
            (node.id, path.peer): path.port
            for node in present.values()
            for path in node.failing_paths
            if path.check == check and path.peer in present
        }
        pairs = {(one, other): port for (one, other), port in reported.items() if (other, one) in reported}
        peers: dict[NodeId, list[NodeId]] = {}
        for one, other in pairs:
            peers.setdefault(one, []).append(other)
        for id in avoided(pairs, tuple(present)):
            names = sorted(present[peer].description.hostname or peer for peer in peers[id])
            cut_off = CutOff(
                check=check.value,
                port=pairs[id, peers[id][0]],
                peers=tuple(names[:NAMED_MAX]),
                others=max(0, len(names) - NAMED_MAX),
            )
            found.setdefault(id, []).append(cut_off)
    return {id: tuple(cut_off) for id, cut_off in found.items()}


def _order(node: Node) -> tuple[bool, str, NodeId]:
    """Return the sort key.  Nodes that take tasks are kept first, then the older ones."""
    return node.spec.availability is not Availability.ACTIVE, node.created_at, node.id
