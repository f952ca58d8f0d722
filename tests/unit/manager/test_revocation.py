"""Records of certificates that count for nothing."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import PermissionDenied
from skep.manager.ca.admission import issued_certificate, stamp
from skep.manager.ca.standing import require_standing
from skep.manager.revocation import expired, forget, revoke
from skep.model.ids import ClusterId, NodeId
from skep.model.node import Node, NodeRole
from skep.model.times import SECOND_NS
from skep.security.authority import Authority
from skep.security.crl import revocation_list
from skep.security.identity import Identity
from skep.security.keys import new_private_key
from skep.store.kinds import Revocation
from skep.store.memory import MemoryStore
from skep.store.proposal import Proposal
from skep.wire.methods import Access

NOW = datetime.now(UTC)
NOW_NS = int(NOW.timestamp()) * SECOND_NS
ROOT = Authority.create()
MANAGER = Identity(node_id=NodeId("m1"), cluster_id=ClusterId("c"), role=NodeRole.MANAGER)


def a_certificate(role: NodeRole, days: int = 90) -> x509.Certificate:
    identity = Identity(node_id=NodeId("m1"), cluster_id=ClusterId("c"), role=role)
    chain = ROOT.issue(new_private_key().public_key(), identity, timedelta(days=days))
    return x509.load_pem_x509_certificate(chain)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(SystemClock())


def test_a_managers_certificates_are_remembered_until_they_expire_and_a_workers_are_not():
    first, second = a_certificate(NodeRole.MANAGER, 1), a_certificate(NodeRole.MANAGER)
    known = issued_certificate(NodeRole.MANAGER, first, NOW)
    known = issued_certificate(NodeRole.MANAGER, second, NOW, before=known)
    assert [int(one.serial, 16) for one in known.serials] == [first.serial_number, second.serial_number]
    known = issued_certificate(
        NodeRole.WORKER, a_certificate(NodeRole.WORKER), NOW + timedelta(days=2), before=known
    )
    assert [int(one.serial, 16) for one in known.serials] == [second.serial_number]


def test_a_shorter_life_does_not_make_older_certificates_forgotten():
    long = a_certificate(NodeRole.WORKER, 90)
    known = issued_certificate(NodeRole.WORKER, long, NOW)
    known = issued_certificate(NodeRole.WORKER, a_certificate(NodeRole.WORKER, 1), NOW, before=known)
    assert known.last_not_after == stamp(long.not_valid_after_utc)
    assert known.not_after < known.last_not_after


async def test_a_record_lives_as_long_as_the_last_certificate(store):
    certificate = issued_certificate(NodeRole.MANAGER, a_certificate(NodeRole.MANAGER), NOW)
    node = Node(id=NodeId("m1"), certificate=certificate)
    await store.update(lambda tx: revoke(tx, node, NOW_NS, is_removed=True))
    (record,) = store.view().find(Revocation)
    assert record.until == certificate.last_not_after
    assert expired([record], NOW_NS + 89 * 24 * 3600 * SECOND_NS) == []
    assert expired([record], NOW_NS + 91 * 24 * 3600 * SECOND_NS) == [record]
    await store.update(forget, record)
    assert not store.view().find(Revocation)


async def test_a_demotion_that_becomes_a_removal_keeps_what_was_taken_back(store):
    certificate = issued_certificate(NodeRole.MANAGER, a_certificate(NodeRole.MANAGER), NOW)
    await store.update(
        lambda tx: revoke(tx, Node(id=NodeId("m1"), certificate=certificate), NOW_NS, is_removed=False)
    )
    worker = issued_certificate(NodeRole.WORKER, a_certificate(NodeRole.WORKER), NOW)
    await store.update(
        lambda tx: revoke(tx, Node(id=NodeId("m1"), certificate=worker), NOW_NS, is_removed=True)
    )
    (record,) = store.view().find(Revocation)
    assert record.is_removed
    assert record.serials == certificate.serials


@pytest.mark.parametrize(
    ("role", "access", "passes"),
    [
        (NodeRole.MANAGER, Access.MANAGER, True),
        (NodeRole.WORKER, Access.MANAGER, False),
        (NodeRole.WORKER, Access.NODE, True),
    ],
)
async def test_a_certificate_counts_for_the_role_that_the_cluster_says(store, role, access, passes):
    """The certificate says manager each time."""
    certificate = issued_certificate(role, a_certificate(NodeRole.MANAGER), NOW)
    await store.update(lambda tx: tx.put(Node(id=NodeId("m1"), certificate=certificate)))
    if passes:
        require_standing(store.view(), MANAGER, access)
    else:
        with pytest.raises(PermissionDenied, match="is not a manager"):
            require_standing(store.view(), MANAGER, access)


def test_a_manager_that_this_replica_does_not_know_yet_passes(store):
    require_standing(store.view(), MANAGER, Access.MANAGER)


async def test_a_removal_that_cannot_be_read_counts(store):
    """Of a node that is still there it can only be about the certificates of a former manager."""
    for key in ("o/revocation/m1", "o/revocation/m2"):
        store.cluster.commit(Proposal(puts=((key, b"?"),)), None)
    await store.update(lambda tx: tx.put(Node(id=NodeId("m2"))))
    view = store.view()
    with pytest.raises(PermissionDenied):
        require_standing(view, MANAGER, Access.NODE)
    require_standing(view, replace(MANAGER, node_id=NodeId("m2")), Access.NODE)


def test_the_list_for_etcd_holds_the_serial_numbers():
    serials = [f"{a_certificate(NodeRole.MANAGER).serial_number:x}" for _ in range(3)]
    crl = x509.load_der_x509_crl(revocation_list(serials))
    assert {f"{one.serial_number:x}" for one in crl} == set(serials)
    assert list(x509.load_der_x509_crl(revocation_list([]))) == []
