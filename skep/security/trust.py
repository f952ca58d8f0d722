"""What a node or a cluster says about the roots it stands on."""

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from skep.errors import FailedPrecondition
from skep.model.meta import TLSInfo


def tls_info(root_pem: bytes) -> TLSInfo:
    """The trust in ``root_pem`` as the API shows it; the first certificate of the bundle is the one that issues.

    Raises: FailedPrecondition: it cannot be read.
    """
    try:
        issuer = x509.load_pem_x509_certificate(root_pem)
        trust_root = root_pem.decode("ascii")
    except ValueError as error:
        raise FailedPrecondition(f"the root certificate cannot be read: {error}") from error
    return TLSInfo(
        trust_root=trust_root,
        cert_issuer_subject=issuer.subject.public_bytes(),
        cert_issuer_public_key=issuer.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
    )
