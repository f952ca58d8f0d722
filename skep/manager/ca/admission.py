"""Admission of nodes to the certificate authority, and the records of issued certificates."""

from datetime import UTC, datetime, timedelta

import msgspec
from cryptography import x509

from skep.errors import (
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from skep.manager.nodes.revocation import is_foreign
from skep.manager.services.job_runs import joined_at
from skep.model.node import Availability, IssuedSerial, Node, NodeCertificate, NodeRole, NodeSpec
from skep.model.swarm import RENEW_WINDOW_LABEL, Swarm, SwarmSpec
from skep.model.values.ids import NodeId
from skep.model.values.times import SECOND_NS, Timestamp, duration_ns, timestamp, unix_ns
from skep.security.authority import NODE_LIFETIME, NODE_LIFETIME_MIN
from skep.security.identity import NodeIdentity
from skep.security.tokens import role_of
from skep.security.trust import issuer_digest
from skep.store.interface import Transaction, View
from skep.store.kinds import Revocation

RENEW_WINDOW = timedelta(days=30)
"""Time after its expiry during which a certificate may be renewed.

Thanks to it, a machine that was off for long rejoins without help.  Of the usual 90 days, a certificate always has at
least 18 left, so a machine may be off for 48 days.  The key on a discarded disk is useless after at most 120 days.
"""

SERIALS_MAX = 256
"""Largest number of unexpired manager certificates of one node.  A healthy node has two.

All of them are recorded, because a certificate that is not recorded could not be revoked at etcd's port.
"""

_NO_TOKEN = "A valid join token is necessary to join this cluster"


def renewing_identity(view: View, swarm: Swarm, caller: NodeIdentity) -> NodeIdentity:
    """Return the identity for a node's next certificate: its own, with its current role.

    Raises:
        PermissionDenied: The node was removed or belongs to another cluster, or the certificate belongs to another
            node.
    """
    node = view.lookup(Node, caller.node_id) if caller.cluster_id == swarm.id else None
    if node is None:
        raise PermissionDenied(f"Permission denied: node {caller.node_id} is not part of this swarm")
    if is_foreign(view.lookup(Revocation, caller.node_id), caller.serial):
        raise PermissionDenied(
            f"Permission denied: this certificate in the name of node {caller.node_id} does not belong to it"
        )
    role = node.certificate.role if node.certificate is not None else caller.role
    return NodeIdentity(node_id=node.id, cluster_id=swarm.id, role=role)


def joining_identity(swarm: Swarm, token: str, new_id: str, *, is_engine: bool) -> NodeIdentity:
    """Return the identity of a machine that joins with ``token``.

    Raises:
        InvalidArgument: The token is not one of the cluster's.  The docker command prints the text.
        FailedPrecondition: A Docker Engine has a manager's token.
    """
    match role_of(token, swarm.join_tokens):
        case None:
            raise InvalidArgument(_NO_TOKEN)
        case NodeRole.MANAGER if is_engine:
            raise FailedPrecondition(
                "this cluster takes Docker engines as workers only: join with the worker token instead"
            )
        case role:
            return NodeIdentity(node_id=NodeId(new_id), cluster_id=swarm.id, role=role)


def lifetime_of(swarm: Swarm) -> timedelta:
    """Return the configured lifetime of certificates, at least an hour."""
    configured_ns = swarm.spec.ca_config.node_cert_expiry
    lifetime = timedelta(seconds=configured_ns / SECOND_NS) if configured_ns else NODE_LIFETIME
    return max(lifetime, NODE_LIFETIME_MIN)


def renew_window_of(spec: SwarmSpec) -> timedelta:
    """Return the time after its expiry during which the owner of the key may renew a node's certificate."""
    configured_ns = duration_ns(spec.labels.get(RENEW_WINDOW_LABEL, ""))
    return RENEW_WINDOW if configured_ns is None else timedelta(seconds=max(configured_ns, 0) / SECOND_NS)


class Issued(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate that was just signed."""

    identity: NodeIdentity
    availability: Availability
    csr_pem: bytes
    certificate_pem: bytes
    """The certificate chain.  During a rotation, the second certificate is the new root, cross-signed by
    the old one.
    """
    issuer: str
    """Digest of the key that signed the certificate."""
    plane: str = ""
    """Data plane of a joining node."""
    shown: str = ""
    """Serial number of the certificate that authenticated the request."""
    token: str = ""
    """The join token that authenticated the request."""

    @property
    def certificate(self) -> x509.Certificate:
        """The node's own certificate."""
        return x509.load_pem_x509_certificate(self.certificate_pem)


def issued_certificate(
    role: NodeRole,
    certificate: x509.Certificate,
    now: datetime,
    *,
    issuer: str = "",
    plane: str = "",
    before: NodeCertificate | None = None,
) -> NodeCertificate:
    """Return the record, for the node object, of a certificate that was issued at ``now``.

    Args:
        plane: Data plane of the requesting node.  Only the value of the first certificate counts.
        before: Current record, whose unexpired certificates are kept.
    """
    issued = issued_serial(certificate)
    before = before or NodeCertificate()
    serials = [serial for serial in before.serials if unix_ns(serial.not_after) > now.timestamp() * SECOND_NS]
    if role is NodeRole.MANAGER:
        serials.append(issued)
    return NodeCertificate(
        role=role,
        state="issued",
        not_after=issued.not_after,
        issuer=issuer,
        serials=tuple(serials),
        plane=before.plane or plane,
        last_not_after=max(issued.not_after, before.last_not_after),
    )


def issued_serial(certificate: x509.Certificate) -> IssuedSerial:
    """Return the serial number of a certificate, and when it expires."""
    return IssuedSerial(
        serial=f"{certificate.serial_number:x}", not_after=stamp(certificate.not_valid_after_utc)
    )


def record_issue(tx: Transaction, issued: Issued, now: datetime, *, is_renewal: bool) -> None:
    """Create the node object with its first certificate, or update the certificate of an existing one.

    Raises:
        PermissionDenied: The node was removed, or its certificate revoked, in the meantime.
        InvalidArgument: The join token was replaced in the meantime.
        Unavailable: The root was rotated, or the node's role was changed, in the meantime.
        ResourceExhausted: The node has too many certificates as a manager.
    """
    identity = issued.identity
    swarm = tx.rely_on(Swarm, identity.cluster_id, "ca")
    if swarm is None or issuer_digest(swarm.tls_info) != issued.issuer:
        raise Unavailable("the cluster's root has just changed: try again")
    if issued.token and role_of(issued.token, swarm.join_tokens) is not identity.role:
        raise InvalidArgument(_NO_TOKEN)
    if is_foreign(tx.rely_on(Revocation, identity.node_id), issued.shown):
        raise PermissionDenied(
            f"Permission denied: this certificate in the name of node {identity.node_id} does not belong to it"
        )
    node = tx.lookup(Node, identity.node_id)
    if node is not None and node.certificate is not None and node.certificate.role is not identity.role:
        raise Unavailable(f"the role of node {identity.node_id} has just changed: try again")
    certificate = issued_certificate(
        identity.role,
        issued.certificate,
        now,
        issuer=issued.issuer,
        plane=issued.plane,
        before=node.certificate if node is not None else None,
    )
    if len(certificate.serials) > SERIALS_MAX and identity.role is NodeRole.MANAGER:
        raise ResourceExhausted(
            f"node {identity.node_id} cannot get another certificate: it has {SERIALS_MAX} unexpired ones as a manager"
        )
    if node is not None:
        tx.put(msgspec.structs.replace(node, certificate=certificate))
    elif is_renewal:
        raise PermissionDenied(f"Permission denied: node {identity.node_id} is not part of this swarm")
    else:
        spec = NodeSpec(role=identity.role, availability=issued.availability)
        joined = joined_at(tx, int(now.timestamp() * SECOND_NS))
        tx.put(Node(id=identity.node_id, created_at=joined, spec=spec, certificate=certificate))


def stamp(moment: datetime) -> Timestamp:
    """Return a timestamp in seconds.  Later timestamps also compare greater as text."""
    return timestamp(int(moment.astimezone(UTC).timestamp()) * SECOND_NS)
