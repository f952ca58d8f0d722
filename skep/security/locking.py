"""Autolock: encryption of a manager's secret files, and their unlocking.

::

    unlock key      the cluster's, known to its users (SWMKEY-1-...) and kept in the store; never on a manager's disk
       seals
    lock key        one per node: <data>/manager/keys/lock.key; in clear on tmpfs (<run>/lock.key) while unlocked
       seals
    wrapping key of the store, private key of the node: below <data>

So a new unlock key atomically replaces one small file, even while other processes write keys.  The lock key exists only
if the node will be locked at its next start.  The first bytes of a file show whether it is encrypted, and both kinds
can be read.  So turning the lock on or off may stop at any point and resume later.

After a crash of the process, the next process uses the copy on tmpfs.  An orderly stop removes the copy, and so does a
reboot.

Source: swarmkit, ca/keyreadwriter.go, manager/deks.go (what the unlock key protects); encryption.go (the format).
"""

import base64
import binascii
import fcntl
import hashlib
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from skep.errors import FailedPrecondition, InvalidArgument, Unauthenticated
from skep.linux.files import file_exists, replace_file
from skep.paths import Paths

_FORM = "SWMKEY-1-"
_HEAD = b"SKEP-LOCKED-1\n"
_NONCE_BYTES = 12
"""Size of an AES-GCM nonce."""
_NAME_BYTES = 16
"""Length of the digest that identifies a lock key."""
_KEY_BYTES = 32
"""Size of an AES-256 key."""


class Locked(FailedPrecondition):
    """The operation needs the unlock key first."""


class WrongUnlockKey(Unauthenticated):
    """The unlock key does not match."""

    def __init__(self) -> None:
        super().__init__("swarm could not be unlocked: invalid key provided")


def new_unlock_key() -> bytes:
    """Return a new unlock key."""
    return secrets.token_bytes(_KEY_BYTES)


def shown_unlock_key(key: bytes) -> str:
    """Return the key as users see it: ``SWMKEY-1-...``."""
    return _FORM + base64.b64encode(key).decode().rstrip("=")


def parsed_unlock_key(shown: str) -> bytes:
    """Parse a key as users write it.  Raises: InvalidArgument, with Docker's text."""
    digits = shown.removeprefix(_FORM)
    try:
        if not shown.startswith(_FORM):
            raise ValueError("unknown form")
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except (ValueError, binascii.Error) as error:
        raise InvalidArgument("invalid key string") from error


REPLACING = threading.Lock()
"""Held while a thread reads and replaces a locked file, so that no concurrent write is lost.

The private key, which two processes replace, is also guarded by ``KeyLock.replacing``.
"""


