"""Decides in which order managers restart their etcds after the roots have changed.  Pure.

etcd reads the roots of its peers when it starts.  Until a restart, a member trusts the old root.  It also accepts
certificates of the new root, because the old root has cross-signed that.  So the restarts are not urgent.  The members
restart one after another, the leader's member last, and each only if the others have a quorum.
"""

from collections.abc import Iterable, Sequence

from skep.model.node import Node
from skep.model.values.ids import NodeId

SETTLED_S = 3.0
"""Seconds between the restarts of two members.  The first needs time to connect, and perhaps for an election."""


def is_my_turn(own: NodeId, nodes: Iterable[Node], wanted: str) -> bool:
    """Return whether the manager ``own`` may restart its member now.

    A joining manager is ignored, because its certificate comes from the new root, and it may itself wait for these
    restarts.

    Args:
        wanted: Digest of the roots that every member should trust.
    """
    managers = [node for node in nodes if node.has_joined_as_manager or node.id == own]
    order = sorted(managers, key=lambda node: (_leads(node), node.id))
    staying = sum(node.is_reachable_manager for node in order if node.id != own)
    if staying <= len(managers) // 2 and len(managers) > 2:
        return False  # with two managers, the quorum is lost for a moment in any case
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
