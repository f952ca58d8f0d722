"""Who gets a certificate, and what is kept of it."""

from datetime import UTC, datetime, timedelta

import msgspec

from skep.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from skep.model.ids import NodeId
from skep.model.node import Availability, Node, NodeCertificate, NodeRole, NodeSpec
from skep.model.swarm import Swarm
from skep.model.times import SECOND_NS, timestamp
from skep.security.authority import NODE_LIFETIME, NODE_LIFETIME_MIN
from skep.security.identity import Identity
from skep.security.tokens import role_of
from skep.store.interface import Transaction, View


def renewing_identity(view: View, swarm: Swarm, caller: Identity) -> Identity:
    """The identity that a node's next certificate has: its own, in the role it has in the cluster.

    Raises: PermissionDenied: the node was removed, or belongs to another cluster.
    """
    node = view.lookup(Node, caller.node_id) if caller.cluster_id == swarm.id else None
    if node is None:
        raise PermissionDenied(f"Permission denied: node {caller.node_id} is not part of this swarm")
    role = node.certificate.role if node.certificate is not None else caller.role
    return Identity(node_id=node.id, cluster_id=swarm.id, role=role)


def joining_identity(swarm: Swarm, token: str, new_id: str) -> Identity:
    """The identity of a machine that shows ``token``.

    Raises:
        InvalidArgument: not one of the cluster's tokens (the docker command prints the text).
        FailedPrecondition: a manager's token.
    """
    match role_of(token, swarm.join_tokens):
        case None:
            raise InvalidArgument("A valid join token is necessary to join this cluster")
        case NodeRole.MANAGER:
            raise FailedPrecondition(
                "this cluster does not take further managers yet: join with the worker token instead"
            )
        case NodeRole.WORKER:
            return Identity(node_id=NodeId(new_id), cluster_id=swarm.id, role=NodeRole.WORKER)


def lifetime_of(swarm: Swarm) -> timedelta:
    """How long certificates are valid by the user's wish, an hour at least."""
    wished_ns = swarm.spec.ca_config.node_cert_expiry
    lifetime = timedelta(seconds=wished_ns / SECOND_NS) if wished_ns else NODE_LIFETIME
    return max(lifetime, NODE_LIFETIME_MIN)


class Issued(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate that was just signed."""

    identity: Identity
    availability: Availability
    csr_pem: bytes
    certificate_pem: bytes
    not_after: datetime


def issued_certificate(role: NodeRole, not_after: datetime) -> NodeCertificate:
    """What a node object says of a certificate that was issued to it."""
    seconds = int(not_after.astimezone(UTC).timestamp())
    return NodeCertificate(role=role, state="issued", not_after=timestamp(seconds * SECOND_NS))


def record_issue(tx: Transaction, issued: Issued, *, is_renewal: bool) -> None:
    """Write the node object at its first certificate, afterwards only the certificate's part.

    Raises: PermissionDenied: the node was removed while its certificate was renewed.
    """
    identity = issued.identity
    certificate = issued_certificate(identity.role, issued.not_after)
    node = tx.lookup(Node, identity.node_id)
    if node is not None:
        tx.put(msgspec.structs.replace(node, certificate=certificate))
    elif is_renewal:
        raise PermissionDenied(f"Permission denied: node {identity.node_id} is not part of this swarm")
    else:
        spec = NodeSpec(role=identity.role, availability=issued.availability)
        tx.put(Node(id=identity.node_id, spec=spec, certificate=certificate))
