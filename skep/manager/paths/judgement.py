"""Which nodes tasks on overlay networks keep away from, so that those that are left all reach each other.

A pair fails when both say so: a node process that hangs, or is about to be started again, answers no probes, and cuts
nobody off.  That says nothing about which of the two is to blame.  Greedily the node with the most failing pairs is
taken out, until no pair is left: that is the one whose own machine, rack or firewall is broken whenever there is such
a one, and some choice where two are as good as each other.  At least one node is always left.

Finding the smallest such set is hard (vertex cover); the greedy one is larger by a logarithm at most.
"""

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from skep.model.ids import NodeId
from skep.model.node import Availability, CutOff, Node, NodeState
from skep.model.paths import PathCheck
from skep.model.planes import probes_paths

N = TypeVar("N", bound=str)

DATA_CHECKS = (PathCheck.ENCRYPTED, PathCheck.OVERLAY)
"""By these ways containers' packets go; where one fails, tasks that need it stay away."""

NAMED_MAX = 3
"""Nodes named in one judgement; the others are counted."""


def avoided(pairs: Iterable[tuple[N, N]], nodes: Sequence[N]) -> list[N]:
    """The nodes to avoid, in the order in which they are taken out.

    Args:
        pairs: that fail, in either order or in both; those with somebody who is not among ``nodes`` do not count.
        nodes: of two with as many failing pairs, the later one is taken out.
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
        if -number != len(peers):  # it has lost pairs since it was put there
            heapq.heappush(heap, (-len(peers), rank[id], id))
        elif peers:
            for peer in peers:
                failing[peer].discard(id)
            failing[id] = set()
            taken.append(id)
    return taken


def judgements(nodes: Collection[Node]) -> Mapping[NodeId, tuple[CutOff, ...]]:
    """What is to be written of which node; nodes that are not named have nothing written of them.

    Only nodes that are up, and take part in the probes, count: with a node that is down nothing is wrong on the way.
    """
    present = {
        node.id: node
        for node in sorted(nodes, key=_standing)
        if node.status.state is NodeState.READY and probes_paths(node)
    }
    found: dict[NodeId, list[CutOff]] = {}
    for check in DATA_CHECKS:
        said = {
            (node.id, path.peer): path.port
            for node in present.values()
            for path in node.failing_paths
            if path.check == check and path.peer in present
        }
        pairs = {(one, other): port for (one, other), port in said.items() if (other, one) in said}
        peers: dict[NodeId, list[NodeId]] = {}
        for one, other in pairs:
            peers.setdefault(one, []).append(other)
        for id in avoided(pairs, tuple(present)):
            names = sorted(present[peer].description.hostname or peer for peer in peers[id])
            judged = CutOff(
                check=check.value,
                port=pairs[id, peers[id][0]],
                peers=tuple(names[:NAMED_MAX]),
                others=max(0, len(names) - NAMED_MAX),
            )
            found.setdefault(id, []).append(judged)
    return {id: tuple(judged) for id, judged in found.items()}


def _standing(node: Node) -> tuple[bool, str, NodeId]:
    """Kept first: nodes that take tasks, then those that have been here for longer."""
    return node.spec.availability is not Availability.ACTIVE, node.created_at, node.id
