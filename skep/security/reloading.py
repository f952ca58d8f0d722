"""Reloads the node's key pair in its manager after the agent on the same machine has renewed it."""

from pathlib import Path

from skep.security import keypair
from skep.security.keypair import KeyPair
from skep.security.locking import KeyLock


class KeyPairFiles:
    """The key pair in a directory, which is read again after one of its files was replaced."""

    def __init__(self, directory: Path, lock: KeyLock | None = None) -> None:
        """``lock`` is the lock of that key pair, and must be open."""
        self._directory = directory
        self._lock = lock
        self._seen: tuple[int, ...] = ()

    def changed(self) -> KeyPair | None:
        """Return the key pair if it has changed since the last call.  The first call always returns it.

        Raises: NotFound, FailedPrecondition: it cannot be read.  The next call tries again.
        """
        stamp = _stamp(self._directory)
        if stamp == self._seen:
            return None
        pair = keypair.load(self._directory, self._lock)
        self._seen = stamp
        return pair

    def save(self, pair: KeyPair) -> None:
        """Replace the key pair."""
        keypair.save(pair, self._directory, self._lock)


def _stamp(directory: Path) -> tuple[int, ...]:
    """Return a value that changes when a file is replaced, which changes its inode."""
    numbers: list[int] = []
    for name in (keypair.ROOT_FILE, keypair.CERTIFICATE_FILE, keypair.KEY_FILE):
        try:
            status = (directory / name).stat()
        except FileNotFoundError:
            numbers += (0, 0)
        else:
            numbers += (status.st_ino, status.st_mtime_ns)
    return tuple(numbers)
