"""What certificates look like: engines accept exactly this."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition, InvalidArgument, Unauthenticated
from skep.model.node import NodeRole
from skep.model.values.ids import ClusterId, NodeId
from skep.model.values.times import SECOND_NS
from skep.security.authority import Authority
from skep.security.identity import NodeIdentity, identity_of
from skep.security.keys import new_private_key, signing_request

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


class AtNoon(SystemClock):
    """A clock that shows ``NOW``."""

    def now_ns(self) -> int:
        return int(NOW.timestamp()) * SECOND_NS


WORKER = NodeIdentity(node_id=NodeId("n1"), cluster_id=ClusterId("c1"), role=NodeRole.WORKER)
MANAGER = NodeIdentity(node_id=NodeId("m1"), cluster_id=ClusterId("c1"), role=NodeRole.MANAGER)


@pytest.fixture(scope="module")
def authority():
    return Authority.create(AtNoon())


def issued(authority: Authority, identity: NodeIdentity, **more: object) -> x509.Certificate:
    csr = signing_request(new_private_key())
    return x509.load_pem_x509_certificate(authority.sign(csr, identity, **more))


def names(certificate: x509.Certificate) -> list[str]:
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return extension.value.get_values_for_type(x509.DNSName)


def test_the_root_signs_itself_for_twenty_years(authority):
    root = x509.load_pem_x509_certificate(authority.root_pem)
    assert root.subject.rfc4514_string() == root.issuer.rfc4514_string() == "CN=swarm-ca"
    assert root.not_valid_after_utc - NOW == timedelta(days=7300)
    basic = root.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert basic.value.ca
    usage = root.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert usage.value.crl_sign
    root.verify_directly_issued_by(root)


def test_a_workers_certificate_names_node_role_and_cluster(authority):
    certificate = issued(authority, WORKER)
    assert identity_of(certificate) == WORKER
    assert certificate.subject.rfc4514_string() == "CN=n1,OU=swarm-worker,O=c1"
    assert names(certificate) == ["swarm-worker", "n1"]
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.root_pem))


def test_a_manager_also_answers_for_the_authority(authority):
    assert names(issued(authority, MANAGER)) == ["swarm-manager", "m1", "swarm-ca"]


def test_a_certificate_starts_an_hour_ago_and_lasts_ninety_days(authority):
    certificate = issued(authority, WORKER)
    assert NOW - certificate.not_valid_before_utc == timedelta(hours=1)
    assert certificate.not_valid_after_utc - NOW == timedelta(days=90)


def test_a_certificate_lasts_an_hour_at_least_lest_engines_renew_without_end(authority):
    certificate = issued(authority, WORKER, lifetime=timedelta(minutes=4))
    assert certificate.not_valid_after_utc - NOW == timedelta(hours=1)


def test_a_certificate_serves_both_ends_and_signs_nothing(authority):
    extensions = issued(authority, WORKER).extensions
    uses = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(uses) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert not basic.value.ca
    root = x509.load_pem_x509_certificate(authority.root_pem)
    subject_key = root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    authority_key = extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert authority_key.key_identifier == subject_key.digest


def test_nothing_of_a_request_counts_but_its_key(authority):
    key = new_private_key()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "m1")])
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = authority.sign(csr.public_bytes(serialization.Encoding.PEM), WORKER)
    certificate = x509.load_pem_x509_certificate(pem)
    assert identity_of(certificate) == WORKER
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def request_with(key, algorithm=None) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)


def test_rsa_keys_of_engines_are_accepted(authority):
    key = rsa.generate_private_key(65537, 2048)
    assert authority.sign(request_with(key, hashes.SHA256()), WORKER)


@pytest.mark.parametrize(
    "csr",
    [
        b"",
        b"x" * 20_000,
        b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        request_with(rsa.generate_private_key(65537, 1024), hashes.SHA256()),
        request_with(ec.generate_private_key(ec.SECP192R1()), hashes.SHA256()),
        request_with(ed25519.Ed25519PrivateKey.generate()),
    ],
    ids=["empty", "large", "not a request", "short rsa", "short curve", "other algorithm"],
)
def test_a_request_that_cannot_be_used_is_refused(authority, csr):
    with pytest.raises(InvalidArgument, match="certificate request"):
        authority.sign(csr, WORKER)


def test_a_tampered_request_is_refused(authority):
    der = x509.load_pem_x509_csr(signing_request(new_private_key())).public_bytes(serialization.Encoding.DER)
    changed = der[:-1] + bytes([der[-1] ^ 1])
    try:
        pem = x509.load_der_x509_csr(changed).public_bytes(serialization.Encoding.PEM)
    except ValueError:
        return  # not even readable
    with pytest.raises(InvalidArgument):
        authority.sign(pem, WORKER)


def test_an_authority_is_loaded_only_with_its_own_root(authority):
    again = Authority.load(authority.key_pem, authority.root_pem)
    assert again.root_pem == authority.root_pem
    with pytest.raises(FailedPrecondition, match="does not belong"):
        Authority.load(authority.key_pem, Authority.create(AtNoon()).root_pem)
    with pytest.raises(FailedPrecondition, match="cannot be read"):
        Authority.load(b"nonsense", authority.root_pem)


def test_the_roots_own_certificate_names_no_node(authority):
    with pytest.raises(Unauthenticated):
        identity_of(x509.load_pem_x509_certificate(authority.root_pem))


def test_a_servers_certificate_names_its_addresses_and_serves_no_client(authority):
    key = new_private_key()
    chain = authority.issue_server(
        key.public_key(), "m1", ("localhost", "127.0.0.1", "2001:db8::7"), timedelta(days=30)
    )
    certificate = x509.load_pem_x509_certificate(chain)
    certificate.verify_directly_issued_by(authority.certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["m1", "localhost"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "2001:db8::7"]
    uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert certificate.not_valid_before_utc == NOW - timedelta(hours=1)
    assert certificate.not_valid_after_utc == NOW + timedelta(days=30)
