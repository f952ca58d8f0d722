"""The order in which managers restart their etcds after the roots have changed.  Pure.

etcd reads its peers' roots at its start.  Until it has restarted, a member trusts the old root, and with it the
certificates of the new one, which the old one cross-signs.  So there is no hurry: the members restart one after
another, the leader's last, each only while the others have a quorum without it.
"""

from collections.abc import Iterable, Sequence

from skep.model.ids import NodeId
from skep.model.node import Node

SETTLED_S = 3.0
"""Between the restarts of two members: time for connections between them, and for an election."""


def is_my_turn(own: NodeId, nodes: Iterable[Node], wanted: str) -> bool:
    """Whether the manager ``own`` may restart its member now.

    One that is joining does not count: its certificate is of the new root, and it may wait for these restarts itself.

    Args:
        wanted: digest of the roots that every member is to trust.
    """
    managers = [node for node in nodes if node.has_joined_as_manager or node.id == own]
    order = sorted(managers, key=lambda node: (_leads(node), node.id))
    staying = sum(node.is_reachable_manager for node in order if node.id != own)
    if staying <= len(managers) // 2 and len(managers) > 2:
        return False  # with two managers a moment without a quorum cannot be avoided
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
        """Whether ``own`` has been next for long enough at ``now``; a single manager does not wait."""
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
