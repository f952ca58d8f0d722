"""The cluster's certificate authority: its root, and the certificates it signs.

The certificates have SwarmKit's profile, byte for byte where an engine checks it: keys on ECDSA P-256, and the node's
identity in the subject.  Managers have the names ``swarm-ca`` and ``swarm-manager`` instead of addresses, so that they
can move to another address.
Source: swarmkit, ca/certificates.go; each field was tested with Docker Engine 20.10.
"""

import ssl
from collections.abc import Iterable, Mapping
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from skep.aio.clock import Clock, SystemClock
from skep.errors import FailedPrecondition, InvalidArgument
from skep.model.node import NodeRole
from skep.model.values.times import SECOND_NS, moment
from skep.security.identity import ROLE_NAMES, ROOT_NAME, NodeIdentity
from skep.security.keys import PrivateKey, load_private_key, new_private_key, private_pem

ROOT_LIFETIME = timedelta(days=20 * 365)
"""Validity of a root, as in SwarmKit."""
NODE_LIFETIME = timedelta(days=90)
"""Default validity of a node's certificate, as in SwarmKit."""
BACKDATE = timedelta(hours=1)
"""Certificates are valid from this long before they are issued, for nodes whose clock is behind."""

NODE_LIFETIME_MIN = timedelta(hours=1)
"""An engine renews between 50 and 80 % of a certificate's lifetime, including backdating.

A shorter lifetime makes it renew in a tight loop (with 4 minutes: 3,950 times a minute).
"""

CSR_BYTES_MAX = 16 * 1024
"""Maximum size of a certificate request.  Callers without a certificate may send one."""

_CLOCK = SystemClock()

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


def issued_s(certificate: Mapping[str, Any]) -> int:
    """Return the Unix time in seconds at which this authority issued a certificate.

    ``certificate`` is a result of ``SSLSocket.getpeercert()``.  The certificate's start of validity is earlier by
    ``BACKDATE``.
    """
    return ssl.cert_time_to_seconds(certificate["notBefore"]) + int(BACKDATE.total_seconds())


USER_UNIT = "skep-user"
"""Organizational unit in users' certificates."""


