"""Recovery of a manager whose own certificate expired while it was off.

A single manager has the cluster's key in its store and signs for itself.  If there are several managers, the expired
one cannot reach its store, because the others reject its certificate.  Its node's agent requests a new certificate from
them, and the manager waits for it.
"""

import asyncio
from datetime import timedelta

import structlog

from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.ca.admission import Issued, lifetime_of, record_issue, renewing_identity
from skep.manager.ca.authority import authority_of
from skep.manager.cluster import cluster_of
from skep.manager.nodes.revocation import issue_not_before_s
from skep.model.node import Availability
from skep.model.values.times import moment
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem, signing_request
from skep.security.reloading import KeyPairFiles
from skep.security.trust import issuer_digest, tls_info
from skep.store.interface import Store
from skep.store.kinds import Revocation

log = structlog.get_logger(__name__)

CHECK_EVERY_S = 0.5
"""Seconds between two checks for a renewed certificate."""
WARN_EVERY_S = 60.0
"""Seconds between two warnings while the manager waits."""
AHEAD = timedelta(minutes=5)
"""A certificate that expires within this time counts as expired."""


async def wait_renewed(files: KeyPairFiles, pair: KeyPair, clock: Clock) -> KeyPair:
    """Wait until the key pair is valid.  If it has expired, this node's agent has to renew it."""
    warned_at = -WARN_EVERY_S
    while is_expired(pair, clock):
        if clock.monotonic() - warned_at >= WARN_EVERY_S:
            warned_at = clock.monotonic()
            log.warning(
                "this manager's certificate has expired: waiting for another manager to renew it; if all of them "
                "have expired, run docker swarm init --force-new-cluster on one",
                expired=pair.not_after.isoformat(),
            )
        await clock.sleep(CHECK_EVERY_S)
        try:
            changed = await asyncio.to_thread(files.changed)
        except SkepError as error:
            log.warning("certificate not read, will retry", reason=str(error))
        else:
            pair = changed or pair
    return pair


async def self_renewed(store: Store, pair: KeyPair, files: KeyPairFiles, clock: Clock) -> KeyPair:
    """Return the key pair, or a new one signed with the cluster's key in ``store`` if it has expired.

    Raises:
        PermissionDenied: The node was removed.
        FailedPrecondition: The cluster's key is not in the store.
    """
    if not is_expired(pair, clock):
        return pair
    view = store.view()
    swarm, authority = cluster_of(view), authority_of(view)
    identity = renewing_identity(view, swarm, pair.identity)
    key = await asyncio.to_thread(new_private_key)
    csr_pem = signing_request(key)
    issued = Issued(
        identity=identity,
        availability=Availability.ACTIVE,
        csr_pem=csr_pem,
        certificate_pem=authority.sign(
            csr_pem,
            identity,
            lifetime_of(swarm),
            not_before_s=issue_not_before_s(view.lookup(Revocation, identity.node_id)),
        ),
        issuer=issuer_digest(tls_info(authority.root_pem)),
    )
    await store.update(record_issue, issued, moment(clock.now_ns()), is_renewal=True)
    renewed = KeyPair(
        certificate_pem=issued.certificate_pem, key_pem=private_pem(key), root_pem=pair.root_pem
    )
    await asyncio.to_thread(files.save, renewed)
    log.warning("this manager's certificate had expired and was renewed", expired=pair.not_after.isoformat())
    return renewed


def is_expired(pair: KeyPair, clock: Clock) -> bool:
    """Return whether the key pair has expired or will expire within ``AHEAD``."""
    return moment(clock.now_ns()) >= pair.not_after - AHEAD
