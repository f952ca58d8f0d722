"""Certificates that users bring along, in secrets: ``skep.http.tls=SECRET``.

A secret has a chain, the certificate of the host first, and its private key, all in PEM.
"""

from base64 import b64decode
from collections.abc import Collection
from functools import lru_cache
from typing import Final

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from skep.errors import FailedPrecondition, InvalidArgument
from skep.manager.services.routes import claimant_of, exposed
from skep.model.door.claims import Claimant, settled
from skep.model.door.routes import HTTP, routes_of, tls_secrets
from skep.model.secret import Secret
from skep.model.service import ServiceSpec
from skep.model.values.ids import ServiceId
from skep.model.values.stacks import stack_of
from skep.model.values.times import SECOND_NS
from skep.store.interface import View
from skep.store.kinds import Payload

RSA_BITS_MIN, RSA_BITS_MAX = 2048, 4096
"""Smallest RSA key that OpenSSL accepts at its default level of security, and the largest that authorities recommend.
A handshake with a key of 8192 bits costs a proxy seven times as much.
"""
BYTES_MAX = 32 * 1024
"""Largest secret that is read for a certificate.  A chain of four with its key has 10 KiB."""
_KEY_CHARACTERS_MAX = 4096
"""Longest private key in PEM.  RSA with 4096 bits has 3,300."""
_CURVES: Final = ("secp256r1", "secp384r1", "secp521r1")
"""Curves whose certificates TLS 1.3 accepts."""
_KINDS: Final = {
    "1.2.840.113549.1.1.1": bytes.fromhex("06092a864886f70d010101"),
    "1.2.840.10045.2.1": bytes.fromhex("06072a8648ce3d0201"),
}
"""Object identifiers of RSA and elliptic curves, as text and in DER.  OpenSSL needs minutes for a crafted DSA key."""
_KIND_AT = 16
"""A private key in DER names its kind before this byte, and the kind's own parameters follow it."""
_CACHED = 1024
"""Secrets whose certificates are kept.  Without that, each request would read all of them again."""


class OwnCertificate(msgspec.Struct, frozen=True, kw_only=True):
    """The certificate of a host, in a secret.

    Attributes:
        problem: Why it cannot be used, or empty.
        is_unreadable: Whether the store cannot read the secret, so that an earlier certificate is still right.
    """

    secret: str
    is_unreadable: bool = False
    pem: str = ""
    not_before_ns: int = 0
    not_after_ns: int = 0
    problem: str = ""

    def __repr__(self) -> str:
        return f"OwnCertificate(secret={self.secret!r})"


def secrets_of_hosts(claimants: Collection[Claimant]) -> dict[str, str]:
    """Return the names of the secrets by host.

    The oldest service decides that has the host, or another one of its stack.  A route of another stack may share the
    host, but does not choose its certificate.
    """
    known: dict[str, Claimant] = {}
    chosen: dict[str, str] = {}
    if not any(route.options.tls_secret for one in claimants for route in one.routes):
        return {}
    claimants_by_id = {one.id: one for one in claimants}
    for id, routes in settled(claimants_by_id.values()).accepted.items():
        for route in routes:
            owner = known.setdefault(route.host, claimants_by_id[id])
            if route.options.tls_secret and owner.stack == claimants_by_id[id].stack:
                chosen.setdefault(route.host, route.options.tls_secret)
    return chosen


def own_certificates(view: View) -> dict[str, OwnCertificate]:
    """Return the certificates in secrets by host, sorted."""
    chosen = secrets_of_hosts([claimant_of(one) for one in exposed(view)])
    return {host: _read(view, secret, host) for host, secret in sorted(chosen.items())}


def refuse_own_certificate(view: View, host: str) -> None:
    """Refuse a renewal of a certificate that is in a secret.  Raises: FailedPrecondition."""
    chosen = secrets_of_hosts([claimant_of(one) for one in exposed(view)])
    if (secret := chosen.get(host)) is not None:
        raise FailedPrecondition(
            f"the certificate of {host} is in the secret {secret}: replace it with skep secret rotate {secret} FILE"
        )


