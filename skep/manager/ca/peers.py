"""The order in which managers restart their etcds after the roots have changed.  Pure.

etcd reads its peers' roots when it starts.  Until it restarts, a member trusts the old root, and with it the
certificates of the new one, which the old one cross-signs.  So the restarts are not urgent: the members restart one
after another, the leader's last, each only while the others have a quorum without it.
"""

from collections.abc import Iterable, Sequence

from skep.model.ids import NodeId
from skep.model.node import Node

SETTLED_S = 3.0
"""Seconds between the restarts of two members: time for connections between them, and for an election."""


def is_my_turn(own: NodeId, nodes: Iterable[Node], wanted: str) -> bool:
    """Return whether the manager ``own`` may restart its member now.

    A joining manager does not count: its certificate comes from the new root, and it may wait for these restarts
    itself.

    Args:
        wanted: Digest of the roots that every member should trust.
    """
    managers = [node for node in nodes if node.has_joined_as_manager or node.id == own]
    order = sorted(managers, key=lambda node: (_leads(node), node.id))
    staying = sum(node.is_reachable_manager for node in order if node.id != own)
    if staying <= len(managers) // 2 and len(managers) > 2:
        return False  # with two managers, a short loss of the quorum cannot be avoided
    for node in order:
        if node.id == own:
            return node.is_reachable_manager or len(managers) == 1
        if node.is_reachable_manager and node.peer_roots != wanted:
            return False
    return False


class RestartTurn:
    """Waits until the member that restarted last has had time to connect."""

    def __init__(self) -> None:
        self._since: float | None = None

    def has_come(self, own: NodeId, nodes: Sequence[Node], wanted: str, now: float) -> bool:
        """Return whether ``own`` has been next for long enough at ``now``.  A single manager does not wait."""
        if not is_my_turn(own, nodes, wanted):
            self._since = None
            return False
        if sum(node.has_joined_as_manager for node in nodes) < 2:
            return True
        if self._since is None:
            self._since = now
        return now - self._since >= SETTLED_S


def _leads(node: Node) -> bool:
    return node.manager_status is not None and node.manager_status.leader
