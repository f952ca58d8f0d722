"""Serves the services CA and NodeCA: returns the root, and issues certificates to joining machines and renewing nodes.

Source: swarmkit, ca/server.go.
"""

from collections import OrderedDict
from collections.abc import Sequence
from datetime import datetime
from functools import partial

import structlog

from skep.aio.clock import Clock, SystemClock
from skep.errors import NotFound
from skep.manager.ca.admission import (
    Issued,
    joining_identity,
    record_issue,
    renew_window_of,
    renewing_identity,
)
from skep.manager.ca.authority import root_bundle_of
from skep.manager.ca.signing import CertificateSigner
from skep.manager.cluster import cluster_of
from skep.model.networks.data_planes import DOCKER, SKEP
from skep.model.node import Availability
from skep.model.values.ids import IdSource, NodeId
from skep.model.values.times import moment
from skep.security.expired_renewal import proven_identity
from skep.security.identity import NodeIdentity
from skep.store.interface import Store
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from skep.wire.convert.node import availability_from_pb, role_to_pb
from skep.wire.service import Handler, unary

log = structlog.get_logger(__name__)

_CLOCK = SystemClock()

ISSUED_MAX = 1000
"""Largest number of issued certificates that are kept until they are fetched.  A node fetches its certificate at
once.
"""


class CertificateService:
    """Issues certificates immediately, without a queue or a pending state.

    A signed certificate is kept in memory until the node fetches it from this manager.  If the node connects to another
    manager, or this one has restarted, the node gets NOT_FOUND and requests a new certificate.
    """

    def __init__(
        self, store: Store, new_id: IdSource, signer: CertificateSigner, clock: Clock = _CLOCK
    ) -> None:
        self._store = store
        self._signer = signer
        self._clock = clock
        self._new_id = new_id
        self._issued: OrderedDict[NodeId, Issued] = OrderedDict()

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (
            unary(methods.GET_ROOT_CA_CERTIFICATE, self._root_certificate),
            unary(methods.ISSUE_NODE_CERTIFICATE, partial(self._issue, is_engine=True)),
            unary(methods.SKEP_ISSUE_NODE_CERTIFICATE, partial(self._issue, is_engine=False)),
            unary(methods.NODE_CERTIFICATE_STATUS, self._status),
            unary(methods.RENEW_EXPIRED, self._renew_expired),
        )

    async def _root_certificate(
        self, _request: pb.GetRootCACertificateRequest, _caller: Caller
    ) -> pb.GetRootCACertificateResponse:
        bundle = root_bundle_of(cluster_of(self._store.view()))
        return pb.GetRootCACertificateResponse(certificate=bundle)

    async def _issue(
        self, request: pb.IssueNodeCertificateRequest, caller: Caller, *, is_engine: bool
    ) -> pb.IssueNodeCertificateResponse:
        view = self._store.view()
        swarm = cluster_of(view)
        is_renewal = caller.identity is not None and not request.token
        if caller.identity is not None and is_renewal:
            identity = renewing_identity(view, swarm, caller.identity)
        else:
            identity = joining_identity(swarm, request.token, self._new_id(), is_engine=is_engine)
        availability = availability_from_pb(request.availability)
        plane = DOCKER if is_engine else SKEP
        shown = caller.identity.serial if caller.identity is not None and is_renewal else ""
        token = "" if is_renewal else request.token
        await self._sign(
            identity,
            request.csr,
            caller,
            plane,
            availability,
            is_renewal=is_renewal,
            shown=shown,
            token=token,
        )
        return pb.IssueNodeCertificateResponse(node_id=identity.node_id, node_membership=pb.NodeSpec.ACCEPTED)

    async def _renew_expired(
        self, request: skep.RenewExpiredRequest, caller: Caller
    ) -> skep.RenewExpiredResponse:
        """Issue a certificate to a node whose certificate has expired, if it has the key."""
        view = self._store.view()
        swarm = cluster_of(view)
        proven = proven_identity(
            request.certificate,
            request.csr,
            request.signature,
            root_pem=root_bundle_of(swarm),
            now=self._now(),
            window=renew_window_of(swarm.spec),
        )
        identity = renewing_identity(view, swarm, proven)
        issued = await self._sign(identity, request.csr, caller, SKEP, is_renewal=True, shown=proven.serial)
        return skep.RenewExpiredResponse(
            certificate=issued.certificate_pem, roots=root_bundle_of(cluster_of(self._store.view()))
        )

    async def _sign(
        self,
        identity: NodeIdentity,
        csr_pem: bytes,
        caller: Caller,
        plane: str,
        availability: Availability = Availability.ACTIVE,
        *,
        is_renewal: bool,
        shown: str,
        token: str = "",
    ) -> Issued:
        """Sign the request, record it, and keep the certificate until it is fetched.

        Args: shown, token: See ``Issued``.
        """
        signed = await self._signer.sign(csr_pem, identity)
        issued = Issued(
            identity=identity,
            availability=availability,
            csr_pem=csr_pem,
            certificate_pem=signed.certificate_pem,
            issuer=signed.issuer,
            plane=plane,
            shown=shown,
            token=token,
        )
        await self._store.update(record_issue, issued, self._now(), is_renewal=is_renewal)
        self._keep(issued)
        log.info(
            "certificate issued",
            node=identity.node_id,
            role=identity.role.value,
            renewal=is_renewal,
            peer=caller.address,
        )
        return issued

    async def _status(
        self, request: pb.NodeCertificateStatusRequest, _caller: Caller
    ) -> pb.NodeCertificateStatusResponse:
        issued = self._issued.get(NodeId(request.node_id))
        if issued is None:
            raise NotFound(f"no certificate was issued to node {request.node_id} here")
        status = pb.IssuanceStatus(state=pb.IssuanceStatus.ISSUED)
        return pb.NodeCertificateStatusResponse(
            status=status,
            certificate=pb.Certificate(
                role=role_to_pb(issued.identity.role),
                csr=issued.csr_pem,  # an engine polls until this is the request that it sent
                status=status,
                certificate=issued.certificate_pem,
                cn=issued.identity.node_id,
            ),
        )

    def _now(self) -> datetime:
        return moment(self._clock.now_ns())

    def _keep(self, issued: Issued) -> None:
        self._issued[issued.identity.node_id] = issued
        self._issued.move_to_end(issued.identity.node_id)
        while len(self._issued) > ISSUED_MAX:
            self._issued.popitem(last=False)
