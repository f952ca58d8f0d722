"""Rotation of the cluster's root certificate.

A rotation starts with a new root whose key is also signed by the old root (the *cross-signed* intermediate).  From then
on the new root signs.  The intermediate is sent with every certificate, so that nodes that trust the old root accept
it, and no node has to change its trusted roots before all have new certificates.  Once all nodes have one, the new root
is announced and the old root dropped.
Source: swarmkit, manager/controlapi/ca_rotation.go (the rules, the texts), ca/reconciler.go.
"""

from collections.abc import Callable
from datetime import datetime, timedelta

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from skep.errors import FailedPrecondition, InvalidArgument, Unavailable
from skep.model.swarm import CAConfig
from skep.security.authority import Authority, pem
from skep.security.keys import load_private_key

ROOT_LIFETIME_LEFT_MIN = timedelta(days=365)
"""A user's root must still be valid for at least this long."""


class NextRoot(msgspec.Struct, frozen=True, kw_only=True):
    """The root to which a cluster rotates (PEM).  ``key_pem`` is empty if an external authority has the key."""

    root_pem: bytes
    key_pem: bytes
    cross_signed_pem: bytes

    def __repr__(self) -> str:
        return "NextRoot(...)"


class PreparedRoots(msgspec.Struct, frozen=True, kw_only=True):
    """Results of external authorities for a change of the roots.  Collected before, because the transaction cannot
    wait.
    """

    reachable: frozenset[bytes] = frozenset()
    """Roots (PEM) with an authority that responds."""
    next: NextRoot | None = None
    """The next root, signed by the external authority of the current one."""


class AuthorityRequests(msgspec.Struct, frozen=True, kw_only=True):
    """Requests to external authorities that a change of the roots depends on."""

    reachable: tuple[bytes, ...] = ()
    """Roots (PEM) with an authority that has to respond."""
    cross_sign: bool = False
    """Whether the authority of the current root has to sign the next one."""


