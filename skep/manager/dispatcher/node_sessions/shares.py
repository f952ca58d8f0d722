"""Balances the nodes' sessions over the managers: weights for nodes that choose a manager, and nodes to redirect.

Every manager counts the sessions of all managers in the store, and acts on its own sessions only.  Small differences
move no node.
"""

from collections.abc import Collection, Iterable, Mapping

from skep.model.node import Node, NodeState, Reachability
from skep.model.values.ids import NodeId

SPREAD_S = 10.0
"""Seconds between checks."""

WEIGHT = 10
"""Weight of a manager with about its share, as in SwarmKit."""
WEIGHT_LIGHT = 30
"""Weight of a manager with less than its share."""
WEIGHT_HEAVY = 3
"""Weight of a manager with far more than its share."""

_OVERFULL_RATIO = 1.25
"""A manager is overfull if it has more than its share times this, and at least one session more."""
_SURPLUS_DIVISOR = 10
"""Divisor of the surplus that determines how many nodes are redirected per check."""


def held(nodes: Iterable[Node], own: NodeId) -> Mapping[NodeId, int]:
    """Return the number of sessions of each manager that can take more: ``own`` and the reachable managers."""
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
    """Return the managers' weights, in three steps, so that one session does not change them for all nodes."""
    return {id: _weight(count, _share(held)) for id, count in held.items()}


def to_redirect(held: Mapping[NodeId, int], own: NodeId, movable: Collection[NodeId]) -> tuple[NodeId, ...]:
    """Return the nodes whose sessions ``own`` ends now so that they connect to another manager, a few at a time.

    A manager's own node chooses its own manager last, so it is only redirected if another manager has capacity.

    Args:
        movable: Nodes with a session here that can find another manager within a heartbeat.
    """
    share = _share(held)
    if not _is_overfull(held[own], share):
        return ()
    least = min(held.values())
    least_loaded = {id for id, count in held.items() if count == least}
    able = [id for id in sorted(movable) if least_loaded - {id, own}]
    return tuple(able[: max(1, int(held[own] - share) // _SURPLUS_DIVISOR)])


def _share(held: Mapping[NodeId, int]) -> float:
    return sum(held.values()) / len(held)


def _is_overfull(count: int, share: float) -> bool:
    return count >= share + 1 and count > _OVERFULL_RATIO * share


def _weight(count: int, share: float) -> int:
    if _is_overfull(count, share):
        return WEIGHT_HEAVY
    return WEIGHT_LIGHT if count <= share - 1 else WEIGHT
