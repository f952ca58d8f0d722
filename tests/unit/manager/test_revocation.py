"""Records of certificates that count for nothing."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import PermissionDenied, ResourceExhausted, Unavailable
from skep.manager.ca.admission import SERIALS_MAX, Issued, issued_certificate, record_issue, stamp
from skep.manager.ca.caller_check import UNKNOWN_MAX, UNKNOWN_S, CallerCheck, check_caller
from skep.manager.membership.manager_changes import set_certificate_role
from skep.manager.nodes.revocation import expired, forget, issue_not_before_s, revoke
from skep.model.node import Availability, Node, NodeRole, NodeSpec
from skep.model.swarm import Swarm
from skep.model.values.ids import ClusterId, NodeId
from skep.model.values.times import SECOND_NS
from skep.security.authority import BACKDATE, Authority
from skep.security.crl import revocation_list
from skep.security.identity import NodeIdentity
from skep.security.keys import new_private_key
from skep.security.trust import issuer_digest, tls_info
from skep.store.kinds import Revocation
from skep.store.memory import MemoryStore
from skep.store.transactions.proposal import Proposal
from skep.wire.methods import MethodAccess

NOW = datetime.now(UTC)
NOW_NS = int(NOW.timestamp()) * SECOND_NS
ROOT = Authority.create()
MANAGER = NodeIdentity(node_id=NodeId("m1"), cluster_id=ClusterId("c"), role=NodeRole.MANAGER)


def a_certificate(role: NodeRole, days: int = 90) -> x509.Certificate:
    identity = NodeIdentity(node_id=NodeId("m1"), cluster_id=ClusterId("c"), role=role)
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
    """The newest certificate may expire before an older one."""
    long = issued_certificate(NodeRole.MANAGER, a_certificate(NodeRole.MANAGER, 90), NOW)
    short = a_certificate(NodeRole.MANAGER, 1)
    certificate = issued_certificate(NodeRole.MANAGER, short, NOW, before=long)
    node = Node(id=NodeId("m1"), certificate=certificate)
    await store.update(lambda tx: revoke(tx, node, NOW_NS, is_removed=True))
    (record,) = store.view().find(Revocation)
    assert record.until == long.not_after
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
        (NodeRole.MANAGER, MethodAccess.MANAGER, True),
        (NodeRole.WORKER, MethodAccess.MANAGER, False),
        (NodeRole.WORKER, MethodAccess.NODE, True),
    ],
)
async def test_a_certificate_counts_for_the_role_that_the_cluster_says(store, role, access, passes):
    """The certificate says manager each time."""
    certificate = issued_certificate(role, a_certificate(NodeRole.MANAGER), NOW)
    await store.update(lambda tx: tx.put(Node(id=NodeId("m1"), certificate=certificate)))
    if passes:
        check_caller(store.view(), MANAGER, access)
    else:
        with pytest.raises(PermissionDenied, match="is not a manager"):
            check_caller(store.view(), MANAGER, access)


class Times:
    """A manager's monotonic clock, and whether it is in contact with the others."""

    now = 100.0
    is_current = True


@pytest.fixture
def times() -> Times:
    return Times()


@pytest.fixture
def standing(store, times) -> CallerCheck:
    return CallerCheck(store.view, lambda: times.is_current, lambda: times.now)


def test_a_manager_that_is_not_known_does_nothing_that_only_managers_may(standing, times):
    """At first it may have come in through another manager; later it was minted with a stolen root key."""
    with pytest.raises(Unavailable, match="not known to this manager yet"):
        standing.require(MANAGER, MethodAccess.MANAGER)
    times.now += UNKNOWN_S + 0.1
    with pytest.raises(PermissionDenied, match="not part of the swarm"):
        standing.require(MANAGER, MethodAccess.MANAGER)


async def test_a_node_that_came_in_elsewhere_passes_for_a_few_seconds_and_then_if_it_is_known(
    standing, times, store
):
    standing.require(MANAGER, MethodAccess.NODE)
    times.now += UNKNOWN_S + 0.1
    with pytest.raises(PermissionDenied):
        standing.require(MANAGER, MethodAccess.NODE)
    await store.update(lambda tx: tx.put(Node(id=NodeId("m1"))))
    standing.require(MANAGER, MethodAccess.NODE)


def test_a_manager_that_was_cut_off_gives_what_it_does_not_know_its_time_anew(standing, times):
    standing.require(MANAGER, MethodAccess.NODE)
    times.is_current = False
    times.now += 60
    with pytest.raises(Unavailable, match="lost contact"):
        standing.require(MANAGER, MethodAccess.NODE)
    times.is_current = True
    standing.require(MANAGER, MethodAccess.NODE)


def test_unknown_nodes_fill_no_memory(standing):
    for number in range(UNKNOWN_MAX + 10):
        standing.require(replace(MANAGER, node_id=NodeId(f"n{number}")), MethodAccess.NODE)
    assert len(standing.unknown) == UNKNOWN_MAX


