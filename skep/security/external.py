"""Certificates from an external authority by cfssl's protocol: requests, and validation of responses.  Pure.

The authority has the root's key, and the managers do not.  The authority may sign more than it should, so a manager
passes on a certificate only if the cluster's own authority would have signed the same.

Source: swarmkit, ca/external.go, ca/certificates.go (PrepareCSR, ValidateCertChain); cfssl, doc/api/endpoint_sign.txt.
"""

from datetime import datetime, timedelta
from secrets import token_hex
from urllib.parse import urlsplit

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from skep.errors import InvalidArgument, Unavailable
from skep.model.swarm import CAConfig, Swarm
from skep.security.authority import BACKDATE, NODE_LIFETIME_MIN, Authority, PublicKey, names_of, pem
from skep.security.identity import ROLE_NAMES, ROOT_NAME, NodeIdentity
from skep.security.keys import load_private_key

CROSS_SIGN_PROFILE = "CA"
"""The authority's profile for signing authorities.  Nodes' certificates use its default profile."""

RESPONSE_BYTES_MAX = 256 * 1024
"""SwarmKit's limit (CertificateMaxSize)."""

AUTHORITIES_MAX = 16
"""External authorities in one cluster's config."""
URL_LENGTH_MAX = 2048
"""Length of an external authority's URL."""

CLOCK_SKEW = timedelta(minutes=5)
"""Largest accepted lead of the authority's clock."""


def check_external_authorities(config: CAConfig) -> None:
    """Refuse external authorities that can never be called.  Raises: InvalidArgument."""
    if len(config.external_cas) > AUTHORITIES_MAX:
        raise InvalidArgument(f"at most {AUTHORITIES_MAX} external CAs can be configured")
    for one in config.external_cas:
        if one.protocol.lower() != "cfssl":
            raise InvalidArgument(f'invalid protocol: "{one.protocol}"')
        shown = shown_url(one.url)
        if not one.url.startswith("https://") or len(one.url) > URL_LENGTH_MAX or not one.url.isprintable():
            raise InvalidArgument(f"the URL of an external CA must begin with https://: {shown[:100]!r}")
        if not _has_host(one.url):
            raise InvalidArgument(f"the URL of an external CA must have a host: {shown[:100]!r}")
        if one.options:
            raise InvalidArgument(f"external CAs have no option {min(one.options)!r}")
        if one.ca_cert and not normalized(one.ca_cert):
            raise InvalidArgument(f"the CA certificate of the external CA {shown} cannot be read")


def _has_host(url: str) -> bool:
    """Return whether a URL names a host, and a valid port if any."""
    try:
        where = urlsplit(url)
        return bool(where.hostname) and (where.port is None or where.port > 0)
    except ValueError:
        return False


def shown_url(url: str) -> str:
    """Return ``url`` for logs and errors, without its password, like Go's ``URL.Redacted``.

    In an invalid URL, the text between the first colon and the last ``@`` counts as the password.
    """
    scheme, separator, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    name, colon, _ = user.partition(":")
    return f"{scheme}{separator}{name}:xxxxx{at}{host}" if colon else url


def normalized(certificates_pem: str) -> bytes:
    """Return the certificates as PEM without surrounding text, or b"" if they cannot be read.

    Certificates are compared in this form, because a user's file may have comments or other line endings.
    """
    try:
        return b"".join(map(pem, x509.load_pem_x509_certificates(certificates_pem.encode())))
    except ValueError:
        return b""


def urls_of(config: CAConfig, root_pem: bytes, present_root_pem: bytes) -> tuple[str, ...]:
    """Return URLs of the authorities that sign with the key of ``root_pem``, in the user's order.

    An authority that is configured without a certificate signs with the key of the cluster's current root.
    """
    wanted = normalized(root_pem.decode("ascii", errors="replace"))
    present = normalized(present_root_pem.decode("ascii", errors="replace"))
    return tuple(
        one.url
        for one in config.external_cas
        if (normalized(one.ca_cert) if one.ca_cert else present) == wanted
    )


def signing_urls(swarm: Swarm) -> tuple[str, ...]:
    """Return URLs of the authorities that sign nodes' certificates now: those of the next root during a rotation."""
    present = swarm.tls_info.trust_root.encode()
    wanted = swarm.rotation.root.encode() if swarm.rotation is not None else present
    return urls_of(swarm.spec.ca_config, wanted, present)


