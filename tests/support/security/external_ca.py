"""External certificate authorities with mutual TLS: a fake that can issue wrong certificates, and the cfssl
program.
"""

import json
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from skep.security.authority import Authority, pem
from skep.security.keys import load_private_key, new_private_key, private_pem
from skep.security.tls import _in_memory

NAMES = {
    "CN": NameOID.COMMON_NAME,
    "O": NameOID.ORGANIZATION_NAME,
    "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "C": NameOID.COUNTRY_NAME,
}
USES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


class Certificate(msgspec.Struct, kw_only=True):
    """Fields of the certificate to sign, which ``lie`` can change."""

    key: Any
    subject: list[tuple[str, str]]
    hosts: list[str]
    root: Authority
    is_authority: bool = False
    uses: tuple[Any, ...] = USES
    signs_certificates: bool = False
    not_before: datetime
    not_after: datetime

    def signed(self) -> bytes:
        usage = x509.KeyUsage(
            digital_signature=True, key_encipherment=True, key_cert_sign=self.signs_certificates,
            content_commitment=False, data_encipherment=False, key_agreement=False, crl_sign=False,
            encipher_only=False, decipher_only=False,
        )  # fmt: skip
        written = _ASN1Type.PrintableString  # the type that Go writes
        attributes = [x509.NameAttribute(NAMES[name], value, _type=written) for name, value in self.subject]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(attributes))
            .issuer_name(self.root.certificate.subject)
            .public_key(self.key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.not_before)
            .not_valid_after(self.not_after)
            .add_extension(x509.BasicConstraints(ca=self.is_authority, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(_issuer_key(self.root), critical=False)
        )  # fmt: skip
        if self.uses:
            builder = builder.add_extension(x509.ExtendedKeyUsage(self.uses), critical=False)
        if self.hosts:
            names = x509.SubjectAlternativeName([x509.DNSName(name) for name in self.hosts])
            builder = builder.add_extension(names, critical=False)
        return pem(builder.sign(load_private_key(self.root.key_pem), hashes.SHA256()))


class ExternalAuthority:
    """Signs with the key of ``root`` for callers with a certificate of one of the roots ``trusted``.

    ``requests`` are the received bodies, and ``callers`` the common names of their senders.

    ``lie`` changes a certificate before it is signed.  ``respond`` replaces the whole response.
    """

    def __init__(self, root: Authority, *trusted: Authority) -> None:
        self.root = root
        self.trusted = trusted
        self.requests: list[dict[str, Any]] = []
        self.callers: list[str] = []
        self.lie: Callable[[Certificate], object] = lambda _: None
        self.respond: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None
        self.url = ""

    async def sign(self, request: web.Request) -> web.StreamResponse:
        """Handle ``POST /api/v1/cfssl/sign``."""
        body = await request.json()
        self.requests.append(body)
        peer = request.transport.get_extra_info("peercert") if request.transport else None
        self.callers += [value for names in peer["subject"] for key, value in names if key == "commonName"]
        if self.respond is not None:
            return await self.respond(request)
        return web.json_response(
            {
                "success": True,
                "result": {"certificate": self.signed(body).decode()},
                "errors": [],
                "messages": [],
            }
        )

    def signed(self, body: dict[str, Any]) -> bytes:
        """Sign the requested certificate, changed by ``lie``."""
        csr = x509.load_pem_x509_csr(body["certificate_request"].encode())
        now = datetime.now(UTC)
        names = [(key, value) for name in body["subject"]["names"] for key, value in name.items()]
        certificate = Certificate(
            key=csr.public_key(),
            subject=[*names, ("CN", body["subject"]["CN"])],
            hosts=body["hosts"],
            root=self.root,
            is_authority=body["profile"] == "CA",
            signs_certificates=body["profile"] == "CA",
            not_before=now - timedelta(minutes=5),
            not_after=now + timedelta(days=90),
        )
        self.lie(certificate)
        return certificate.signed()

    @asynccontextmanager
    async def serving(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator["ExternalAuthority"]:
        """Serve until the block ends."""
        app = web.Application()
        app.router.add_post("/api/v1/cfssl/sign", self.sign)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port, ssl_context=self._context(host))
            await site.start()
            bound = port or runner.addresses[0][1]
            self.url = f"https://{host}:{bound}/api/v1/cfssl/sign"
            yield self
        finally:
            await runner.cleanup()

    def _context(self, host: str) -> ssl.SSLContext:
        certificate, key = server_certificate(self.root, host)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        trusted = b"".join(one.root_pem for one in (self.root, *self.trusted))
        context.load_verify_locations(cadata=trusted.decode())
        with _in_memory(certificate) as certificate_path, _in_memory(key) as key_path:
            context.load_cert_chain(certificate_path, key_path)
        return context


def server_certificate(root: Authority, host: str) -> tuple[bytes, bytes]:
    """Return a certificate and its key (PEM) for a server at ``host``, an address or a name."""
    key = new_private_key()
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "external-ca")]))
        .issuer_name(root.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([_general_name(host)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(USES), critical=False)
        .add_extension(_issuer_key(root), critical=False)
    )
    return pem(builder.sign(load_private_key(root.key_pem), hashes.SHA256())), private_pem(key)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _issuer_key(root: Authority) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(root.certificate.public_key())  # type: ignore[arg-type]


CFSSL = Path(sys.prefix) / "libexec/skep/cfssl"
USAGES = ["signing", "key encipherment", "server auth", "client auth"]
CONFIG = {
    "signing": {
        "default": {"usages": USAGES, "expiry": "2160h"},
        "profiles": {
            "CA": {
                "usages": ["cert sign", "crl sign"],
                "expiry": "43800h",
                "ca_constraint": {"is_ca": True},
            }
        },
    }
}


def cfssl_command(
    directory: Path, host: str, port: int, root: Authority, trusted: Sequence[Authority]
) -> list[str]:
    """Return ``cfssl serve`` with this root, for callers with certificates of the roots ``trusted``.  Write its
    files.
    """
    certificate, key = server_certificate(root, host)
    files = {
        "root.crt": root.root_pem,
        "root.key": root.key_pem,
        "tls.crt": certificate,
        "tls.key": key,
        "trusted.crt": b"".join(one.root_pem for one in trusted),
        "config.json": json.dumps(CONFIG).encode(),
    }
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return [
        *(str(CFSSL), "serve", "-address", host, "-port", str(port), "-config", "config.json"),
        *("-ca", "root.crt", "-ca-key", "root.key", "-tls-cert", "tls.crt", "-tls-key", "tls.key"),
        *("-mutual-tls-ca", "trusted.crt"),
    ]