def check_certificates(view: View, spec: ServiceSpec, id: ServiceId | None = None) -> None:
    """Refuse a spec with a secret that has no certificate for its host.

    Secrets of the present spec are not checked again.  A rehearsal does not know the content of new ones, which are
    not checked either.  ``check_routes`` comes first.

    Raises: InvalidArgument.
    """
    wanted = [one for one in routes_of(spec.labels) if one.options.tls_secret]
    if not wanted:
        return
    present = [one for one in exposed(view) if one.id == id]
    before = {(one.host, one.options.tls) for service in present for one in routes_of(service.spec.labels)}
    if all((one.host, one.options.tls) in before for one in wanted):
        return
    others = [claimant_of(one) for one in exposed(view) if one.id != id]
    age = present[0].created_at if present else "~"  # a new one is the youngest
    claimant = Claimant(
        id=id or ServiceId(""),
        name=spec.name,
        stack=stack_of(spec.labels),
        created_at=age,
        routes=routes_of(spec.labels),
    )
    chosen = secrets_of_hosts([*others, claimant])
    for route in wanted:
        host, secret = route.host, route.options.tls
        if (host, secret) in before or _data_of(view, secret) == b"":
            continue
        if problem := _read(view, secret, host).problem:
            raise InvalidArgument(f"invalid label {HTTP}.tls={secret}: {problem}")
        if chosen.get(host) != secret:
            raise InvalidArgument(
                f"invalid label {HTTP}.tls={secret}: another service chooses the certificate of {host}, "
                "because it had the host first. Set the label there."
            )


def services_with(view: View, secret: str) -> list[str]:
    """Return the names of the services that take a certificate from a secret."""
    return sorted(one.spec.name for one in exposed(view) if secret in tls_secrets(one.spec.labels))


def _data_of(view: View, name: str) -> bytes | None:
    """Return the content of a secret, or None if it does not exist.  A rehearsal only knows the number of its bytes."""
    secret = next(iter(view.find(Secret, name=name)), None)
    if secret is None:
        return None
    payload = view.lookup(Payload, f"secret/{secret.id}")
    return payload.data.strip(b"\0") if payload is not None else b""


def _is_unreadable(view: View, name: str) -> bool:
    secret = next(iter(view.find(Secret, name=name)), None)
    if secret is None:
        return bool(view.unreadable(Secret))  # their names are unknown
    return f"secret/{secret.id}" in view.unreadable(Payload)


def _read(view: View, name: str, host: str) -> OwnCertificate:
    data = _data_of(view, name)
    if not data and _is_unreadable(view, name):
        problem = f"the store cannot read the secret {name}. Create another one, and name it in {HTTP}.tls"
        return OwnCertificate(secret=name, problem=problem, is_unreadable=True)
    if data is None:
        return OwnCertificate(
            secret=name, problem=f"there is no secret {name}. Create it with docker secret create"
        )
    found = _parsed(data) if len(data) <= BYTES_MAX else _too_long(len(data))
    problem = found.problem
    if not problem and not {host, f"*.{host.partition('.')[2]}"} & found.names:
        shown = ", ".join(sorted(found.names)[:5]) or "no name"
        problem = f"has a certificate for {shown} and not for {host}. Order one for that name"
    if problem:
        return OwnCertificate(secret=name, problem=f"the secret {name} {problem}")
    return OwnCertificate(
        secret=name, pem=found.pem, not_before_ns=found.not_before_ns, not_after_ns=found.not_after_ns
    )


class _Parsed(msgspec.Struct, frozen=True, kw_only=True):
    """What a secret has.  ``problem`` continues a sentence that begins with the secret."""

    pem: str = ""
    names: frozenset[str] = frozenset()
    not_before_ns: int = 0
    not_after_ns: int = 0
    problem: str = ""


def _too_long(size: int) -> _Parsed:
    return _Parsed(problem=f"has {size} bytes. Write only a chain and its key into it, at most {BYTES_MAX}")


class _Unusable(Exception):
    """Raised for a secret without a usable certificate.  Its text is the ``problem``."""


