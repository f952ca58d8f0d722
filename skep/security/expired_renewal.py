"""Renewal of expired certificates: when it is allowed, and the proof of possession.

For machines that were off for longer than a certificate is valid.  SwarmKit refuses such nodes, so they have to leave
and join again.
"""

from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from msgspec.structs import replace

from skep.errors import PermissionDenied
from skep.security.identity import NodeIdentity, identity_of
from skep.security.keypair import KeyPair
from skep.security.keys import load_private_key

_CONTEXT = b"skep renew expired\0"


def proof_of(pair: KeyPair, csr_pem: bytes) -> bytes:
    """Return a signature of ``csr_pem`` with the key of the expired certificate.

    A replayed signature is useless, because it is bound to the new key, which only its owner has.
    """
    key = load_private_key(pair.key_pem)
    signed = _signed(pair.certificate, csr_pem)
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(signed, padding.PKCS1v15(), hashes.SHA256())
    return key.sign(signed, ec.ECDSA(hashes.SHA256()))


def proven_identity(
    certificate_pem: bytes,
    csr_pem: bytes,
    signature: bytes,
    *,
    root_pem: bytes,
    now: datetime,
    window: timedelta,
) -> NodeIdentity:
    """Return the identity of the owner of an expired certificate.

    Args:
        root_pem: The roots that the cluster trusts.
        window: Time after its expiry in which a certificate may still be renewed.

    Raises: PermissionDenied: it is not from this cluster, the proof is invalid, or it expired too long ago.
    """
    try:
        chain = x509.load_pem_x509_certificates(certificate_pem)
        certificate = chain[0]
        is_ours = _is_under(chain, x509.load_pem_x509_certificates(root_pem))
        _verify(certificate, signature, _signed(certificate, csr_pem))
    except (ValueError, TypeError, InvalidSignature) as error:
        raise PermissionDenied("the expired certificate does not belong to the caller") from error
    if not is_ours:
        raise PermissionDenied("the expired certificate was not issued by this swarm")
    if now < certificate.not_valid_before_utc:
        raise PermissionDenied("the certificate is not valid yet: check the clocks of both machines")
    if now > certificate.not_valid_after_utc + window:
        raise PermissionDenied(
            f"the node's certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}, longer ago than this swarm "
            f"lets nodes renew (skep.renew-window, {window.days} days): leave the swarm and join it again"
        )
    return replace(identity_of(certificate), serial=f"{certificate.serial_number:x}")


def _signed(certificate: x509.Certificate, csr_pem: bytes) -> bytes:
    return _CONTEXT + csr_pem + certificate.public_bytes(serialization.Encoding.DER)


def _verify(certificate: x509.Certificate, signature: bytes, signed: bytes) -> None:
    """Verify a signature.  Raises: InvalidSignature; TypeError: a kind of key that cannot sign."""
    match certificate.public_key():
        case ec.EllipticCurvePublicKey() as key:
            key.verify(signature, signed, ec.ECDSA(hashes.SHA256()))
        case rsa.RSAPublicKey() as key:
            key.verify(signature, signed, padding.PKCS1v15(), hashes.SHA256())
        case key:
            raise TypeError(type(key).__name__)


def _is_under(chain: list[x509.Certificate], roots: list[x509.Certificate]) -> bool:
    """Return whether a root signed the first certificate of ``chain``, directly or through the second one."""
    leaf, *others = chain
    intermediates = [other for other in others[:1] if _is_authority(other) and _is_signed_by(other, roots)]
    return _is_signed_by(leaf, [*roots, *intermediates])


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _is_signed_by(certificate: x509.Certificate, issuers: list[x509.Certificate]) -> bool:
    for issuer in issuers:
        try:
            certificate.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return True
    return False
