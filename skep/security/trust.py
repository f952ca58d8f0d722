"""``TLSInfo`` of nodes and of the cluster: trusted root and issuer."""

import hashlib

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from skep.errors import FailedPrecondition
from skep.model.values.meta import TLSInfo
from skep.security.keypair import KeyPair


def tls_info(root_pem: bytes, issuer_pem: bytes = b"") -> TLSInfo:
    """Return ``TLSInfo`` for ``root_pem``, as the API shows it.

    Args:
        issuer_pem: The issuer of certificates.  Defaults to the first certificate of the bundle, and differs from it
            during a root rotation.

    Raises: FailedPrecondition: a certificate cannot be read.
    """
    try:
        issuer = x509.load_pem_x509_certificate(issuer_pem or root_pem)
        trust_root = root_pem.decode("ascii")
    except ValueError as error:
        raise FailedPrecondition(f"the root certificate cannot be read: {error}") from error
    return _tls_info(trust_root, issuer)


def tls_info_of(pair: KeyPair) -> TLSInfo:
    """Return ``TLSInfo`` of a node with this key pair: its trusted roots, and its certificate's issuer."""
    trust_root = pair.root_pem.decode("ascii", errors="replace")
    for candidate in (*pair.chain[1:], *x509.load_pem_x509_certificates(pair.root_pem)):
        try:
            pair.certificate.verify_directly_issued_by(candidate)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return _tls_info(trust_root, candidate)
    return TLSInfo(trust_root=trust_root)


def public_key_der(certificate: x509.Certificate) -> bytes:
    """Return a certificate's public key, DER-encoded as in certificates."""
    return certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def issuer_digest(info: TLSInfo) -> str:
    """Return the SHA-256 of an issuer's public key in hexadecimal digits."""
    return hashlib.sha256(info.cert_issuer_public_key).hexdigest()


def root_digest(root_pem: bytes) -> str:
    """Return the SHA-256 of a root bundle in hexadecimal digits."""
    return hashlib.sha256(root_pem).hexdigest()


def is_issued_by(reported: TLSInfo, wanted: TLSInfo) -> bool:
    """Return whether a node's certificate has the wanted issuer."""
    return (
        reported.cert_issuer_public_key == wanted.cert_issuer_public_key
        and reported.cert_issuer_subject == wanted.cert_issuer_subject
    )


def _tls_info(trust_root: str, issuer: x509.Certificate) -> TLSInfo:
    return TLSInfo(
        trust_root=trust_root,
        cert_issuer_subject=issuer.subject.public_bytes(),
        cert_issuer_public_key=public_key_der(issuer),
    )
