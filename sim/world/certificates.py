"""Roots and certificates in a simulated cluster, whose nodes check them while the root is rotated.

Roots are real, because managers keep them in the store and compare them.  A node's certificate has only the parts that
decide about trust: the root that issued it, and the root that has cross-signed the issuer.
"""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec.structs import replace

from sim.world.links import Machine
from skep.errors import Unavailable
from skep.manager.ca.updater import trusted_roots
from skep.model.node import Node
from skep.model.swarm import Swarm
from skep.model.values.ids import NodeId
from skep.model.values.meta import TLSInfo
from skep.security.authority import Authority
from skep.security.identity import ROOT_NAME
from skep.security.trust import tls_info
from skep.store.interface import Transaction, View
from skep.store.kinds import ROOT_KEY_ID, Payload

_FOUNDED = datetime(2023, 11, 1, tzinfo=UTC)
_YEARS = timedelta(days=20 * 365)


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """A node's certificate, with the roots that the node trusts."""

    issuer: str
    """Root (PEM) that issued it."""
    vouched_by: str = ""
    """Root that has cross-signed the issuer.  Empty outside a rotation."""
    trusted: str = ""

    @property
    def tls_info(self) -> TLSInfo:
        """Return the node's report of its certificate."""
        return replace(tls_info(self.issuer.encode()), trust_root=self.trusted)


@lru_cache(maxsize=64)
def root(number: int) -> Authority:
    """Return the root with this number.

    It is the same in each run, because its size affects the reports that contain it.
    """
    key = ec.derive_private_key(number + 1, ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, ROOT_NAME)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(number + 1)
        .not_valid_before(_FOUNDED)
        .not_valid_after(_FOUNDED + _YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Authority(key, builder.sign(key, hashes.SHA256(), ecdsa_deterministic=True))


def first_certificate() -> Certificate:
    """Return the certificate of a machine of a new cluster."""
    text = root(0).root_pem.decode()
    return Certificate(issuer=text, trusted=text)


def found(tx: Transaction) -> None:
    """Create the first root of a new cluster, and issue certificates to its managers."""
    (swarm,) = tx.find(Swarm)
    first = root(0)
    tx.put(replace(swarm, tls_info=tls_info(first.root_pem)))
    tx.put(Payload(id=ROOT_KEY_ID, data=first.key_pem))
    for node in tx.find(Node):
        description = replace(node.description, tls_info=_reported(tls_info(first.root_pem)))
        tx.put(replace(node, description=description))


def issue(tx: Transaction) -> Certificate | None:
    """Issue a certificate to a node.  Return None if the cluster has no root.

    The root is compared at the commit, as by ``manager.ca.admission.record_issue``.

    Raises: Unavailable: the cluster's settings cannot be read.
    """
    if not (found := tx.find(Swarm)):
        raise Unavailable("this manager cannot read the cluster's settings")
    swarm = tx.rely_on(Swarm, found[0].id, "ca") or found[0]
    rotation, present = swarm.rotation, swarm.tls_info.trust_root
    if not present:
        return None
    if rotation is None:
        return Certificate(issuer=present, trusted=present)
    return Certificate(issuer=rotation.root, vouched_by=present, trusted=present)


def describe(tx: Transaction, id: NodeId, certificate: Certificate) -> None:
    """Write the certificate into the description of a machine that runs only a manager.  In the simulation, such a
    machine has no agent.
    """
    if (node := tx.lookup(Node, id)) is not None:
        description = replace(node.description, tls_info=_reported(certificate.tls_info))
        tx.put(replace(node, description=description))


def _reported(info: TLSInfo) -> TLSInfo:
    """Return a manager's report.  A manager takes trusted roots from its store, so it never misses any."""
    return replace(info, trust_root="")


class Certificates:
    """The certificate of each machine, kept over restarts of its processes."""

    def __init__(self) -> None:
        self.held: dict[Machine, Certificate] = {}
        """Certificate of each machine.  Empty in a cluster without roots, where all machines trust each other."""
        self.changed: dict[Machine, asyncio.Event] = {}
        """Set when a node has a new certificate or new roots, so that it reports them."""

    def take(self, id: NodeId, issued: Certificate) -> None:
        """Set a node's new certificate, and keep the roots that the node trusts."""
        known = self.held.get(id)
        self.held[id] = issued if known is None else replace(issued, trusted=known.trusted)
        self._changed(id)

    def trust(self, id: NodeId, roots: str) -> None:
        """Set the roots that a manager has sent to a node."""
        known = self.held.get(id)
        if known is not None and roots and known.trusted != roots:
            self.held[id] = replace(known, trusted=roots)
            self._changed(id)

    def _changed(self, id: NodeId) -> None:
        if id in self.changed:
            self.changed[id].set()

    def accepts(self, source: Machine, target: Machine, view_of: Callable[[Machine], View | None]) -> bool:
        """Return whether two ends of a connection trust each other.

        Args:
            view_of: returns the view of a manager that runs, or None for other machines.
        """
        caller, manager = self.held.get(source), self.held.get(target)
        if caller is None or manager is None:
            return True
        return _is_trusted(caller, self._roots_of(target, view_of(target))) and _is_trusted(
            manager, self._roots_of(source, view_of(source))
        )

    def _roots_of(self, id: Machine, view: View | None) -> str:
        """Return the roots that a machine trusts.  A manager reads them in its store, and keeps them for its next
        start.
        """
        swarms = view.find(Swarm) if view is not None else []
        if swarms and swarms[0].tls_info.trust_root:
            self.trust(NodeId(id), swarms[0].tls_info.trust_root)
            return trusted_roots(swarms[0]).decode()
        return self.held[id].trusted


def _is_trusted(certificate: Certificate, roots: str) -> bool:
    return certificate.issuer in roots or (bool(certificate.vouched_by) and certificate.vouched_by in roots)
