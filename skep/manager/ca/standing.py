"""What a verified certificate still counts for at this manager: asked at every call.

A certificate is valid until it expires, though its node may have been removed or demoted an hour ago; the store
knows.  A manager that has lost contact with the others cannot know, so it answers no node at all.
"""

from collections.abc import Callable

from skep.errors import PermissionDenied, Unavailable
from skep.model.node import Node, NodeRole
from skep.security.identity import Identity
from skep.store.interface import View
from skep.store.kinds import Revocation
from skep.wire.methods import Access


class Standing:
    """The predicate that ``wire.server.serve`` asks for every call that is not open to anybody.

    Args:
        view: the present state of this manager's replica.
        is_current: whether the replica is; a manager cut off does not hear of removals.
    """

    def __init__(self, view: Callable[[], View], is_current: Callable[[], bool]) -> None:
        self._view = view
        self._is_current = is_current

    def require(self, identity: Identity, access: Access) -> None:
        """Raises: PermissionDenied: removed, or no manager any more; Unavailable: nobody here knows."""
        if not self._is_current():
            raise Unavailable("this manager has lost contact with the others")
        require_standing(self._view(), identity, access)


def require_standing(view: View, identity: Identity, access: Access) -> None:
    """Raises: PermissionDenied: the node was removed, or is to act as a manager and is none.

    A node that this replica does not know yet passes: its certificate was issued by another manager a moment ago.
    """
    revocation = view.lookup(Revocation, identity.node_id)
    if revocation is not None and revocation.is_removed:
        raise PermissionDenied(f"Permission denied: node {identity.node_id} was removed from the swarm")
    node = view.lookup(Node, identity.node_id)
    if node is None and identity.node_id in view.unreadable(Revocation):
        raise PermissionDenied(f"Permission denied: what node {identity.node_id} may not do cannot be read")
    if access is not Access.MANAGER:
        return
    if node is not None and not is_manager(node):
        raise PermissionDenied(f"Permission denied: node {identity.node_id} is not a manager of the swarm")


def is_manager(node: Node) -> bool:
    """Whether the cluster has this node in the role of a manager now, whatever is wished."""
    role = node.certificate.role if node.certificate is not None else node.spec.role
    return role is NodeRole.MANAGER
