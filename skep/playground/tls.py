"""Certificates for the managers' API (``up --tls``): an authority, and a server certificate for each manager."""

from datetime import timedelta
from pathlib import Path
from typing import Final

from skep.playground.description import PlaygroundDescription, PlaygroundNode
from skep.security.authority import Authority
from skep.security.keys import new_private_key, private_pem

PORT = 2376
"""Docker's port for the API over TLS."""
_LIFETIME: Final = timedelta(days=30)
"""Validity of the managers' certificates.  Short, because a playground exists only for days."""


def folder(directory: Path) -> Path:
    """Return the directory with the authority's certificate, inside the playground's directory."""
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


def write(directory: Path, cluster: PlaygroundDescription) -> None:
    """Create the authority, and a key pair in each manager's directory.  The authority's key is discarded.  Blocks."""
    authority = Authority.create(name="API of the playground")
    folder(directory).mkdir(parents=True, exist_ok=True)
    authority_file(directory).write_bytes(authority.root_pem)
    for node in cluster.nodes:
        if node.role == "manager":
            _write_pair(directory / node.name, node, authority)


def _write_pair(home: Path, node: PlaygroundNode, authority: Authority) -> None:
    home.mkdir(parents=True, exist_ok=True)
    key = new_private_key()
    addresses = ("localhost", "127.0.0.1", node.addr)
    (home / "server.pem").write_bytes(
        authority.issue_server(key.public_key(), node.name, addresses, _LIFETIME)
    )
    file = home / "server-key.pem"
    file.touch(mode=0o600)
    file.write_bytes(private_pem(key))
