"""Signs nodes' certificates, with the root's key or by calling an external authority.

Any manager accepts requests.  Only the leader calls external authorities.  The other managers relay requests to the
leader, so its limits and backoff apply to the whole cluster.
"""

from collections.abc import Callable, Sequence
from datetime import datetime

import msgspec
import structlog
from cryptography import x509

from skep.aio.clock import Clock
from skep.errors import Unavailable
from skep.manager.ca.admission import lifetime_of
from skep.manager.ca.authority import authority_of
from skep.manager.ca.external import ALL_S, ExternalAuthorities
from skep.manager.cluster import cluster_of
from skep.manager.nodes.revocation import issue_not_before_s
from skep.model.swarm import Swarm
from skep.model.values.ids import NodeId
from skep.model.values.times import moment
from skep.security.authority import pem, requested_key
from skep.security.external import checked_node_certificate, node_request, signing_urls
from skep.security.identity import NodeIdentity
from skep.security.trust import issuer_digest, tls_info
from skep.store.interface import Store, View
from skep.store.kinds import Revocation
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.client import ManagerChannel
from skep.wire.convert.node import role_from_pb, role_to_pb
from skep.wire.service import Handler, unary


class Signed(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate chain (PEM), and the digest of the key that signed it."""

    certificate_pem: bytes
    issuer: str


log = structlog.get_logger(__name__)

RELAY_S = ALL_S + 2.0
"""Seconds to wait for the leader, which itself waits ``ALL_S`` for the external authorities."""


class CertificateSigner:
    """Signs nodes' certificates for ``CertificateService``.

    Args:
        own: This manager's node.
        channel: Returns the link to another manager.
    """

    def __init__(
        self,
        store: Store,
        own: NodeId,
        external: ExternalAuthorities,
        channel: Callable[[NodeId], ManagerChannel],
        clock: Clock,
    ) -> None:
        self._store = store
        self._own = own
        self._external = external
        self._channel = channel
        self._clock = clock

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (unary(methods.SIGN_EXTERNALLY, self.sign_for_manager),)

    async def sign(self, csr_pem: bytes, identity: NodeIdentity) -> Signed:
        """Return a certificate of ``identity`` for the key in a request.

        Raises:
            InvalidArgument: The request is invalid.
            Unavailable: No external authority has signed it.
        """
        view = self._store.view()
        swarm = cluster_of(view)
        key = requested_key(csr_pem)
        if not signing_urls(swarm):
            authority = authority_of(view)
            certificate_pem = authority.issue(
                key, identity, lifetime_of(swarm), not_before_s=_not_before_s(view, identity)
            )
            return Signed(certificate_pem=certificate_pem, issuer=issuer_digest(tls_info(authority.root_pem)))
        leader = self._store.leader
        if leader is None:
            raise Unavailable("the cluster has no leader to call the external CA: try again")
        if leader == self._own:
            return await self._sign_externally(csr_pem, identity)
        request = skep.SignExternallyRequest(
            csr=csr_pem, node_id=identity.node_id, role=role_to_pb(identity.role)
        )
        reply = await self._channel(leader).call(methods.SIGN_EXTERNALLY, request, timeout_s=RELAY_S)
        # During a change of the root, the leader's state may be older than this manager's.
        checked_node_certificate(
            x509.load_pem_x509_certificate(reply.certificate),
            key,
            identity,
            _issuer(swarm),
            self._now(),
            not_before_s=_not_before_s(view, identity),
        )
        return Signed(certificate_pem=reply.certificate, issuer=issuer_digest(swarm.tls_info))

    async def sign_for_manager(
        self, request: skep.SignExternallyRequest, caller: Caller
    ) -> skep.SignExternallyResponse:
        if self._store.leader != self._own:
            raise Unavailable("this manager is no longer the leader, which calls the external CA: try again")
        identity = NodeIdentity(
            node_id=NodeId(request.node_id),
            cluster_id=cluster_of(self._store.view()).id,
            role=role_from_pb(request.role),
        )
        signed = await self._sign_externally(request.csr, identity)
        log.info("certificate signed for another manager", node=identity.node_id, manager=caller.node_id)
        return skep.SignExternallyResponse(certificate=signed.certificate_pem)

    async def _sign_externally(self, csr_pem: bytes, identity: NodeIdentity) -> Signed:
        view = self._store.view()
        swarm, key = cluster_of(view), requested_key(csr_pem)
        present, rotation = swarm.tls_info.trust_root, swarm.rotation
        issuer = _issuer(swarm)
        certificate = await self._external.sign(
            signing_urls(swarm),
            node_request(csr_pem, identity),
            (present + (rotation.root if rotation else "")).encode(),
            lambda found: checked_node_certificate(
                found, key, identity, issuer, self._now(), not_before_s=_not_before_s(view, identity)
            ),
        )
        chain = pem(certificate) + (rotation.cross_signed.encode() if rotation else b"")
        return Signed(certificate_pem=chain, issuer=issuer_digest(swarm.tls_info))

    def _now(self) -> datetime:
        return moment(self._clock.now_ns())


def _issuer(swarm: Swarm) -> x509.Certificate:
    """Return the root with whose key certificates are signed now."""
    rotation = swarm.rotation
    return x509.load_pem_x509_certificate(
        (rotation.root if rotation is not None else swarm.tls_info.trust_root).encode()
    )


def _not_before_s(view: View, identity: NodeIdentity) -> int:
    return issue_not_before_s(view.lookup(Revocation, identity.node_id))
