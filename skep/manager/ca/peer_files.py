"""Certificate files for etcd: the key pair, the roots, and the revocation list.

The files are on tmpfs and are replaced atomically.  etcd reads the key pair and the list at each handshake, and the
roots when it starts.
"""

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from skep.linux.files import replace_file
from skep.security.crl import listed_serials, revocation_list

REVOKED_FILE = "removed.crl"


class PeerFiles:
    """The files in one directory.

    Args:
        kept: Directory for a copy of the list that survives a reboot, because the first handshakes after a reboot take
            place before the store can be read.
        restart: Restarts the member, which reads the roots only when it starts, and returns when it serves again.
        cut: Ends the connections of other members to this one.
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
        """Make etcd reject the certificates with these serial numbers, including on open connections."""
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
    """Return the serial numbers that etcd has rejected since it started."""
    try:
        return listed_serials(path.read_bytes())
    except (OSError, ValueError):
        return frozenset()


def place_revoked(directory: Path, kept: Path) -> Path:
    """Write the list from this manager's last run before etcd starts, and return its path."""
    try:
        content = (kept / REVOKED_FILE).read_bytes()
    except FileNotFoundError:
        content = revocation_list(())
    replace_file(directory / REVOKED_FILE, content, is_durable=False)
    return directory / REVOKED_FILE