def node_request(csr_pem: bytes, identity: NodeIdentity) -> bytes:
    """Return the body that requests a node's certificate."""
    name = {"OU": ROLE_NAMES[identity.role], "O": identity.cluster_id}
    return msgspec.json.encode(
        {
            "certificate_request": csr_pem.decode("ascii", errors="replace"),
            "hosts": names_of(identity),
            "subject": {"CN": identity.node_id, "names": [name]},
            "profile": "",
        }
    )


def cross_sign_request(wanted: Authority) -> bytes:
    """Return the body that requests ``wanted``, the next root, as an intermediate signed by the authority's root."""
    certificate = wanted.certificate
    key = load_private_key(wanted.key_pem)
    csr = x509.CertificateSigningRequestBuilder().subject_name(certificate.subject).sign(key, hashes.SHA256())
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    return msgspec.json.encode(
        {
            "certificate_request": csr.public_bytes(serialization.Encoding.PEM).decode("ascii"),
            "hosts": [],
            "subject": {"CN": _only(certificate, NameOID.COMMON_NAME) or "", "names": [_names(certificate)]},
            "profile": CROSS_SIGN_PROFILE,
            # cfssl ignores the extensions of a request, so this one is passed separately.
            "extensions": [
                {
                    "id": constraints.oid.dotted_string,
                    "critical": constraints.critical,
                    "value": constraints.value.public_bytes().hex(),
                }
            ],
        }
    )


class _Result(msgspec.Struct, frozen=True):
    certificate: str = ""


class _Error(msgspec.Struct, frozen=True):
    code: int = 0
    message: str = ""


class _Response(msgspec.Struct, frozen=True):
    success: bool = False
    result: _Result | None = None
    errors: tuple[_Error, ...] | None = None


def certificate_in(body: bytes) -> x509.Certificate:
    """Return the certificate in a response.  Raises: Unavailable: it is missing, with the authority's reason."""
    try:
        response = msgspec.json.decode(body, type=_Response)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Unavailable(f"the response is not cfssl's: {error}") from error
    if not response.success or response.result is None:
        reasons = "; ".join(f"{one.message} ({one.code})" for one in (response.errors or ())[:3])
        raise Unavailable(f"certificate signing request failed: {reasons[:500] or 'no reason given'}")
    try:
        return x509.load_pem_x509_certificate(response.result.certificate.encode())
    except ValueError as error:
        raise Unavailable(f"the certificate in the response cannot be read: {error}") from error


def checked_node_certificate(
    certificate: x509.Certificate,
    key: PublicKey,
    identity: NodeIdentity,
    root: x509.Certificate,
    now: datetime,
    *,
    not_before_s: int = 0,
) -> x509.Certificate:
    """Return ``certificate`` if it matches the request exactly: this key, this identity, no additional rights.

    Args:
        not_before_s: Unix seconds.  An earlier certificate counts as revoked (``manager.nodes.revocation``).

    Raises: Unavailable, with the reason why it is refused.
    """
    try:
        reason = _refusal(certificate, key, identity, root, now, not_before_s)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension) as error:
        reason = f"it cannot be read: {error}"
    if reason:
        raise Unavailable(f"its certificate is refused: {reason}")
    return certificate


def _refusal(
    certificate: x509.Certificate,
    key: PublicKey,
    identity: NodeIdentity,
    root: x509.Certificate,
    now: datetime,
    not_before_s: int,
) -> str:
    """Return the first difference between the certificate and the request, or an empty string."""
    subject = {
        NameOID.COMMON_NAME: str(identity.node_id),
        NameOID.ORGANIZATION_NAME: str(identity.cluster_id),
        NameOID.ORGANIZATIONAL_UNIT_NAME: ROLE_NAMES[identity.role],
    }
    if not _is_signed_by(certificate, root):
        return "it is not signed by the cluster's root"
    if certificate.public_key() != key:
        return "it is for another key"
    for oid, wanted in subject.items():
        if _only(certificate, oid) != wanted:
            return f"its subject differs ({certificate.subject.rfc4514_string()[:200]})"
    if (reason := _naming_refusal(certificate, identity)) or (reason := _usage_refusal(certificate)):
        return reason
    if certificate.not_valid_before_utc > now + CLOCK_SKEW:
        return f"it is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
    if certificate.not_valid_after_utc < now + NODE_LIFETIME_MIN:
        return f"it expires too soon ({certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC)"
    if (certificate.not_valid_before_utc + BACKDATE).timestamp() < not_before_s:
        return "it is dated before the node's demotion, so that it counts as revoked"
    return ""


