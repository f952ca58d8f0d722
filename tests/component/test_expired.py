"""A machine that was off for longer than its certificate lives.

Certificates are issued in the past; no clock is set.
"""

from datetime import timedelta
from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.agent.certificates import renew, renew_expired
from skep.errors import PermissionDenied, Unavailable
from skep.manager.control.nodes import remove_node
from skep.model.node import Node, NodeRole
from skep.model.swarm import RENEW_WINDOW_LABEL
from skep.model.values.ids import new_id
from skep.model.values.times import SECOND_NS
from skep.security import keypair
from skep.security.authority import Authority
from skep.security.expired_renewal import proof_of
from skep.security.identity import NodeIdentity
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem, signing_request
from skep.security.tls import joining_context
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import open_channel
from tests.support.managers.wire_rig import CLOCK, Cluster, a_worker, an_agent, pair_of, put


class Earlier:
    """A clock that is behind."""

    def __init__(self, by: timedelta) -> None:
        self._by_ns = int(by.total_seconds()) * SECOND_NS

    def now_ns(self) -> int:
        return CLOCK.now_ns() - self._by_ns

    def monotonic(self) -> float:
        return CLOCK.monotonic()

    async def sleep(self, seconds: float) -> None:
        await CLOCK.sleep(seconds)


@pytest.fixture
async def cluster():
    async with Cluster(heartbeat_s=3).serving() as serving:
        yield serving


def expired(
    cluster: Cluster, identity: NodeIdentity, *, days_ago: float, authority: Authority | None = None
) -> KeyPair:
    """A key pair of ``identity`` whose certificate lived for a day and expired ``days_ago``."""
    issuer = authority or cluster.authority
    then = Authority.load(issuer.key_pem, issuer.root_pem, Earlier(timedelta(days=days_ago + 1)))
    key = new_private_key()
    return KeyPair(
        certificate_pem=then.issue(key.public_key(), identity, timedelta(days=1)),
        key_pem=private_pem(key),
        root_pem=cluster.authority.root_pem,
    )


async def a_node_off_for(cluster: Cluster, directory: Path, days: float) -> KeyPair:
    pair = await a_worker(cluster, directory)
    pair = expired(cluster, pair.identity, days_ago=days)
    keypair.save(pair, directory)
    return pair


async def test_an_expired_certificate_makes_no_connection(cluster, tmp_path):
    pair = await a_node_off_for(cluster, tmp_path, days=10)
    with pytest.raises(Unavailable):
        await renew(cluster.address, pair, CLOCK)


async def test_a_known_node_comes_back_by_itself_within_the_window(cluster, tmp_path):
    pair = await a_node_off_for(cluster, tmp_path, days=10)
    async with an_agent(cluster, pair, tmp_path) as (agent, _):
        renewed = pair_of(agent)
        assert renewed.identity == pair.identity
        assert renewed.not_after > pair.not_after + timedelta(days=11)
        assert keypair.load(tmp_path).certificate_pem == renewed.certificate_pem


async def test_after_the_renewal_window_the_error_says_what_to_do(cluster, tmp_path):
    pair = await a_node_off_for(cluster, tmp_path, days=31)
    with pytest.raises(PermissionDenied, match="leave the swarm and join it again"):
        await renew_expired(cluster.address, pair)


@pytest.mark.parametrize(
    ("window", "days", "is_taken"), [("2400h", 60, True), ("1h", 1, False), ("0", 0.5, False)]
)
async def test_the_window_is_a_label_of_the_cluster(cluster, tmp_path, window, days, is_taken):
    swarm = cluster.swarm
    await put(cluster, replace(swarm, spec=replace(swarm.spec, labels={RENEW_WINDOW_LABEL: window})))
    pair = await a_node_off_for(cluster, tmp_path, days=days)
    if is_taken:
        assert (await renew_expired(cluster.address, pair)).identity == pair.identity
    else:
        with pytest.raises(PermissionDenied, match="longer ago than this swarm lets nodes renew"):
            await renew_expired(cluster.address, pair)


async def test_a_removed_node_does_not_come_back(cluster, tmp_path):
    pair = await a_node_off_for(cluster, tmp_path, days=10)
    await cluster.store.update(remove_node, pair.identity.node_id, force=True, now_ns=CLOCK.now_ns())
    with pytest.raises(PermissionDenied, match="not part of this swarm"):
        await renew_expired(cluster.address, pair)


async def test_the_role_is_what_the_cluster_says_not_the_old_certificate(cluster, tmp_path):
    worker = await a_worker(cluster, tmp_path)
    claimed = NodeIdentity(node_id=worker.identity.node_id, cluster_id=cluster.id, role=NodeRole.MANAGER)
    pair = expired(cluster, claimed, days_ago=10)
    assert (await renew_expired(cluster.address, pair)).identity.role is NodeRole.WORKER


async def test_a_renewal_without_the_key_is_refused(cluster, tmp_path):
    """The certificate itself is public: every manager's is seen in a handshake."""
    pair = await a_node_off_for(cluster, tmp_path, days=10)
    key = new_private_key()
    csr = signing_request(key)
    thief = expired(cluster, pair.identity, days_ago=10)
    forged = proof_of(thief, csr)
    replayed = proof_of(pair, signing_request(new_private_key()))
    async with open_channel(cluster.address, joining_context(pair.root_pem), "swarm-ca") as channel:
        for signature in (b"", forged, replayed):
            request = skep.RenewExpiredRequest(certificate=pair.certificate_pem, csr=csr, signature=signature)
            with pytest.raises(PermissionDenied, match="does not belong to the caller"):
                await channel.call(methods.RENEW_EXPIRED, request)
        for certificate in (b"", b"nonsense", cluster.authority.root_pem):
            request = skep.RenewExpiredRequest(certificate=certificate, csr=csr, signature=forged)
            with pytest.raises(PermissionDenied):
                await channel.call(methods.RENEW_EXPIRED, request)


async def test_a_certificate_of_another_root_is_refused(cluster, tmp_path):
    worker = await a_worker(cluster, tmp_path)
    pair = expired(cluster, worker.identity, days_ago=10, authority=Authority.create())
    with pytest.raises(PermissionDenied, match="not issued by this swarm"):
        await renew_expired(cluster.address, pair)


async def test_a_node_of_another_cluster_under_the_same_root_is_refused(cluster, tmp_path):
    identity = NodeIdentity(node_id=new_id(), cluster_id="another", role=NodeRole.WORKER)
    with pytest.raises(PermissionDenied, match="not part of this swarm"):
        await renew_expired(cluster.address, expired(cluster, identity, days_ago=10))
    assert len(cluster.view.find(Node)) == 1