class Authority:
    """A root certificate with its key, which signs nodes' certificates.

    ``intermediate_pem`` is this root signed by the previous one during a root rotation.  It is sent with every
    certificate, so that nodes that trust the old root accept certificates of the new one.
    """

    def __init__(
        self,
        key: PrivateKey,
        certificate: x509.Certificate,
        clock: Clock = _CLOCK,
        *,
        intermediate_pem: bytes = b"",
    ) -> None:
        self.key = key
        self._certificate = certificate
        self._clock = clock
        self._intermediate_pem = intermediate_pem

    @classmethod
    def create(cls, clock: Clock = _CLOCK, *, name: str = ROOT_NAME) -> "Authority":
        """Return a new self-signed root, valid for 20 years."""
        now = moment(clock.now_ns())
        key = new_private_key()
        # Go encodes names this way. An external authority that signs this root must not change the encoding.
        attribute = x509.NameAttribute(NameOID.COMMON_NAME, name, _type=_ASN1Type.PrintableString)
        subject = x509.Name([attribute])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(now + ROOT_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        return cls(key, builder.sign(key, hashes.SHA256()), clock)

    @classmethod
    def load(
        cls, key_pem: bytes, root_pem: bytes, clock: Clock = _CLOCK, *, intermediate_pem: bytes = b""
    ) -> "Authority":
        """Load the authority of a cluster.  Raises: FailedPrecondition: key and root do not belong together."""
        try:
            certificate = x509.load_pem_x509_certificate(root_pem)
        except ValueError as error:
            raise FailedPrecondition(f"the cluster's root certificate cannot be read: {error}") from error
        key = load_private_key(key_pem)
        if key.public_key() != certificate.public_key():
            raise FailedPrecondition("the root key does not belong to the cluster's root certificate")
        return cls(key, certificate, clock, intermediate_pem=intermediate_pem)

    @property
    def certificate(self) -> x509.Certificate:
        """The root certificate."""
        return self._certificate

    @property
    def root_pem(self) -> bytes:
        """The root certificate, which nodes trust, and whose digest is in join tokens."""
        return pem(self._certificate)

    @property
    def key_pem(self) -> bytes:
        """The root's private key, unencrypted."""
        return private_pem(self.key)

    def sign(
        self,
        csr_pem: bytes,
        identity: NodeIdentity,
        lifetime: timedelta = NODE_LIFETIME,
        *,
        not_before_s: int = 0,
    ) -> bytes:
        """Return a certificate (PEM chain) for the public key in a request.  The rest of the request is ignored.

        Raises: InvalidArgument: the request is unusable, or not signed by its own key.
        """
        return self.issue(requested_key(csr_pem), identity, lifetime, not_before_s=not_before_s)

    def issue(
        self,
        public_key: PublicKey,
        identity: NodeIdentity,
        lifetime: timedelta = NODE_LIFETIME,
        *,
        not_before_s: int = 0,
    ) -> bytes:
        """Return a certificate (PEM chain) of ``identity`` for this key.  It does not outlive its root.

        Args:
            not_before_s: Unix seconds.  If the clock is behind that time, that time is used.
        """
        now = moment(max(self._clock.now_ns(), not_before_s * SECOND_NS))
        not_after = min(now + max(lifetime, NODE_LIFETIME_MIN), self._certificate.not_valid_after_utc)
        unit = ROLE_NAMES[identity.role]
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, identity.cluster_id),
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
                x509.NameAttribute(NameOID.COMMON_NAME, identity.node_id),
            ]
        )
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True, key_encipherment=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(self._key_identifier, critical=False)
            .add_extension(
                x509.SubjectAlternativeName([x509.DNSName(name) for name in names_of(identity)]),
                critical=False,
            )
        )
        return pem(builder.sign(self.key, hashes.SHA256())) + self._intermediate_pem

    def issue_user(self, csr_pem: bytes, name: str, now_ns: int, not_after_ns: int) -> tuple[str, bytes]:
        """Return serial number (hexadecimal) and PEM of a certificate for a user of the API, for clients only.

        Raises: InvalidArgument: the request is unusable.
        """
        key, serial = requested_key(csr_pem), x509.random_serial_number()
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, USER_UNIT),
                x509.NameAttribute(NameOID.COMMON_NAME, name),
            ]
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(serial)
            .not_valid_before(moment(now_ns) - BACKDATE)
            .not_valid_after(min(moment(not_after_ns), self._certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=True)
            .add_extension(self._key_identifier, critical=False)
        )
        return f"{serial:x}", pem(builder.sign(self.key, hashes.SHA256()))

    def issue_server(
        self, public_key: PublicKey, name: str, addresses: Iterable[str], lifetime: timedelta
    ) -> bytes:
        """Return a certificate (PEM) for a TLS server that is not a node.  Clients cannot identify themselves with it.

        Args:
            name: The subject, and the first name that clients may use.
            addresses: More DNS names and IP addresses that clients may use.
        """
        now = moment(self._clock.now_ns())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(min(now + lifetime, self._certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(self._key_identifier, critical=False)
            .add_extension(
                x509.SubjectAlternativeName([_general_name(one) for one in (name, *addresses)]),
                critical=False,
            )
        )
        return pem(builder.sign(self.key, hashes.SHA256()))

    def cross_sign(self, other: x509.Certificate) -> bytes:
        """Return the root ``other`` as an intermediate (PEM) signed by this root.

        SwarmKit leaves out the authority key identifier.  Then OpenSSL treats the certificate as self-signed, because
        issuer and subject usually have the same name.
        """
        builder = (
            x509.CertificateBuilder()
            .subject_name(other.subject)
            .issuer_name(self._certificate.subject)
            .public_key(other.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(moment(self._clock.now_ns()) - BACKDATE)
            .not_valid_after(min(other.not_valid_after_utc, self._certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(_subject_identifier(other), critical=False)
            .add_extension(self._key_identifier, critical=False)
        )
        return pem(builder.sign(self.key, hashes.SHA256()))

    @property
    def _key_identifier(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier(_subject_identifier(self._certificate).digest, None, None)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def names_of(identity: NodeIdentity) -> tuple[str, ...]:
    """Return the DNS names in a node's certificate: its role, its id, and for a manager the name of the CA server."""
    names = (ROLE_NAMES[identity.role], str(identity.node_id))
    return (*names, ROOT_NAME) if identity.role is NodeRole.MANAGER else names


def requested_key(csr_pem: bytes) -> PublicKey:
    """Return the public key of a certificate request, which must be signed with it.

    Raises: InvalidArgument.
    """
    if len(csr_pem) > CSR_BYTES_MAX:
        raise InvalidArgument("the certificate request is too large")
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
        key = csr.public_key()
        is_signed = csr.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise InvalidArgument(f"the certificate request cannot be read: {error}") from error
    if not is_signed:
        raise InvalidArgument("the certificate request is not signed with its own key")
    match key:
        case ec.EllipticCurvePublicKey() if key.curve.key_size >= 256:
            return key
        case rsa.RSAPublicKey() if 2048 <= key.key_size <= 8192:
            return key
        case _:
            raise InvalidArgument(
                "the certificate request needs an ECDSA key of 256 bits or an RSA key of 2048"
            )


def _subject_identifier(root: x509.Certificate) -> x509.SubjectKeyIdentifier:
    """Return the root's own key identifier.  A user's root may compute it differently, or not have one."""
    try:
        return root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.SubjectKeyIdentifier.from_public_key(root.public_key())


def pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM, with a newline at its end."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_usage(**uses: bool) -> x509.KeyUsage:
    names = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
        *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{name: uses.get(name, False) for name in names})
