"""Certificate revocation lists, which etcd reads at each handshake of its peer port.

etcd compares serial numbers and ignores signature and dates, so any key can sign the list.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from skep.security.identity import ROOT_NAME
from skep.security.keys import new_private_key

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_LIFETIME = timedelta(days=100 * 365)
"""Validity of a list, which etcd ignores."""


def listed_serials(content: bytes) -> frozenset[str]:
    """Return the serial numbers in a CRL.  Raises: ValueError: it is invalid."""
    return frozenset(f"{revoked.serial_number:x}" for revoked in x509.load_der_x509_crl(content))


def revocation_list(serials: Iterable[str]) -> bytes:
    """Return a CRL (DER) of certificates with these serial numbers in hexadecimal digits."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ROOT_NAME)]))
        .last_update(_EPOCH)
        .next_update(_EPOCH + _LIFETIME)
    )
    for serial in sorted(set(serials)):
        revoked = (
            x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(_EPOCH).build()
        )
        builder = builder.add_revoked_certificate(revoked)
    return builder.sign(new_private_key(), hashes.SHA256()).public_bytes(serialization.Encoding.DER)