class KeyLock:
    """The lock of one node.  Reads and writes files, so it blocks.

    Only the manager process turns it on or off, and only the node process unlocks it.  Owners of files read and write
    them through it.
    """

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    @property
    def is_on(self) -> bool:
        """Whether the node will be locked after its next start."""
        return file_exists(self._paths.lock_key)

    @property
    def is_locked(self) -> bool:
        """Whether the unlock key is needed now."""
        return self.is_on and self._key_in_clear() is None

    def unlock(self, unlock_key: bytes) -> None:
        """Open the lock until the node stops.

        Raises: WrongUnlockKey; FailedPrecondition: there is no lock, or it is damaged.
        """
        key = self._opened(unlock_key)
        self._paths.run.mkdir(parents=True, exist_ok=True)
        replace_file(self._paths.open_lock_key, key, mode=0o600, is_durable=False)

    def forget(self) -> None:
        """Close the lock, if there is one."""
        self._paths.open_lock_key.unlink(missing_ok=True)

    def turn(self, unlock_key: bytes | None) -> bool:
        """Lock the files on disk with ``unlock_key``, or unlock them if it is None.  Return whether anything changed.

        A call after a crash in the middle completes the change.  Raises: Locked; FailedPrecondition: a file is damaged.
        """
        with self.replacing():
            return self._turn(unlock_key)

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Wait until no other thread or process of this node replaces its keys, and exclude them for the block."""
        self._paths.run.mkdir(parents=True, exist_ok=True)
        with REPLACING:
            guard = os.open(self._paths.keys_guard, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(guard, fcntl.LOCK_EX)
                yield
            finally:
                os.close(guard)

    def _turn(self, unlock_key: bytes | None) -> bool:
        if unlock_key is None:
            return self._turn_off()
        has_changed = self._keep_sealed(unlock_key)
        for path in self._paths.locked_files:
            if file_exists(path) and not path.read_bytes().startswith(_HEAD):
                self.write(path, path.read_bytes())
                has_changed = True
        return has_changed

    def read(self, path: Path) -> bytes:
        """Return the decrypted content of a file.

        Raises: FileNotFoundError; Locked; FailedPrecondition: it is damaged.
        """
        content = path.read_bytes()
        if not content.startswith(_HEAD):
            return content
        try:
            return _unsealed(content, self._required_key(), path.name)
        except InvalidTag as error:
            raise FailedPrecondition(
                f"{path} is damaged, or from another node: restore it from a backup"
            ) from error

    def write(self, path: Path, content: bytes, *, mode: int = 0o600) -> None:
        """Replace a file, locked if the lock is on.  Raises: Locked."""
        if self.is_on:
            content = _sealed(content, self._required_key(), path.name)
        replace_file(path, content, mode=mode)

    # --- helpers ----------------------------------------------------------------------------------------------

    def _keep_sealed(self, unlock_key: bytes) -> bool:
        """Encrypt the lock key, created if missing, with ``unlock_key``.  Return whether the file changed."""
        path = self._paths.lock_key
        if not self.is_on:
            key = secrets.token_bytes(_KEY_BYTES)
            # Write the copy on tmpfs first. Without it, the lock would be closed although the node runs unlocked.
            replace_file(self._paths.open_lock_key, key, mode=0o600, is_durable=False)
        elif self._opened_if_right(unlock_key) is not None:
            if self._key_in_clear() is None:
                self.unlock(unlock_key)
            return False
        else:
            key = self._required_key()  # the unlock key was rotated
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, _name(key) + _sealed(key, unlock_key, path.name), mode=0o600)
        return True

    def _turn_off(self) -> bool:
        if not self.is_on:
            return False
        for path in self._paths.locked_files:
            if file_exists(path):
                replace_file(path, self.read(path), mode=0o600)
        self._paths.lock_key.unlink()
        self.forget()
        return True

    def _opened_if_right(self, unlock_key: bytes) -> bytes | None:
        try:
            return self._opened(unlock_key)
        except WrongUnlockKey:
            return None

    def _opened(self, unlock_key: bytes) -> bytes:
        path = self._paths.lock_key
        try:
            name, content = path.read_bytes()[:_NAME_BYTES], path.read_bytes()[_NAME_BYTES:]
        except FileNotFoundError as error:
            raise FailedPrecondition("swarm is not locked") from error
        if not content.startswith(_HEAD):
            raise FailedPrecondition(f"{path} is damaged: restore it from a backup")
        try:
            key = _unsealed(content, unlock_key, path.name)
        except (InvalidTag, ValueError) as error:
            raise WrongUnlockKey from error
        if _name(key) != name:
            raise FailedPrecondition(f"{path} is damaged: restore it from a backup")
        return key

    def _key_in_clear(self) -> bytes | None:
        """Return the lock key from tmpfs, if it belongs to the lock on the disk."""
        try:
            key = self._paths.open_lock_key.read_bytes()
            name = self._paths.lock_key.read_bytes()[:_NAME_BYTES]
        except FileNotFoundError:
            return None
        return key if _name(key) == name else None

    def _required_key(self) -> bytes:
        key = self._key_in_clear()
        if key is None:
            raise Locked("this node's keys are locked: run docker swarm unlock")
        return key


def _name(key: bytes) -> bytes:
    """Return an identifier of a lock key, which does not reveal the key."""
    return hashlib.sha256(b"name of " + key).digest()[:_NAME_BYTES]


def _sealed(content: bytes, key: bytes, name: str) -> bytes:
    nonce = os.urandom(_NONCE_BYTES)
    return _HEAD + nonce + AESGCM(key).encrypt(nonce, content, name.encode())


def _unsealed(content: bytes, key: bytes, name: str) -> bytes:
    """Decrypt a file.  Raises: InvalidTag: another key, or damaged; ValueError: the key is invalid."""
    body = content[len(_HEAD) :]
    return AESGCM(key).decrypt(body[:_NONCE_BYTES], body[_NONCE_BYTES:], name.encode())
