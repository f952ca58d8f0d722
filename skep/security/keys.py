"""Private keys and certificate requests."""

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from skep.errors import FailedPrecondition

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
"""Skep's keys are elliptic curves.  A user's root may be RSA."""


def new_private_key() -> ec.EllipticCurvePrivateKey:
    """Return a new key on P-256, SwarmKit's curve."""
    return ec.generate_private_key(ec.SECP256R1())


def private_pem(key: PrivateKey) -> bytes:
    """Return the key unencrypted (PKCS #8).  Keep it in memory, or in a file of mode 0600."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_private_key(key_pem: bytes) -> PrivateKey:
    """Read a private key that is not encrypted.  Raises: FailedPrecondition."""
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FailedPrecondition(f"the private key cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise FailedPrecondition("the private key is neither an elliptic curve key nor RSA")
    return key


def signing_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a certificate request (PEM).  Its subject is empty, because the authority sets it."""
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.PEM)