class Roots(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster's root with its PEM key (empty if an external authority has it), and the new root during a rotation."""

    root_pem: bytes
    key_pem: bytes
    next: NextRoot | None = None

    def __repr__(self) -> str:
        return f"Roots(is_rotating={self.next is not None})"


def is_about_roots(present: CAConfig, config: CAConfig) -> bool:
    """Return whether a request may change the roots or their signers.

    Other requests do not need an external authority, which may be unreachable.  SwarmKit calls it for each request.
    """
    is_forced = config.force_rotate != present.force_rotate
    return bool(
        is_forced
        or config.signing_ca_cert
        or config.signing_ca_key
        or config.external_cas != present.external_cas
    )


def requested_roots(
    roots: Roots,
    config: CAConfig,
    *,
    is_forced: bool,
    now: datetime,
    create: Callable[[], Authority],
    prepared: PreparedRoots = PreparedRoots(),  # noqa: B008 -- immutable
) -> Roots:
    """Return ``roots`` after the user requests ``config``, unchanged if nothing changes.

    A request for the current root ends a rotation, and moves the key to or from an external authority.  During a
    rotation, a request for yet another root restarts the rotation.

    Args:
        is_forced: Whether the config's ``force_rotate`` is higher than before.
        create: Creates a new root.
        prepared: Results of the requests that ``needed`` returns.

    Raises:
        InvalidArgument: The config is invalid, with Docker's text.
        Unavailable: The roots have changed since ``prepared``.
    """
    if config.signing_ca_key and not config.signing_ca_cert:
        raise InvalidArgument("if a signing CA key is provided, the signing CA cert must also be provided")
    wanted = _user_root(config, now) if config.signing_ca_cert else None
    if not roots.key_pem and not _brings_key(roots, config):
        _require_external(prepared, roots.root_pem, "current")
    if wanted is None:
        if is_forced:
            return _towards(roots, _new_root(roots, prepared, create), prepared)
        if roots.next is not None and not roots.next.key_pem:
            _require_external(prepared, roots.next.root_pem, "next")
        return roots
    if not wanted.key_pem:
        _require_external(prepared, wanted.root_pem, "desired")
    if wanted.root_pem == roots.root_pem:
        return Roots(root_pem=roots.root_pem, key_pem=wanted.key_pem)
    if _same_key(wanted.certificate, roots.root_pem):
        raise InvalidArgument("Cannot update to a cert with an identical key")
    if roots.next is not None and wanted.root_pem == roots.next.root_pem:
        return msgspec.structs.replace(
            roots, next=msgspec.structs.replace(roots.next, key_pem=wanted.key_pem)
        )
    return _towards(roots, wanted, prepared)


def needed(roots: Roots, config: CAConfig, *, is_forced: bool) -> AuthorityRequests:
    """Return the requests to external authorities that ``requested_roots`` depends on."""
    wanted = normalized_root(config.signing_ca_cert)
    reachable = []
    if not roots.key_pem and not _brings_key(roots, config):
        reachable.append(roots.root_pem)
    if not config.signing_ca_cert and roots.next is not None and not roots.next.key_pem:
        reachable.append(roots.next.root_pem)
    if wanted and not config.signing_ca_key:
        reachable.append(wanted)
    is_new = wanted not in {roots.root_pem, roots.next.root_pem if roots.next is not None else b""}
    leads_away = bool(config.signing_ca_key and wanted and is_new) or (
        is_forced and not config.signing_ca_cert
    )
    return AuthorityRequests(reachable=tuple(reachable), cross_sign=leads_away and not roots.key_pem)


def normalized_root(text: str) -> bytes:
    """Return the user's root certificate in the cluster's form, or empty bytes if it cannot be read."""
    try:
        return pem(_root_certificate(text)) if text else b""
    except InvalidArgument:
        return b""


def prepared_root(config: CAConfig, now: datetime, create: Callable[[], Authority]) -> Authority:
    """Return the root that an external authority has to sign for this request.  Raises: InvalidArgument."""
    if not config.signing_ca_cert:
        return create()
    wanted = _user_root(config, now)
    return Authority.load(wanted.key_pem, wanted.root_pem)


class _Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A root to rotate to.  ``key_pem`` is empty if an external authority has the key."""

    certificate: x509.Certificate
    key_pem: bytes

    @property
    def root_pem(self) -> bytes:
        return pem(self.certificate)


def _brings_key(roots: Roots, config: CAConfig) -> bool:
    """Return whether the request contains the current root's key, so that no external authority is needed."""
    return bool(config.signing_ca_key) and normalized_root(config.signing_ca_cert) == roots.root_pem


def _require_external(prepared: PreparedRoots, root_pem: bytes, which: str) -> None:
    if root_pem not in prepared.reachable:
        raise InvalidArgument(
            f"there must be at least one valid, reachable external CA corresponding to the {which} CA certificate"
        )


def _new_root(roots: Roots, prepared: PreparedRoots, create: Callable[[], Authority]) -> _Wanted:
    if not roots.key_pem and prepared.next is not None:
        root = Authority.load(prepared.next.key_pem, prepared.next.root_pem)
    else:
        root = create()
    return _Wanted(certificate=root.certificate, key_pem=root.key_pem)


def _towards(roots: Roots, wanted: _Wanted, prepared: PreparedRoots) -> Roots:
    """Cross-sign the new root with the current one, never with the target of an unfinished rotation."""
    if roots.key_pem:
        cross_signed = Authority.load(roots.key_pem, roots.root_pem).cross_sign(wanted.certificate)
    elif not wanted.key_pem:
        raise InvalidArgument("rotating from one external CA to a different external CA is not supported")
    else:
        cross_signed = _cross_signed_before(roots, wanted, prepared)
    return msgspec.structs.replace(
        roots,
        next=NextRoot(root_pem=wanted.root_pem, key_pem=wanted.key_pem, cross_signed_pem=cross_signed),
    )


def _cross_signed_before(roots: Roots, wanted: _Wanted, prepared: PreparedRoots) -> bytes:
    ready = prepared.next
    if ready is not None and ready.root_pem == wanted.root_pem:
        signed = x509.load_pem_x509_certificate(ready.cross_signed_pem)
        try:
            signed.verify_directly_issued_by(x509.load_pem_x509_certificate(roots.root_pem))
        except (ValueError, TypeError, InvalidSignature):
            pass
        else:
            return ready.cross_signed_pem
    raise Unavailable("the cluster's root has just changed: try again")


def _user_root(config: CAConfig, now: datetime) -> _Wanted:
    """Return the user's root.  Raises: InvalidArgument."""
    certificate = _root_certificate(config.signing_ca_cert)
    if certificate.not_valid_after_utc < now + ROOT_LIFETIME_LEFT_MIN:
        raise InvalidArgument("CA certificate expires too soon")
    if not config.signing_ca_key:
        return _Wanted(certificate=certificate, key_pem=b"")
    try:
        key = load_private_key(config.signing_ca_key.encode())
    except FailedPrecondition as error:
        raise InvalidArgument(f"malformed private key: {error}") from error
    if key.public_key() != certificate.public_key():
        raise InvalidArgument("certificate key mismatch")
    return _Wanted(certificate=certificate, key_pem=config.signing_ca_key.encode())


def _root_certificate(text: str) -> x509.Certificate:
    """Return the only certificate in ``text``, which must be self-signed.  Raises: InvalidArgument."""
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