@lru_cache(maxsize=_CACHED)
def _parsed(data: bytes) -> _Parsed:
    """Return the certificate in its usual form, without anything else that the secret has.

    It takes less than a millisecond whatever the secret has, because the event loop waits for it.
    """
    try:
        chain, key = _chain_and_key(data)
    except _Unusable as error:
        return _Parsed(problem=str(error))
    leaf = chain[0]
    text = b"".join(one.public_bytes(Encoding.PEM) for one in chain)
    text += key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return _Parsed(
        pem=text.decode(),
        names=_names(leaf),
        not_before_ns=int(leaf.not_valid_before_utc.timestamp()) * SECOND_NS,
        not_after_ns=int(leaf.not_valid_after_utc.timestamp()) * SECOND_NS,
    )


def _chain_and_key(
    data: bytes,
) -> tuple[list[x509.Certificate], rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey]:
    """Return what belongs together.  Raises: _Unusable."""
    try:
        chain = x509.load_pem_x509_certificates(data)
        leaf = chain[0]
        kind = leaf.public_key_algorithm_oid.dotted_string
    except ValueError:
        raise _Unusable("has no certificate. Write the chain and then its key into it, in PEM form") from None
    if kind not in _KINDS:
        raise _Unusable("has a key of another kind. Use RSA, or an elliptic curve of NIST")
    try:
        public = leaf.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise _Unusable("has a certificate with an unknown key. Order one for a usual key") from None
    if isinstance(public, rsa.RSAPublicKey) and not RSA_BITS_MIN <= public.key_size <= RSA_BITS_MAX:
        words = f"Use {RSA_BITS_MIN} to {RSA_BITS_MAX}"
        raise _Unusable(f"has an RSA key of {public.key_size} bits. {words}")
    if isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name not in _CURVES:
        raise _Unusable(f"has a key of the curve {public.curve.name}. Use {', '.join(_CURVES)} or RSA")
    key = _key(_key_text(data), kind)
    if public != key.public_key():
        raise _Unusable("has a key that does not belong to its first certificate. Put that certificate first")
    return chain, key


def _key_text(data: bytes) -> bytes:
    """Return the private key in PEM, which may also follow its parameters.  Raises: _Unusable."""
    found = data.find(b"PRIVATE KEY-----")
    begin = data.rfind(b"-----BEGIN ", 0, found) if found >= 0 else -1
    end = data.find(b"-----END ", begin)
    if begin < 0 or end < 0:
        raise _Unusable("has no private key. Write it after the certificates, in PEM form")
    text = data[begin : data.find(b"-----", end + 9) + 5]
    if b"ENCRYPTED" in text:
        raise _Unusable("has an encrypted key. Remove its passphrase with openssl pkey")
    if len(text) > _KEY_CHARACTERS_MAX:
        raise _Unusable(
            f"has a private key of {len(text)} characters. Use RSA of at most {RSA_BITS_MAX} bits"
        )
    return text


def _key(text: bytes, kind: str) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey:
    """Return a key of the certificate's kind.

    It belongs to the certificate if the public keys are the same.  Whether its numbers are primes is not checked, which
    takes a third of a second, and only the owner's hosts would not be served.

    Raises: _Unusable.
    """
    try:
        if text.startswith(b"-----BEGIN PRIVATE"):
            head = b64decode(text.partition(b"\n")[2].rpartition(b"-----END")[0])
            if head.find(_KINDS[kind], 0, _KIND_AT + len(_KINDS[kind])) < 0:
                raise _Unusable(
                    "has a key that does not belong to its first certificate. Put that certificate first"
                )
        elif not text.startswith((b"-----BEGIN RSA", b"-----BEGIN EC")):
            raise _Unusable("has a key of another kind. Use RSA, or an elliptic curve of NIST")
        key = load_pem_private_key(text, password=None, unsafe_skip_rsa_key_validation=True)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _Unusable("has no private key. Write it after the certificates, in PEM form") from None
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise _Unusable("has a key of another kind. Use RSA, or an elliptic curve of NIST")
    return key


def _names(leaf: x509.Certificate) -> frozenset[str]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return frozenset()
    return frozenset(one.lower() for one in names.get_values_for_type(x509.DNSName))
