"""A node's key pair with its trusted root, and their three files.

``<data>/certificates`` contains ``swarm-root-ca.crt``, ``swarm-node.crt`` and ``swarm-node.key`` (Docker's names).
Each file is replaced atomically.  Key and certificate take two renames.  After a crash between the two, the new key
stands next to the old certificate.  The new certificate is still in its temporary file, where ``load`` finds it.
"""

import os
from contextlib import nullcontext
from datetime import datetime
from functools import cached_property
from pathlib import Path

from cryptography import x509

from skep.errors import FailedPrecondition, NotFound
from skep.linux.files import NEW_SUFFIX, file_exists, replace_file, sync_directory, write_new
from skep.security.identity import NodeIdentity, identity_of
from skep.security.keys import load_private_key
from skep.security.locking import KeyLock

ROOT_FILE = "swarm-root-ca.crt"
CERTIFICATE_FILE = "swarm-node.crt"
KEY_FILE = "swarm-node.key"


class KeyPair:
    """A certificate chain, its private key, and the root bundle that it was issued under (all PEM).  Immutable."""

    def __init__(self, *, certificate_pem: bytes, key_pem: bytes, root_pem: bytes) -> None:
        """Raise FailedPrecondition if a part is unreadable, or key and certificate do not belong together."""
        self.certificate_pem = certificate_pem
        self.key_pem = key_pem
        self.root_pem = root_pem
        if load_private_key(key_pem).public_key() != self.certificate.public_key():
            raise FailedPrecondition("the node's certificate does not belong to its private key")

    @cached_property
    def certificate(self) -> x509.Certificate:
        """The node's own certificate, first of the chain.  Raises: FailedPrecondition."""
        try:
            return x509.load_pem_x509_certificate(self.certificate_pem)
        except ValueError as error:
            raise FailedPrecondition(f"the node's certificate cannot be read: {error}") from error

    @cached_property
    def chain(self) -> tuple[x509.Certificate, ...]:
        """The node's certificate, followed during a root rotation by the new root signed by the old one."""
        return tuple(x509.load_pem_x509_certificates(self.certificate_pem))

    @cached_property
    def identity(self) -> NodeIdentity:
        """The node's identity."""
        return identity_of(self.certificate)

    @property
    def not_before(self) -> datetime:
        """Start of the node certificate's validity, in UTC."""
        return self.certificate.not_valid_before_utc

    @property
    def not_after(self) -> datetime:
        """End of the node certificate's validity, in UTC."""
        return self.certificate.not_valid_after_utc

    def with_root(self, root_pem: bytes) -> "KeyPair":
        """Return the same key pair with another root bundle, for the rotation of the cluster's root."""
        if root_pem == self.root_pem:
            return self
        return KeyPair(certificate_pem=self.certificate_pem, key_pem=self.key_pem, root_pem=root_pem)

    def __repr__(self) -> str:
        return f"KeyPair({self.identity!r}, until {self.not_after.isoformat()})"


def save(pair: KeyPair, directory: Path, lock: KeyLock | None = None) -> None:
    """Write the three files, so that ``load`` returns either the old or the new pair at any time.

    Args:
        lock: Writes the key, locked if the lock is on.  None if this directory is never locked.

    Raises: Locked.
    """
    with lock.replacing() if lock is not None else nullcontext():
        _save(pair, directory, lock)


def _save(pair: KeyPair, directory: Path, lock: KeyLock | None) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _complete(directory, lock)
    temporary = directory / (CERTIFICATE_FILE + NEW_SUFFIX)
    replace_file(directory / ROOT_FILE, pair.root_pem, mode=0o644)
    write_new(temporary, pair.certificate_pem, mode=0o644)
    if lock is None:
        replace_file(directory / KEY_FILE, pair.key_pem, mode=0o600)
    else:
        lock.write(directory / KEY_FILE, pair.key_pem)
    os.replace(temporary, directory / CERTIFICATE_FILE)
    sync_directory(directory)


def load(directory: Path, lock: KeyLock | None = None) -> KeyPair:
    """Return the saved key pair.  Another process may save one concurrently.

    Raises: NotFound: no pair was saved; FailedPrecondition: the files are damaged; Locked.
    """
    try:
        return _read(directory, lock)
    except FailedPrecondition:
        return _read(directory, lock)  # the key was read before its replacement, the certificate after it


def _read(directory: Path, lock: KeyLock | None) -> KeyPair:
    """Return matching key and certificate.  Tries the current certificate twice, because another process may have just
    written it.
    """
    try:
        root_pem = (directory / ROOT_FILE).read_bytes()
        key = directory / KEY_FILE
        key_pem = key.read_bytes() if lock is None else lock.read(key)
        (directory / CERTIFICATE_FILE).stat()
    except FileNotFoundError as error:
        raise NotFound(f"this node has no certificate ({error.filename} is missing)") from error
    for name in (CERTIFICATE_FILE, CERTIFICATE_FILE + NEW_SUFFIX):
        try:
            found = (directory / name).read_bytes()
            return KeyPair(certificate_pem=found, key_pem=key_pem, root_pem=root_pem)
        except (FileNotFoundError, FailedPrecondition):
            continue
    certificate_pem = (directory / CERTIFICATE_FILE).read_bytes()
    return KeyPair(certificate_pem=certificate_pem, key_pem=key_pem, root_pem=root_pem)


def _complete(directory: Path, lock: KeyLock | None) -> None:
    """Finish a save that was interrupted between its two renames.  Only writers call it: readers change nothing."""
    temporary = directory / (CERTIFICATE_FILE + NEW_SUFFIX)
    if not file_exists(temporary):
        return
    try:
        pair = _read(directory, lock)
    except (NotFound, FailedPrecondition):
        return  # it was the first save
    if pair.certificate_pem == temporary.read_bytes():
        os.replace(temporary, directory / CERTIFICATE_FILE)
        sync_directory(directory)