def _naming_refusal(certificate: x509.Certificate, identity: NodeIdentity) -> str:
    names = (
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if _has(certificate, x509.SubjectAlternativeName)
        else x509.SubjectAlternativeName([])
    )
    dns = set(names.get_values_for_type(x509.DNSName))
    if missing := set(names_of(identity)) - dns:
        return f"it lacks the name {min(missing)}"
    if len(names) != len(dns) or dns != set(names_of(identity)):
        return "it has names that were not requested"
    return ""


def _usage_refusal(certificate: x509.Certificate) -> str:
    if _has(certificate, x509.BasicConstraints) and (
        certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    ):
        return "it may sign certificates"
    if _has(certificate, x509.KeyUsage):
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        if usage.key_cert_sign or usage.crl_sign:
            return "its key may sign certificates"
        if not usage.digital_signature:
            return "its key may not sign handshakes"
    if _has(certificate, x509.ExtendedKeyUsage):
        uses = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        if not {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH} <= uses:
            return "it is not for servers and clients (usages 'server auth' and 'client auth')"
    return ""


def root_with_a_name_of_its_own() -> Authority:
    """Return a root that an external authority can sign.

    If issuer and subject have equal names, Go, and thus cfssl, leaves the authority key identifier out of a
    certificate, and OpenSSL then treats the certificate as self-signed.
    """
    return Authority.create(name=f"{ROOT_NAME} {token_hex(4)}")


def checked_cross_signed(
    certificate: x509.Certificate, wanted: x509.Certificate, root: x509.Certificate, now: datetime
) -> x509.Certificate:
    """Return ``certificate`` if it is ``wanted``, the next root, signed by ``root``.  Raises: Unavailable."""
    try:
        is_authority = _has(certificate, x509.BasicConstraints) and (
            certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        )
        is_wanted = certificate.subject == wanted.subject and certificate.public_key() == wanted.public_key()
        if not _is_signed_by(certificate, root) or not is_wanted or not is_authority:
            raise Unavailable(
                f"its certificate is not the next root as an authority (profile {CROSS_SIGN_PROFILE!r})"
            )
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension) as error:
        raise Unavailable(f"its certificate cannot be read: {error}") from error
    if certificate.subject.public_bytes() != wanted.subject.public_bytes():
        # Engines compare names byte by byte.
        raise Unavailable(
            "it changes the encoding of the next root's subject: use a root made by cfssl or by Skep"
        )
    if certificate.issuer == certificate.subject and not _has(certificate, x509.AuthorityKeyIdentifier):
        raise Unavailable(
            "its certificate of the next root has equal subject and issuer and lacks an authority key identifier, "
            "so nodes would treat it as self-signed: use a root with a unique name"
        )
    if not certificate.not_valid_before_utc - CLOCK_SKEW <= now < certificate.not_valid_after_utc:
        raise Unavailable("its certificate of the next root is not valid now")
    return certificate


def _is_signed_by(certificate: x509.Certificate, root: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _has(certificate: x509.Certificate, extension: type[x509.ExtensionType]) -> bool:
    return any(isinstance(one.value, extension) for one in certificate.extensions)


def _only(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> str | None:
    """Return the value of a subject's field, or None unless it has exactly one."""
    values = certificate.subject.get_attributes_for_oid(oid)
    return str(values[0].value) if len(values) == 1 else None


def _names(certificate: x509.Certificate) -> dict[str, str]:
    fields = {
        "C": NameOID.COUNTRY_NAME,
        "ST": NameOID.STATE_OR_PROVINCE_NAME,
        "L": NameOID.LOCALITY_NAME,
        "O": NameOID.ORGANIZATION_NAME,
        "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
    }
    return {name: value for name, oid in fields.items() if (value := _only(certificate, oid)) is not None}