async def test_certificates_from_before_a_demotion_count_for_nothing_after_the_next_promotion(store):
    """Whichever they are: by node and time, not by serial numbers that were remembered."""
    demoted_s = NOW_NS // SECOND_NS
    certificate = issued_certificate(NodeRole.MANAGER, a_certificate(NodeRole.MANAGER), NOW)
    node = Node(id=NodeId("m1"), certificate=certificate)
    await store.update(lambda tx: revoke(tx, node, NOW_NS, is_removed=False))
    await store.update(lambda tx: tx.put(node))  # it is a manager again
    for issued_s in (demoted_s - 3600, demoted_s):
        with pytest.raises(PermissionDenied, match="revoked"):
            check_caller(store.view(), replace(MANAGER, issued_s=issued_s), MethodAccess.MANAGER)
    known = replace(MANAGER, issued_s=demoted_s + 3600, serial=certificate.serials[0].serial)
    with pytest.raises(PermissionDenied, match="revoked"):  # an external authority's clock may be ahead
        check_caller(store.view(), known, MethodAccess.MANAGER)
    earliest_s = issue_not_before_s(store.view().lookup(Revocation, "m1"))
    assert check_caller(store.view(), replace(MANAGER, issued_s=earliest_s), MethodAccess.MANAGER)


def test_an_issuer_whose_clock_is_behind_issues_nothing_that_is_taken_back_already():
    ahead_s = int(datetime.now(UTC).timestamp()) + 600
    chain = ROOT.issue(new_private_key().public_key(), MANAGER, not_before_s=ahead_s)
    certificate = x509.load_pem_x509_certificate(chain)
    assert int((certificate.not_valid_before_utc + BACKDATE).timestamp()) == ahead_s


async def test_no_certificate_as_a_manager_is_ever_forgotten_before_it_expires(store):
    """However often a manager renews: what is not on etcd's list is taken there."""
    swarm = Swarm(id=ClusterId("c"), tls_info=tls_info(ROOT.root_pem))
    await store.update(lambda tx: tx.put(swarm))
    certificates = [a_certificate(NodeRole.MANAGER, 1) for _ in range(2)]
    held = issued_certificate(NodeRole.MANAGER, certificates[0], NOW)
    many = replace(held, serials=held.serials * (SERIALS_MAX - 1))
    await store.update(lambda tx: tx.put(Node(id=NodeId("m1"), certificate=many)))

    def issued() -> Issued:
        return Issued(
            identity=MANAGER,
            availability=Availability.ACTIVE,
            csr_pem=b"",
            certificate_pem=certificates[1].public_bytes(Encoding.PEM),
            issuer=issuer_digest(swarm.tls_info),
        )

    await store.update(record_issue, issued(), NOW, is_renewal=True)
    with pytest.raises(ResourceExhausted, match="unexpired ones"):
        await store.update(record_issue, issued(), NOW, is_renewal=True)
    node = store.view().get(Node, NodeId("m1"))
    assert len(node.certificate.serials) == SERIALS_MAX
    assert node.certificate.serials[0] == held.serials[0]
    await store.update(record_issue, issued(), NOW + timedelta(days=2), is_renewal=True)


@pytest.mark.parametrize("changed", [NodeRole.WORKER, NodeRole.MANAGER])
async def test_a_certificate_of_the_role_that_a_node_had_when_it_was_signed_is_not_recorded(store, changed):
    """An external authority may take seconds, and the node may be demoted or promoted meanwhile."""
    before = NodeRole.MANAGER if changed is NodeRole.WORKER else NodeRole.WORKER
    swarm = Swarm(id=ClusterId("c"), tls_info=tls_info(ROOT.root_pem))
    held = issued_certificate(before, a_certificate(before), NOW)
    node = Node(id=NodeId("m1"), spec=NodeSpec(role=changed), certificate=held)
    await store.update(lambda tx: [tx.put(one) for one in (swarm, node)])
    late = Issued(
        identity=replace(MANAGER, role=before),
        availability=Availability.ACTIVE,
        csr_pem=b"",
        certificate_pem=a_certificate(before).public_bytes(Encoding.PEM),
        issuer=issuer_digest(swarm.tls_info),
    )
    await store.update(set_certificate_role, node.id, changed, NOW_NS)
    with pytest.raises(Unavailable, match="role of node m1 has just changed"):
        await store.update(record_issue, late, NOW, is_renewal=True)
    certificate = store.view().get(Node, node.id).certificate
    assert (certificate.role, certificate.state) == (changed, "rotate")


async def test_a_removal_that_cannot_be_read_counts(store):
    """Of a node that is still there it can only be about the certificates of a former manager."""
    for key in ("o/revocation/m1", "o/revocation/m2"):
        store.cluster.commit(Proposal(puts=((key, b"?"),)), None)
    await store.update(lambda tx: tx.put(Node(id=NodeId("m2"))))
    view = store.view()
    with pytest.raises(PermissionDenied):
        check_caller(view, MANAGER, MethodAccess.NODE)
    check_caller(view, replace(MANAGER, node_id=NodeId("m2")), MethodAccess.NODE)


def test_the_list_for_etcd_holds_the_serial_numbers():
    serials = [f"{a_certificate(NodeRole.MANAGER).serial_number:x}" for _ in range(3)]
    crl = x509.load_der_x509_crl(revocation_list(serials))
    assert {f"{one.serial_number:x}" for one in crl} == set(serials)
    assert list(x509.load_der_x509_crl(revocation_list([]))) == []
