"""From one root certificate to the next.

A rotation begins with a new root whose key the old root vouches for (the *cross-signed* intermediate).  From then on
the new root signs; the intermediate goes with every certificate, so that everybody who trusts the old root trusts it
too, and nobody has to change whom he trusts before all have new certificates.  When all have, the new root is
announced and the old one forgotten.

Source: swarmkit, manager/controlapi/ca_rotation.go (the rules, the words), ca/reconciler.go.
"""

from collections.abc import Callable
from datetime import datetime, timedelta

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from skep.errors import FailedPrecondition, InvalidArgument
from skep.model.swarm import CAConfig
from skep.security.authority import Authority, pem
from skep.security.keys import load_private_key

ROOT_LIFETIME_LEFT_MIN = timedelta(days=365)
"""A root that the user brings must live for at least that long."""


class NextRoot(msgspec.Struct, frozen=True, kw_only=True):
    """The root to which a cluster rotates (PEM)."""

    root_pem: bytes
    key_pem: bytes
    cross_signed_pem: bytes

    def __repr__(self) -> str:
        return "NextRoot(...)"


class Roots(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster's root with its key (PEM), and the one it rotates to, if it does."""

    root_pem: bytes
    key_pem: bytes
    next: NextRoot | None = None

    def __repr__(self) -> str:
        return f"Roots(is_rotating={self.next is not None})"


def wished_roots(
    roots: Roots, wish: CAConfig, *, is_forced: bool, now: datetime, create: Callable[[], Authority]
) -> Roots:
    """What becomes of ``roots`` when the user wishes ``wish``; the same if nothing changes.

    A wish for the present root ends a rotation; one for another root than the present rotation's starts it over.

    Args:
        is_forced: the wish counts one rotation more than the last one.
        create: makes a new root.

    Raises:
        InvalidArgument: the wish can never work, in Docker's words.
    """
    if wish.signing_ca_key and not wish.signing_ca_cert:
        raise InvalidArgument("if a signing CA key is provided, the signing CA cert must also be provided")
    if not wish.signing_ca_cert:
        return _towards(roots, create()) if is_forced else roots
    wanted = _wanted(wish, now)
    if wanted.root_pem == roots.root_pem:
        return Roots(root_pem=roots.root_pem, key_pem=wanted.key_pem)
    if _same_key(wanted.certificate, roots.root_pem):
        raise InvalidArgument("Cannot update to a cert with an identical key")
    if roots.next is not None and wanted.root_pem == roots.next.root_pem:
        return roots
    return _towards(roots, wanted)


def _towards(roots: Roots, wanted: Authority) -> Roots:
    """The present root vouches for the new one, never one on the way to which the cluster was."""
    present = Authority.load(roots.key_pem, roots.root_pem)
    return msgspec.structs.replace(
        roots,
        next=NextRoot(
            root_pem=wanted.root_pem,
            key_pem=wanted.key_pem,
            cross_signed_pem=present.cross_sign(wanted.certificate),
        ),
    )


def _wanted(wish: CAConfig, now: datetime) -> Authority:
    """The root that the user brings."""
    certificate = _root_certificate(wish.signing_ca_cert)
    if not wish.signing_ca_key:
        raise InvalidArgument(
            "there must be at least one valid, reachable external CA corresponding to the desired CA certificate"
        )
    try:
        key = load_private_key(wish.signing_ca_key.encode())
    except FailedPrecondition as error:
        raise InvalidArgument(f"malformed private key: {error}") from error
    if key.public_key() != certificate.public_key():
        raise InvalidArgument("certificate key mismatch")
    if certificate.not_valid_after_utc < now + ROOT_LIFETIME_LEFT_MIN:
        raise InvalidArgument("CA certificate expires too soon")
    return Authority.load(wish.signing_ca_key.encode(), pem(certificate))


def _root_certificate(text: str) -> x509.Certificate:
    """The one self-signed certificate in ``text``."""
    try:
        certificates = x509.load_pem_x509_certificates(text.encode())
    except ValueError as error:
        raise InvalidArgument(f"invalid root certificates: {error}") from error
    if len(certificates) > 1:
        raise InvalidArgument("the desired CA certificate cannot contain multiple certificates")
    (certificate,) = certificates
    try:
        certificate.verify_directly_issued_by(certificate)
        is_authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        raise InvalidArgument(
            f"error while validating Root CA Certificate: it is not a self-signed authority: {error}"
        ) from error
    if not is_authority:
        raise InvalidArgument("error while validating Root CA Certificate: it may not sign certificates")
    return certificate


def _same_key(certificate: x509.Certificate, root_pem: bytes) -> bool:
    return certificate.public_key() == x509.load_pem_x509_certificate(root_pem).public_key()
