"""Certificates for the managers' API (``up --tls``): an authority, and a server certificate for each manager."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from skep.playground.description import Cluster, Node
from skep.security.keys import private_pem

PORT = 2376
"""Docker's port for an API by TLS."""
_DAYS = 30
"""Validity of the certificates in days."""
_USES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def folder(directory: Path) -> Path:
    """Return the directory of the authority's certificate, below the playground's."""
    return directory / "tls"


def authority_file(directory: Path) -> Path:
    """Return the file with the certificate by which API clients verify managers."""
    return folder(directory) / "ca.pem"


def configuration(home: Path, authority: Path) -> str:
    """Return the lines of a manager's ``skep.toml`` that serve its API by TLS."""
    return (
        f'hosts = ["tcp://0.0.0.0:{PORT}"]\n'
        f'tls-cert = "{home / "server.pem"}"\n'
        f'tls-key = "{home / "server-key.pem"}"\n'
        f'tls-ca = "{authority}"\n'
    )


def write(directory: Path, cluster: Cluster) -> None:
    """Create the authority, and a key pair in each manager's directory.  The authority's key is discarded.  Blocks."""
    key, name = ec.generate_private_key(ec.SECP256R1()), _name("API of the playground")
    folder(directory).mkdir(parents=True, exist_ok=True)
    authority_file(directory).write_bytes(_pem(_certificate(name, key.public_key(), name, key)))
    for node in cluster.nodes:
        if node.role == "manager":
            _write_pair(directory / node.name, node, name, key)


def _write_pair(home: Path, node: Node, issuer: x509.Name, issuer_key: ec.EllipticCurvePrivateKey) -> None:
    home.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName(
        [
            *(x509.DNSName(name) for name in ("localhost", node.name)),
            *(x509.IPAddress(ip_address(address)) for address in ("127.0.0.1", node.addr)),
        ]
    )
    certificate = _certificate(_name(node.name), key.public_key(), issuer, issuer_key, names)
    (home / "server.pem").write_bytes(_pem(certificate))
    file = home / "server-key.pem"
    file.touch(mode=0o600)
    file.write_bytes(private_pem(key))


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    names: x509.SubjectAlternativeName | None = None,
) -> x509.Certificate:
    """Return a certificate, which is an authority's without ``names``."""
    now, is_root = datetime.now(UTC), names is None
    uses = dict.fromkeys(_USES, False) | {"key_cert_sign": is_root, "digital_signature": True}
    own = x509.SubjectKeyIdentifier.from_public_key(key)
    parent = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    builder = (
        x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=_DAYS))
        # Python since 3.13 refuses certificates without these extensions.
        .add_extension(own, critical=False)
        .add_extension(parent, critical=False)
        .add_extension(x509.KeyUsage(**uses), critical=True)
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
    )
    if names is not None:
        builder = builder.add_extension(names, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
