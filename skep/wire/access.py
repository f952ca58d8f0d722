"""The caller of a method, and its authorization."""

from collections.abc import Callable
from typing import TypeAlias

import msgspec

from skep.errors import PermissionDenied
from skep.model.node import NodeRole
from skep.model.values.ids import ClusterId, NodeId
from skep.security.identity import NodeIdentity
from skep.wire.methods import MethodAccess


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """The other end of a connection."""

    identity: NodeIdentity | None
    """The identity in its verified certificate, or None without a certificate."""
    address: str
    """IP address from which the caller connects."""
    disconnect: Callable[[], None]
    """Closes the connection of a peer that no longer responds.  Its calls end with ``Lost``."""
    has_crashed: Callable[[], bool] = lambda: False
    """Whether the peer closed the connection without a GOAWAY and without resetting its streams.

    If so, the peer's process has crashed and its kernel closed the connection.  A machine that loses its power or its
    network closes nothing.
    """

    @property
    def node_id(self) -> NodeId:
        """Return the id of the node in the certificate.  Raises PermissionDenied without a certificate."""
        if self.identity is None:
            raise _denied()
        return self.identity.node_id


CertificateCheck: TypeAlias = Callable[[NodeIdentity, MethodAccess], None]
"""Checks the caller of each call.  Raises if its certificate is valid but must not be accepted, because it was revoked
or its node removed.
"""


def accept_all(_identity: NodeIdentity, _access: MethodAccess) -> None:
    """Accept every valid certificate.  For tests and tools."""


def authorize(
    caller: Caller,
    access: MethodAccess,
    cluster_id: ClusterId,
    check_certificate: CertificateCheck = accept_all,
) -> None:
    """Raise PermissionDenied if ``caller`` may not make a call of this ``access`` in this cluster, or Unavailable."""
    identity = caller.identity
    match access:
        case MethodAccess.OPEN:
            return
        case MethodAccess.NODE:
            allowed = identity is not None and identity.cluster_id == cluster_id
        case MethodAccess.MANAGER | MethodAccess.MANAGER_OR_UNKNOWN:
            allowed = (
                identity is not None
                and identity.cluster_id == cluster_id
                and identity.role is NodeRole.MANAGER
            )
    if identity is None or not allowed:
        raise _denied()
    check_certificate(identity, access)


def _denied() -> PermissionDenied:
    # SwarmKit's words (ca/auth.go).  Engines check the code only.
    return PermissionDenied(
        "Permission denied: unauthorized peer role: remote certificate not valid for this call"
    )
