"""A manager whose own certificate expired while it was off.

Alone it has the cluster's key in its store and signs for itself.  Among others it cannot reach its store without
them, and they do not talk to it: its node's agent asks one of them, and the manager waits for that.
"""

import asyncio
from datetime import timedelta

import structlog

from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.ca.admission import Issued, lifetime_of, record_issue, renewing_identity
from skep.manager.ca.authority import authority_of
from skep.manager.cluster import cluster_of
from skep.manager.revocation import issue_not_before_s
from skep.model.node import Availability
from skep.model.times import moment
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem, signing_request
from skep.security.reloading import KeyPairFiles
from skep.security.trust import issuer_digest, tls_info
from skep.store.interface import Store
from skep.store.kinds import Revocation

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 0.5
TELL_EVERY_S = 60.0
AHEAD = timedelta(minutes=5)
"""A certificate that is about to expire is no better."""


async def wait_renewed(files: KeyPairFiles, pair: KeyPair, clock: Clock) -> KeyPair:
    """The key pair once it is valid: at once, or when the agent of this node was given another one."""
    told_at = -TELL_EVERY_S
    while is_expired(pair, clock):
        if clock.monotonic() - told_at >= TELL_EVERY_S:
            told_at = clock.monotonic()
            log.warning(
                "this manager's certificate has expired: waiting for another manager to renew it; if all of them "
                "have expired, run docker swarm init --force-new-cluster on one",
                expired=pair.not_after.isoformat(),
            )
        await clock.sleep(LOOK_EVERY_S)
        try:
            changed = await asyncio.to_thread(files.changed)
        except SkepError as error:
            log.warning("certificate not read yet", error=str(error))
        else:
            pair = changed or pair
    return pair


async def renewed_by_itself(store: Store, pair: KeyPair, files: KeyPairFiles, clock: Clock) -> KeyPair:
    """The key pair, replaced by one that the cluster's key in ``store`` signs if it has expired.

    Raises: PermissionDenied: the node was removed; FailedPrecondition: the cluster's key is not in the store.
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
    """Whether nobody takes it any more, or will in a moment."""
    return moment(clock.now_ns()) >= pair.not_after - AHEAD
