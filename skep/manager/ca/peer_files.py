"""Certificate files for etcd (the key pair, the roots, the revocation list), and the order of restarts for new roots.

The files are on tmpfs and are replaced atomically.  etcd reads the key pair and the list at each handshake, and the
roots when it starts.  Until a restart, a member trusts the old root.  It also accepts certificates of the new root,
because the old root has cross-signed that.  So the restarts are not urgent.  The members restart one after another, the
leader's member last, and each only if the others have a quorum.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path

from skep.linux.files import replace_file
from skep.model.node import Node
from skep.model.values.ids import NodeId
from skep.security.crl import listed_serials, revocation_list

REVOKED_FILE = "removed.crl"

SETTLED_S = 3.0
"""Seconds between the restarts of two members.  The first needs time to connect, and perhaps for an election."""


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


def is_my_turn(own: NodeId, nodes: Iterable[Node], wanted: str) -> bool:
    """Return whether the manager ``own`` may restart its member now.

    A joining manager is ignored, because its certificate comes from the new root, and it may itself wait for these
    restarts.

    Args:
        wanted: Digest of the roots that every member should trust.
    """
    managers = [node for node in nodes if node.has_joined_as_manager or node.id == own]
    order = sorted(managers, key=lambda node: (_leads(node), node.id))
    staying = sum(node.is_reachable_manager for node in order if node.id != own)
    if staying <= len(managers) // 2 and len(managers) > 2:
        return False  # with two managers, the quorum is lost for a moment in any case
    for node in order:
        if node.id == own:
            return node.is_reachable_manager or len(managers) == 1
        if node.is_reachable_manager and node.peer_roots != wanted:
            return False
    return False


class RestartTurn:
    """Waits until the member that restarted last has had time to connect."""

    def __init__(self) -> None:
        self._since: float | None = None

    def has_come(self, own: NodeId, nodes: Sequence[Node], wanted: str, now: float) -> bool:
        """Return whether ``own`` has been next for long enough at ``now``.  A single manager does not wait."""
        if not is_my_turn(own, nodes, wanted):
            self._since = None
            return False
        if sum(node.has_joined_as_manager for node in nodes) < 2:
            return True
        if self._since is None:
            self._since = now
        return now - self._since >= SETTLED_S


def _leads(node: Node) -> bool:
    return node.manager_status is not None and node.manager_status.leader
