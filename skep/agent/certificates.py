"""Requests for the node's certificate to a manager, for joining and for renewal.

Source: swarmkit, ca/certificates.go (GetRemoteCA, RequestAndSaveNewCertificates).
"""

import asyncio
import ssl

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import NEEDS_CERTIFICATE, FailedPrecondition, NotFound, Unavailable, Unimplemented
from skep.model.node import Availability
from skep.security.expired_renewal import proof_of
from skep.security.identity import ROOT_NAME
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem, signing_request
from skep.security.tls import MANAGER_NAME, client_context, joining_context, unverified_context
from skep.security.tokens import check_root, parse_token
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.client import ManagerChannel, open_channel
from skep.wire.convert.node import availability_to_pb

ISSUE_SECONDS_MAX = 20.0
"""Seconds to wait for a certificate, as in Docker when a node joins."""


async def join(
    address: str, token: str, clock: Clock, availability: Availability = Availability.ACTIVE
) -> KeyPair:
    """Ask the manager at ``address`` to accept this machine into its cluster.  The token determines the role.

    Raises:
        InvalidArgument: The token is invalid, or does not belong to this cluster (Docker's words).
        FailedPrecondition: The manager's root differs from the token's.
        Unavailable: No manager responds there.
    """
    root_pem = await fetch_root(address, token)
    context = joining_context(root_pem)
    return await _request(address, context, ROOT_NAME, root_pem, clock, token, availability)


async def fetch_root(address: str, token: str) -> bytes:
    """Return the root bundle of the token's cluster from a manager that is not authenticated yet.

    Raises:
        InvalidArgument, FailedPrecondition, Unavailable: See ``join``.
    """
    expected = parse_token(token)
    try:
        async with open_channel(address, unverified_context(), ROOT_NAME) as channel:
            reply = await channel.call(methods.GET_ROOT_CA_CERTIFICATE, pb.GetRootCACertificateRequest())
    except Unavailable as error:
        if NEEDS_CERTIFICATE not in str(error):
            raise
        # Managers answer this request without one.  Their etcd, at the next port, does not.
        raise Unavailable(f"{error}. Use the port where a manager listens (default: 2377)") from error
    check_root(expected, reply.certificate)
    return reply.certificate


async def renew(address: str, pair: KeyPair, clock: Clock) -> KeyPair:
    """Return a new certificate with a new key for the node of ``pair``.

    Raises:
        PermissionDenied: The node was removed.
        Unavailable: The manager does not respond.
        FailedPrecondition: The response cannot be used.
    """
    return await _request(address, client_context(pair), MANAGER_NAME, pair.root_pem, clock)


async def renew_expired(address: str, pair: KeyPair) -> KeyPair:
    """Return a new certificate with a new key for a node whose certificate in ``pair`` has expired.

    An expired certificate cannot authenticate a connection, so the node sends it and proves that it has the key.

    Raises:
        PermissionDenied: The node was removed, or its certificate expired too long ago.
        Unavailable: The manager does not respond.
        FailedPrecondition: The response cannot be used.
        Unimplemented: The manager is a Docker manager.
    """
    key = await asyncio.to_thread(new_private_key)
    csr = signing_request(key)
    request = skep.RenewExpiredRequest(
        certificate=pair.certificate_pem, csr=csr, signature=proof_of(pair, csr)
    )
    async with open_channel(address, joining_context(pair.root_pem), ROOT_NAME) as channel:
        reply = await channel.call(methods.RENEW_EXPIRED, request, timeout_s=ISSUE_SECONDS_MAX)
    renewed = KeyPair(certificate_pem=reply.certificate, key_pem=private_pem(key), root_pem=reply.roots)
    if renewed.identity.node_id != pair.identity.node_id:
        raise FailedPrecondition(f"{address} issued a certificate for another node")
    return renewed


async def _request(
    address: str,
    context: ssl.SSLContext,
    name: str,
    root_pem: bytes,
    clock: Clock,
    token: str = "",
    availability: Availability = Availability.ACTIVE,
) -> KeyPair:
    key = await asyncio.to_thread(new_private_key)
    csr = signing_request(key)
    async with open_channel(address, context, name) as channel:
        request = pb.IssueNodeCertificateRequest(
            csr=csr, token=token, availability=availability_to_pb(availability)
        )
        try:
            # longer than other calls, because an external authority may have to sign
            reply = await channel.call(
                methods.SKEP_ISSUE_NODE_CERTIFICATE, request, timeout_s=ISSUE_SECONDS_MAX
            )
        except Unimplemented:  # a Docker manager
            reply = await channel.call(methods.ISSUE_NODE_CERTIFICATE, request, timeout_s=ISSUE_SECONDS_MAX)
        try:
            async with asyncio.timeout(ISSUE_SECONDS_MAX):
                certificate_pem = await _wait_issued(channel, reply.node_id, csr, clock)
        except TimeoutError as error:
            raise Unavailable(f"{address} did not issue a certificate in time") from error
    pair = KeyPair(certificate_pem=certificate_pem, key_pem=private_pem(key), root_pem=root_pem)
    if pair.identity.node_id != reply.node_id:
        raise FailedPrecondition(f"{address} issued a certificate for another node")
    return pair


async def _wait_issued(channel: ManagerChannel, node_id: str, csr: bytes, clock: Clock) -> bytes:
    backoff = Backoff()
    while True:
        try:
            reply = await channel.call(
                methods.NODE_CERTIFICATE_STATUS, pb.NodeCertificateStatusRequest(node_id=node_id)
            )
        except NotFound as error:
            raise Unavailable(f"{channel.address} no longer has the certificate: try again") from error
        if reply.status.state == pb.IssuanceStatus.ISSUED and reply.certificate.csr == csr:
            return reply.certificate.certificate
        await backoff.sleep(clock)
