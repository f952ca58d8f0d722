"""Identities in certificates."""

from collections.abc import Mapping
from typing import Any

import msgspec
from cryptography import x509
from cryptography.x509.oid import NameOID

from skep.errors import Unauthenticated
from skep.model.node import NodeRole
from skep.model.values.ids import ClusterId, NodeId

ROOT_NAME = "swarm-ca"
"""Common name of the root, and a manager's server name for nodes without a certificate."""

ROLE_NAMES = {NodeRole.WORKER: "swarm-worker", NodeRole.MANAGER: "swarm-manager"}
"""Organizational unit of each role; ``swarm-manager`` is also the name that nodes verify of their manager."""

_ROLES = {name: role for role, name in ROLE_NAMES.items()}


class NodeIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """A node's id, its cluster and its role, as named in the subject of its certificate (CN, O, OU).

    Source: swarmkit, ca/certificates.go (the subject), design/tls.md.
    """

    node_id: NodeId
    cluster_id: ClusterId
    role: NodeRole
    issued_s: int = 0
    """Unix time at which the certificate was issued, in seconds, or 0 if unknown."""
    serial: str = ""
    """Serial number of the certificate in hexadecimal digits.  Empty if unknown."""


def identity_of(certificate: x509.Certificate) -> NodeIdentity:
    """Return the identity in a certificate's subject.  Raises: Unauthenticated: it is not a node's certificate."""
    subject = {attribute.oid: str(attribute.value) for attribute in certificate.subject}
    return _identity(
        subject.get(NameOID.COMMON_NAME, ""),
        subject.get(NameOID.ORGANIZATION_NAME, ""),
        subject.get(NameOID.ORGANIZATIONAL_UNIT_NAME, ""),
    )


def peer_identity(certificate: Mapping[str, Any]) -> NodeIdentity:
    """Return the identity in a verified certificate, which is a result of ``SSLSocket.getpeercert()``.

    Raises: Unauthenticated.
    """
    subject = {key: value for names in certificate.get("subject", ()) for key, value in names}
    return _identity(
        subject.get("commonName", ""),
        subject.get("organizationName", ""),
        subject.get("organizationalUnitName", ""),
    )


def _identity(common_name: str, organization: str, unit: str) -> NodeIdentity:
    role = _ROLES.get(unit)
    if role is None or not common_name or not organization:
        raise Unauthenticated("the certificate does not name a node of a cluster")
    return NodeIdentity(node_id=NodeId(common_name), cluster_id=ClusterId(organization), role=role)
