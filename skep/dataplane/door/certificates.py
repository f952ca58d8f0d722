"""Files with the certificates of the front door, which HAProxy reads when it starts and when it is reloaded."""

import os
import ssl
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from skep.linux.files import replace_file

LIST: Final = "crt-list"
"""Names each certificate's file and the only host for which it is used, whatever other names it has."""


def certificate_file(host: str) -> str:
    """Return the file name of a host's certificate."""
    return f"{host.replace('*', '_')}.pem"


def certificate_list(hosts: Mapping[str, str], directory: str) -> str:
    """Return the content of the list, with ``directory`` as HAProxy sees it."""
    return "".join(f"{directory}/{certificate_file(host)} {host}\n" for host in sorted(hosts))


def write_certificates(directory: Path, certificates: Mapping[str, str], seen_at: str) -> None:
    """Write changed certificates, readable by root only, and remove the others.  Raises: OSError.

    Args:
        certificates: Chain and key (PEM) by host.
        seen_at: The directory as HAProxy sees it.
    """
    wanted = {certificate_file(host): pem.encode() for host, pem in certificates.items()}
    wanted[LIST] = certificate_list(certificates, seen_at).encode()
    for name, data in wanted.items():
        path = directory / name
        if not path.exists() or path.read_bytes() != data:
            replace_file(path, data, mode=0o600, is_durable=False)
    for name in os.listdir(directory):
        if name not in wanted:
            (directory / name).unlink(missing_ok=True)


def why_not_loadable(pem: str, directory: Path) -> str:
    """Return why OpenSSL refuses a chain with its key, or an empty text.  ``directory`` has no copy afterwards."""
    with tempfile.NamedTemporaryFile(dir=directory) as file:  # mode 0600
        file.write(pem.encode())
        file.flush()
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(file.name, password="")
        except (ssl.SSLError, ValueError, OSError) as error:
            return str(error)
    return ""
