"""What a verified certificate still counts for at this manager: asked at every call.

A certificate is valid until it expires, though its node may have been removed or demoted an hour ago; the store
knows.  A manager that has lost contact with the others cannot know, so it answers no node at all.

A node that the store does not know was let in by another manager a moment ago, or has a certificate that no manager
gave: who was a manager once has the root's key.  So what only managers may do waits until the store knows the caller,
and after a few seconds of being current this manager refuses it everything.
"""

from collections.abc import Callable

import structlog

from skep.errors import PermissionDenied, Unavailable
from skep.manager.revocation import is_foreign, is_taken_back
from skep.model.ids import NodeId
from skep.model.node import Node, NodeRole
from skep.security.identity import Identity
from skep.store.interface import View
from skep.store.kinds import Revocation
from skep.wire.methods import Access

log = structlog.get_logger(__name__)

UNKNOWN_S = 5.0
"""For how long a node may be unknown to a manager that is current; the store shows it within milliseconds."""

UNKNOWN_MAX = 1024
"""Unknown nodes that are remembered."""


class Standing:
    """The predicate that ``wire.server.serve`` asks for every call that is not open to anybody.

    Args:
        view: the present state of this manager's replica.
        is_current: whether the replica is; a manager cut off does not hear of removals.
        now: monotonic seconds.
    """

    def __init__(
        self, view: Callable[[], View], is_current: Callable[[], bool], now: Callable[[], float]
    ) -> None:
        self._view = view
        self._is_current = is_current
        self._now = now
        self._unknown: dict[NodeId, float] = {}
        """Those that called, first one first, and since when."""

    def require(self, identity: Identity, access: Access) -> None:
        """Raises: PermissionDenied: removed, unknown, or no manager any more; Unavailable: not known here, or yet."""
        if not self._is_current():
            self._unknown.clear()
            raise Unavailable("this manager has lost contact with the others")
        if not require_standing(self._view(), identity, access):
            self._require_patience(identity, access)

    def _require_patience(self, identity: Identity, access: Access) -> None:
        now = self._now()
        if identity.node_id not in self._unknown:
            while len(self._unknown) >= UNKNOWN_MAX:
                del self._unknown[next(iter(self._unknown))]
            self._unknown[identity.node_id] = now
        if now - self._unknown[identity.node_id] > UNKNOWN_S:
            log.warning(
                "certificate of a node that the swarm does not know",
                node=identity.node_id,
                role=identity.role.value,
            )
            raise PermissionDenied(f"Permission denied: node {identity.node_id} is not part of the swarm")
        if access is Access.MANAGER:
            raise Unavailable(f"node {identity.node_id} is not known here yet: ask again")


def require_standing(view: View, identity: Identity, access: Access) -> bool:
    """Whether the node is known here.

    Raises: PermissionDenied: it was removed, or is to act as a manager and is none, or shows a certificate from before
    it was demoted.
    """
    revocation = view.lookup(Revocation, identity.node_id)
    if revocation is not None and revocation.is_removed:
        raise PermissionDenied(f"Permission denied: node {identity.node_id} was removed from the swarm")
    if is_foreign(revocation, identity.serial):
        raise PermissionDenied(
            f"Permission denied: this certificate of node {identity.node_id} is not the node's"
        )
    node = view.lookup(Node, identity.node_id)
    if node is None and identity.node_id in view.unreadable(Revocation):
        raise PermissionDenied(f"Permission denied: what node {identity.node_id} may not do cannot be read")
    if access is Access.NODE or node is None:
        return node is not None or identity.node_id in view.unreadable(Node)
    if not is_manager(node):
        raise PermissionDenied(f"Permission denied: node {identity.node_id} is not a manager of the swarm")
    if is_taken_back(revocation, identity.issued_s):
        raise PermissionDenied(
            f"Permission denied: this certificate of node {identity.node_id} was taken back when it was demoted"
        )
    return True


def is_manager(node: Node) -> bool:
    """Whether the cluster has this node in the role of a manager now, whatever is wished."""
    role = node.certificate.role if node.certificate is not None else node.spec.role
    return role is NodeRole.MANAGER
