"""Certificates that users bring along, in secrets: ``skep.http.tls=SECRET``.

A secret has a chain, the certificate of the host first, and its private key, all in PEM.
"""

from collections.abc import Collection

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

from skep.errors import InvalidArgument
from skep.manager.services.routes import claimant_of, exposed
from skep.model.door.claims import Claimant, settled
from skep.model.door.routes import HTTP, routes_of, tls_secrets
from skep.model.history import stack_of
from skep.model.secret import Secret
from skep.model.service import ServiceSpec
from skep.model.values.ids import ServiceId
from skep.model.values.times import SECOND_NS
from skep.store.interface import View
from skep.store.kinds import Payload

RSA_BITS_MIN = 2048
"""Smallest RSA key that OpenSSL accepts at its default level of security."""


class OwnCertificate(msgspec.Struct, frozen=True, kw_only=True):
    """The certificate of a host, in a secret.  ``problem``: why it cannot be used, or empty."""

    secret: str
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


def _read(view: View, name: str, host: str) -> OwnCertificate:
    data = _data_of(view, name)
    if data is None:
        return OwnCertificate(
            secret=name, problem=f"there is no secret {name}. Create it with docker secret create"
        )
    try:
        return _parsed(name, data, host)
    except _Unusable as error:
        return OwnCertificate(secret=name, problem=f"the secret {name} {error}")


class _Unusable(Exception):
    """Raised for a secret without a usable certificate.  Its text continues a sentence that begins with the secret."""


def _parsed(name: str, data: bytes, host: str) -> OwnCertificate:
    """Return the certificate in its usual form, without anything else that the secret has.  Raises: _Unusable."""
    try:
        chain = x509.load_pem_x509_certificates(data)
    except ValueError:
        raise _Unusable("has no certificate. Write the chain and then its key into it, in PEM form") from None
    try:
        key = load_pem_private_key(data[_key_at(data) :], password=None)
    except TypeError:
        raise _Unusable("has an encrypted key. Remove its passphrase with openssl pkey") from None
    except (ValueError, UnsupportedAlgorithm):
        raise _Unusable("has no private key. Write it after the certificates, in PEM form") from None
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise _Unusable("has a key of another kind. Use RSA or an elliptic curve")
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size < RSA_BITS_MIN:
        raise _Unusable(f"has an RSA key of {key.key_size} bits. Use at least {RSA_BITS_MIN}")
    leaf = chain[0]
    if leaf.public_key() != key.public_key():
        raise _Unusable("has a key that does not belong to its first certificate. Put that certificate first")
    names = _names(leaf)
    if not {host, f"*.{host.partition('.')[2]}"} & names:
        shown = ", ".join(sorted(names)[:5]) or "no name"
        raise _Unusable(f"has a certificate for {shown} and not for {host}. Order one for that name")
    text = b"".join(one.public_bytes(Encoding.PEM) for one in chain)
    text += key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return OwnCertificate(
        secret=name,
        pem=text.decode(),
        not_before_ns=int(leaf.not_valid_before_utc.timestamp()) * SECOND_NS,
        not_after_ns=int(leaf.not_valid_after_utc.timestamp()) * SECOND_NS,
    )


def _key_at(data: bytes) -> int:
    """Return where the private key begins, which may also follow its parameters."""
    found = data.find(b"PRIVATE KEY-----")
    return data.rfind(b"-----BEGIN ", 0, found) if found >= 0 else len(data)


def _names(leaf: x509.Certificate) -> set[str]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return set()
    return {one.lower() for one in names.get_values_for_type(x509.DNSName)}
