"""Checks at every call whether the caller's verified certificate is still accepted.

A certificate is valid until it expires, but only the store shows whether its node has been removed or demoted.  A
manager that has lost contact with the others has no current store, so it rejects all nodes.

A node may be missing in the store because another manager has admitted it a moment ago.  Or its certificate is forged,
because every former manager has had the root's key.  Therefore the manager refuses calls for managers until the node is
in the store, and refuses all calls if the node is still missing after a few seconds with a current store.
"""

from collections.abc import Callable

import structlog

from skep.errors import PermissionDenied, Unavailable
from skep.manager.nodes.revocation import is_foreign, is_revoked, removal_of
from skep.model.node import Node, NodeRole
from skep.model.node_reports.conditions import NO_QUORUM
from skep.model.values.ids import NodeId
from skep.security.identity import NodeIdentity
from skep.store.interface import View
from skep.store.kinds import Revocation
from skep.wire.methods import MethodAccess

log = structlog.get_logger(__name__)

UNKNOWN_S = 5.0
"""Seconds for which a manager with a current store tolerates a node that is missing there.  Usually the node appears
within milliseconds.
"""

UNKNOWN_MAX = 1024
"""Largest number of unknown nodes that are tracked."""


class CallerCheck:
    """The check that ``wire.server.serve`` performs for every method that requires a certificate.

    Args:
        view: Returns the current state of this manager's replica.
        is_current: Returns whether the replica is current.  A disconnected manager does not see removals.
        now: Returns monotonic seconds.
    """

    def __init__(
        self, view: Callable[[], View], is_current: Callable[[], bool], now: Callable[[], float]
    ) -> None:
        self._view = view
        self._is_current = is_current
        self._now = now
        self.unknown: dict[NodeId, float] = {}
        """Unknown callers with the times of their first calls, in this order."""

    def require(self, identity: NodeIdentity, access: MethodAccess) -> None:
        """Check a caller.

        Raises:
            PermissionDenied: The node was removed, is unknown, or is no longer a manager.
            Unavailable: This manager does not know the node yet, or has lost contact with the others.
        """
        if not self._is_current():
            self.unknown.clear()
            raise Unavailable(NO_QUORUM)
        if not check_caller(self._view(), identity, access):
            self._check_unknown(identity, access)

    def _check_unknown(self, identity: NodeIdentity, access: MethodAccess) -> None:
        now = self._now()
        if identity.node_id not in self.unknown:
            while len(self.unknown) >= UNKNOWN_MAX:
                del self.unknown[next(iter(self.unknown))]
            self.unknown[identity.node_id] = now
        if now - self.unknown[identity.node_id] > UNKNOWN_S:
            log.warning(
                "call with a certificate of an unknown node",
                node=identity.node_id,
                role=identity.role.value,
            )
            raise PermissionDenied(f"Permission denied: node {identity.node_id} is not part of the swarm")
        if access is MethodAccess.MANAGER:
            raise Unavailable(f"node {identity.node_id} is not known to this manager yet: try again")


def check_caller(view: View, identity: NodeIdentity, access: MethodAccess) -> bool:
    """Return whether this manager knows the node.

    Raises:
        PermissionDenied: The node was removed, or calls as a manager without being one, or uses a certificate from
            before its demotion.
    """
    revocation = view.lookup(Revocation, identity.node_id)
    if (removal := removal_of(revocation)) is not None:
        raise PermissionDenied(removal.refusal(identity.node_id))
    if is_foreign(revocation, identity.serial):
        raise PermissionDenied(
            f"Permission denied: this certificate in the name of node {identity.node_id} does not belong to it"
        )
    node = view.lookup(Node, identity.node_id)
    if node is None and identity.node_id in view.unreadable(Revocation):
        raise PermissionDenied(
            f"Permission denied: the revocations of node {identity.node_id} cannot be read"
        )
    if access is MethodAccess.NODE or node is None:
        return node is not None or identity.node_id in view.unreadable(Node)
    if not is_manager(node):
        raise PermissionDenied(f"Permission denied: node {identity.node_id} is not a manager of the swarm")
    if is_revoked(revocation, identity.issued_s, identity.serial):
        raise PermissionDenied(
            f"Permission denied: this certificate of node {identity.node_id} was revoked when it was demoted"
        )
    return True


def is_manager(node: Node) -> bool:
    """Return whether the node is a manager now, whatever role its spec requests."""
    role = node.certificate.role if node.certificate is not None else node.spec.role
    return role is NodeRole.MANAGER
