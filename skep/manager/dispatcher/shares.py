"""How the nodes' sessions spread over the managers: what each is worth to a node that chooses, and who is sent on.

Every manager counts in the store what each of them holds, and acts on its own sessions alone.  Differences that do
not matter move nobody.
"""

from collections.abc import Collection, Iterable, Mapping

from skep.model.ids import NodeId
from skep.model.node import Node, NodeState, Reachability

SPREAD_S = 10.0
"""How often is looked."""

WEIGHT = 10
"""Of a manager with about its share; SwarmKit's number."""
WEIGHT_LIGHT = 30
WEIGHT_HEAVY = 3

_MUCH = 1.25
"""A manager with more than this part of its share, and with one session more than it, has too many."""
_AT_ONCE = 10
"""One in so many of those that are too many is sent on at one look."""


def held(nodes: Iterable[Node], own: NodeId) -> Mapping[NodeId, int]:
    """How many sessions each manager holds that can take some: ``own``, and those that are reachable."""
    nodes = tuple(nodes)
    counts = {own: 0}
    for node in nodes:
        status = node.manager_status
        if status is not None and status.addr and status.reachability is Reachability.REACHABLE:
            counts[node.id] = 0
    for node in nodes:
        manager = node.session.manager_id if node.session is not None else None
        if manager in counts and node.status.state is not NodeState.DOWN:
            counts[manager] += 1
    return counts


def weights(held: Mapping[NodeId, int]) -> Mapping[NodeId, int]:
    """What a node that chooses goes by; in three steps, so that not every session is news for all others."""
    return {id: _weight(count, _share(held)) for id, count in held.items()}


def sent_on(held: Mapping[NodeId, int], own: NodeId, movable: Collection[NodeId]) -> tuple[NodeId, ...]:
    """Nodes whose sessions ``own`` ends now so that they look for another manager; a few at a time.

    Args:
        movable: nodes with a session here that find another manager within a heartbeat.

    A manager's node takes its own manager last, so it is sent on only where another one has room.
    """
    share = _share(held)
    if not _has_too_many(held[own], share):
        return ()
    least = min(held.values())
    roomy = {id for id, count in held.items() if count == least}
    able = [id for id in sorted(movable) if roomy - {id, own}]
    return tuple(able[: max(1, int(held[own] - share) // _AT_ONCE)])


def _share(held: Mapping[NodeId, int]) -> float:
    return sum(held.values()) / len(held)


def _has_too_many(count: int, share: float) -> bool:
    return count >= share + 1 and count > _MUCH * share


def _weight(count: int, share: float) -> int:
    if _has_too_many(count, share):
        return WEIGHT_HEAVY
    return WEIGHT_LIGHT if count <= share - 1 else WEIGHT
