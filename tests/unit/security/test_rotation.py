"""From one root to the next: what the user may config, and what comes of it."""

import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from skep.errors import InvalidArgument
from skep.model.node import NodeRole
from skep.model.swarm import CAConfig
from skep.model.values.ids import ClusterId, NodeId
from skep.security.authority import Authority
from skep.security.identity import NodeIdentity
from skep.security.keypair import KeyPair
from skep.security.keys import PrivateKey, new_private_key, private_pem
from skep.security.rotation import NextRoot, Roots, requested_roots
from skep.security.tls import ServerTls, client_context
from skep.security.trust import is_issued_by, tls_info, tls_info_of

NOW = datetime.now(UTC)
NODE = NodeIdentity(node_id=NodeId("n1"), cluster_id=ClusterId("c1"), role=NodeRole.MANAGER)
OLD, NEW = Authority.create(), Authority.create()
ROOTS = Roots(root_pem=OLD.root_pem, key_pem=OLD.key_pem)


def after_change(config: CAConfig, roots: Roots = ROOTS, *, is_forced: bool = False) -> Roots:
    return requested_roots(roots, config, is_forced=is_forced, now=NOW, create=lambda: NEW)


def a_root(key: PrivateKey, *, days: int = 3650, is_authority: bool = True, name: str = "mine") -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def brought(key: PrivateKey, root_pem: bytes) -> CAConfig:
    return CAConfig(signing_ca_cert=root_pem.decode(), signing_ca_key=private_pem(key).decode())


def a_pair(authority: Authority, root_pem: bytes) -> KeyPair:
    key = new_private_key()
    return KeyPair(
        certificate_pem=authority.issue(key.public_key(), NODE),
        key_pem=private_pem(key),
        root_pem=root_pem,
    )


def test_without_a_requested_rotation_nothing_changes():
    assert after_change(CAConfig()) is ROOTS


def test_a_rotation_that_is_counted_makes_a_new_root():
    roots = after_change(CAConfig(), is_forced=True)
    assert roots.root_pem == OLD.root_pem
    assert roots.next is not None
    assert roots.next.root_pem == NEW.root_pem


@pytest.mark.parametrize(
    "key", [ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)]
)
def test_a_root_of_the_users_own_is_taken(key):
    root_pem = a_root(key)
    roots = after_change(brought(key, root_pem))
    assert roots.next is not None
    assert roots.next.root_pem == root_pem


def test_a_peer_that_trusts_the_old_root_accepts_a_certificate_of_the_new_one():
    """With OpenSSL, which takes a certificate with equal names for self-signed unless it names its issuer's key."""
    next_root = after_change(CAConfig(), is_forced=True).next
    assert next_root is not None
    authority = Authority.load(
        next_root.key_pem, next_root.root_pem, intermediate_pem=next_root.cross_signed_pem
    )
    server, client = a_pair(authority, OLD.root_pem), a_pair(OLD, OLD.root_pem)
    shake_hands(server, client)
    shake_hands(client, server)
    shake_hands(server.with_root(NEW.root_pem), a_pair(authority, NEW.root_pem))


def shake_hands(server: KeyPair, client: KeyPair) -> None:
    """A TLS handshake in memory, each side with the roots of its pair."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        ServerTls(server).front.wrap_bio(to_server, to_client, server_side=True),
        client_context(client).wrap_bio(to_client, to_server, server_hostname="swarm-manager"),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert ends[0].getpeercert()
    assert ends[1].getpeercert()


def test_a_node_reports_its_issuer_before_during_and_after_a_rotation():
    next_root = after_change(CAConfig(), is_forced=True).next
    assert next_root is not None
    during = Authority.load(
        next_root.key_pem, next_root.root_pem, intermediate_pem=next_root.cross_signed_pem
    )
    wanted = tls_info(OLD.root_pem, NEW.root_pem)
    assert not is_issued_by(tls_info_of(a_pair(OLD, OLD.root_pem)), wanted)
    assert is_issued_by(tls_info_of(a_pair(during, OLD.root_pem)), wanted)
    assert tls_info_of(a_pair(during, OLD.root_pem)) == wanted
    assert tls_info_of(a_pair(during, NEW.root_pem)) == tls_info(NEW.root_pem)
    assert tls_info_of(a_pair(NEW, NEW.root_pem)) == tls_info(NEW.root_pem)


def test_another_rotation_starts_over_from_the_present_root():
    first = after_change(CAConfig(), is_forced=True)
    key = new_private_key()
    second = after_change(brought(key, a_root(key)), first)
    assert second.root_pem == OLD.root_pem
    assert second.next is not None
    crossed = x509.load_pem_x509_certificate(second.next.cross_signed_pem)
    crossed.verify_directly_issued_by(OLD.certificate)


def test_the_root_to_which_the_cluster_rotates_already_changes_nothing():
    first = after_change(CAConfig(), is_forced=True)
    assert after_change(brought(NEW.key, NEW.root_pem), first) == first


def test_the_present_root_ends_a_rotation():
    first = after_change(CAConfig(), is_forced=True)
    assert after_change(brought(OLD.key, OLD.root_pem), first) == ROOTS


KEY = new_private_key()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CAConfig(signing_ca_key="x"), "the signing CA cert must also be provided"),
        (CAConfig(signing_ca_cert="x"), "invalid root certificates"),
        (CAConfig(signing_ca_cert=a_root(KEY).decode()), "valid, reachable external CA"),
        (CAConfig(signing_ca_cert=a_root(KEY).decode(), signing_ca_key="x"), "malformed private key"),
        (brought(new_private_key(), a_root(KEY)), "certificate key mismatch"),
        (brought(KEY, a_root(KEY, days=364)), "CA certificate expires too soon"),
        (brought(KEY, a_root(KEY) + a_root(KEY)), "cannot contain multiple certificates"),
        (brought(KEY, a_root(KEY, is_authority=False)), "may not sign certificates"),
        (brought(OLD.key, a_root(OLD.key)), "Cannot update to a cert with an identical key"),
    ],
)
def test_an_impossible_ca_config_is_refused_with_dockers_message(config, message):
    with pytest.raises(InvalidArgument, match=message):
        after_change(config)


def test_a_next_root_says_nothing_of_its_key_in_the_log():
    assert "PRIVATE" not in repr(
        NextRoot(root_pem=b"", key_pem=b"-----BEGIN PRIVATE KEY-----", cross_signed_pem=b"")
    )
