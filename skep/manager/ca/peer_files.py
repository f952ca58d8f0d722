"""What etcd reads of this manager's certificates: the key pair, the roots, and whose certificates count for nothing.

They lie on tmpfs and are replaced whole: etcd reads key pair and list at each handshake, the roots when it starts.
"""

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from skep.linux.files import replace_file
from skep.security.crl import revocation_list

REVOKED_FILE = "removed.crl"


class PeerFiles:
    """The files below one directory.

    Args:
        kept: directory that outlives a reboot, for the list: the first handshakes after one come before the store.
        restart: restarts the member, which reads the roots once; returns when it serves again.
    """

    def __init__(self, directory: Path, kept: Path, restart: Callable[[], Awaitable[None]]) -> None:
        self.directory = directory
        self.restart = restart
        self._kept = kept
        self._serials: frozenset[str] | None = None

    def write_revoked(self, serials: Iterable[str]) -> None:
        """Have etcd refuse the certificates with these serial numbers from the next handshake on."""
        revoked = frozenset(serials)
        if revoked == self._serials:
            return
        content = revocation_list(revoked)
        replace_file(self.directory / REVOKED_FILE, content, is_durable=False)
        replace_file(self._kept / REVOKED_FILE, content)
        self._serials = revoked


def place_revoked(directory: Path, kept: Path) -> Path:
    """Put the list in its place before etcd starts, as it was when this manager last ran; gives its path."""
    try:
        content = (kept / REVOKED_FILE).read_bytes()
    except FileNotFoundError:
        content = revocation_list(())
    replace_file(directory / REVOKED_FILE, content, is_durable=False)
    return directory / REVOKED_FILE
