"""The next root as an external authority signs it: OpenSSL has to accept it in a chain."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from skep.errors import Unavailable
from skep.security.authority import Authority
from skep.security.external import checked_cross_signed, root_with_a_name_of_its_own
from skep.security.keys import load_private_key

NOW = datetime.now(UTC)
THEIRS = Authority.create()


def signed_as_by_go(wanted: Authority) -> x509.Certificate:
    """Go leaves the authority key identifier out where issuer and subject have the same name."""
    subject, issuer = wanted.certificate.subject, THEIRS.certificate.subject
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(wanted.certificate.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(minutes=5))
        .not_valid_after(NOW + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    )
    if subject != issuer:
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(THEIRS.certificate.public_key())
        builder = builder.add_extension(identifier, critical=False)
    return builder.sign(load_private_key(THEIRS.key_pem), hashes.SHA256())


def test_the_root_for_an_external_authority_has_a_name_of_its_own_and_is_accepted() -> None:
    wanted, other = root_with_a_name_of_its_own(), root_with_a_name_of_its_own()
    assert wanted.certificate.subject not in (THEIRS.certificate.subject, other.certificate.subject)
    signed = signed_as_by_go(wanted)
    assert checked_cross_signed(signed, wanted.certificate, THEIRS.certificate, NOW) is signed


def test_a_next_root_that_openssl_would_take_for_self_signed_is_refused() -> None:
    wanted = Authority.create()
    with pytest.raises(Unavailable, match="lacks an authority key identifier"):
        checked_cross_signed(signed_as_by_go(wanted), wanted.certificate, THEIRS.certificate, NOW)
