"""Rotation of the cluster's root certificate.

A rotation begins with a new root whose key is signed by the old root too (the *cross-signed* intermediate).  From then
on the new root signs; the intermediate is sent with every certificate, so that nodes which trust the old root accept
it, and no node has to change its trusted roots before all have new certificates.  When all have, the new root is
announced and the old one dropped.

Source: swarmkit, manager/controlapi/ca_rotation.go (the rules, the texts), ca/reconciler.go.
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
"""A user's root must be valid for at least that long."""


class NextRoot(msgspec.Struct, frozen=True, kw_only=True):
    """The root to which a cluster rotates (PEM)."""

    root_pem: bytes
    key_pem: bytes
    cross_signed_pem: bytes

    def __repr__(self) -> str:
        return "NextRoot(...)"


class Roots(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster's root with its key (PEM), and the new one during a rotation."""

    root_pem: bytes
    key_pem: bytes
    next: NextRoot | None = None

    def __repr__(self) -> str:
        return f"Roots(is_rotating={self.next is not None})"


def requested_roots(
    roots: Roots, config: CAConfig, *, is_forced: bool, now: datetime, create: Callable[[], Authority]
) -> Roots:
    """``roots`` after the user requests ``config``; the same if nothing changes.

    A request for the present root ends a rotation; one for another root than the present rotation's restarts it.

    Args:
        is_forced: the config's ``force_rotate`` is higher than before.
        create: makes a new root.

    Raises:
        InvalidArgument: the config is invalid, with Docker's text.
    """
    if config.signing_ca_key and not config.signing_ca_cert:
        raise InvalidArgument("if a signing CA key is provided, the signing CA cert must also be provided")
    if not config.signing_ca_cert:
        return _towards(roots, create()) if is_forced else roots
    wanted = _user_root(config, now)
    if wanted.root_pem == roots.root_pem:
        return Roots(root_pem=roots.root_pem, key_pem=wanted.key_pem)
    if _same_key(wanted.certificate, roots.root_pem):
        raise InvalidArgument("Cannot update to a cert with an identical key")
    if roots.next is not None and wanted.root_pem == roots.next.root_pem:
        return roots
    return _towards(roots, wanted)


def _towards(roots: Roots, wanted: Authority) -> Roots:
    """Cross-sign the new root with the present one, never with the target of an unfinished rotation."""
    present = Authority.load(roots.key_pem, roots.root_pem)
    return msgspec.structs.replace(
        roots,
        next=NextRoot(
            root_pem=wanted.root_pem,
            key_pem=wanted.key_pem,
            cross_signed_pem=present.cross_sign(wanted.certificate),
        ),
    )


def _user_root(config: CAConfig, now: datetime) -> Authority:
    """The user's root."""
    certificate = _root_certificate(config.signing_ca_cert)
    if not config.signing_ca_key:
        raise InvalidArgument(
            "there must be at least one valid, reachable external CA corresponding to the desired CA certificate"
        )
    try:
        key = load_private_key(config.signing_ca_key.encode())
    except FailedPrecondition as error:
        raise InvalidArgument(f"malformed private key: {error}") from error
    if key.public_key() != certificate.public_key():
        raise InvalidArgument("certificate key mismatch")
    if certificate.not_valid_after_utc < now + ROOT_LIFETIME_LEFT_MIN:
        raise InvalidArgument("CA certificate expires too soon")
    return Authority.load(config.signing_ca_key.encode(), pem(certificate))


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
