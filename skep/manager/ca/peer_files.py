"""What etcd reads of this manager's certificates: the key pair, the roots, and the revocation list.

The files are on tmpfs and are replaced atomically: etcd reads key pair and list at each handshake, the roots at its
start.
"""

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from skep.linux.files import replace_file
from skep.security.crl import listed_serials, revocation_list

REVOKED_FILE = "removed.crl"


class PeerFiles:
    """The files in one directory.

    Args:
        kept: directory that survives a reboot, for the list: the first handshakes after one come before the store.
        restart: restarts the member, which reads the roots only at its start; returns when it serves again.
        cut: ends the connections of other members to this one.
    """

    def __init__(
        self,
        directory: Path,
        kept: Path,
        restart: Callable[[], Awaitable[None]],
        cut: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory = directory
        self.restart = restart
        self._cut = cut
        self._kept = kept
        self._serials: frozenset[str] | None = None

    def refuse(self, serials: Iterable[str]) -> None:
        """Have etcd reject the certificates with these serial numbers, also on open connections."""
        revoked = frozenset(serials)
        if revoked == self._serials:
            return
        known = self._serials if self._serials is not None else _read_serials(self.directory / REVOKED_FILE)
        self._write(revoked)
        if revoked - known:
            self._cut()

    def _write(self, revoked: frozenset[str]) -> None:
        content = revocation_list(revoked)
        replace_file(self.directory / REVOKED_FILE, content, is_durable=False)
        replace_file(self._kept / REVOKED_FILE, content)
        self._serials = revoked


def _read_serials(path: Path) -> frozenset[str]:
    """The serial numbers that etcd has rejected since its start."""
    try:
        return listed_serials(path.read_bytes())
    except (OSError, ValueError):
        return frozenset()


def place_revoked(directory: Path, kept: Path) -> Path:
    """Write the list before etcd starts, as of this manager's last run; gives its path."""
    try:
        content = (kept / REVOKED_FILE).read_bytes()
    except FileNotFoundError:
        content = revocation_list(())
    replace_file(directory / REVOKED_FILE, content, is_durable=False)
    return directory / REVOKED_FILE
