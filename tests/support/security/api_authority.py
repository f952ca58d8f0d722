"""A user's own certificate authority, for the settings ``tls-cert``, ``tls-key`` and ``tls-ca``."""

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

USES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


class Authority:
    """Signs the certificates of a server and a client.  Its files have the form of dockerd's ``--tls...`` options."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(directory.name)
        self.root = self._write("ca.crt", self._certificate(self._name, self._key.public_key(), is_root=True))

    def pair(self, name: str) -> tuple[Path, Path]:
        """Issue a server certificate for 127.0.0.1, and return the files of certificate and key."""
        key = ec.generate_private_key(ec.SECP256R1())
        path = self._directory / f"{name}.key"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return self._write(f"{name}.crt", self._certificate(_name(name), key.public_key())), path

    def _certificate(
        self, name: x509.Name, key: ec.EllipticCurvePublicKey, *, is_root: bool = False
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
        own = x509.SubjectKeyIdentifier.from_public_key(key)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = x509.CertificateBuilder(self._name, name, key, x509.random_serial_number())
        uses = dict.fromkeys(USES, False) | {"key_cert_sign": is_root, "digital_signature": True}
        return (
            # Python 3.13 and later require these three extensions.
            builder.add_extension(own, critical=False)
            .add_extension(issuer, critical=False)
            .add_extension(x509.KeyUsage(**uses), critical=True)
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
            .add_extension(names, critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _write(self, name: str, certificate: x509.Certificate) -> Path:
        path = self._directory / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def an_authority(directory: Path) -> Authority:
    directory.mkdir()
    return Authority(directory)
