"""The key that opens the store's data keys, where this manager keeps it."""

from skep.errors import FailedPrecondition
from skep.paths import Paths
from skep.security.locking import KeyLock
from skep.store.etcd.cipher import KEY_BYTES, new_wrapping_key


def load_wrapping_key(paths: Paths) -> bytes:
    """The wrapping key.  Raises: FailedPrecondition: it is missing or damaged; Locked."""
    path = paths.wrapping_key
    try:
        key = KeyLock(paths).read(path)
    except FileNotFoundError as error:
        raise FailedPrecondition(
            f"{path} is missing, and without it the cluster's data cannot be read: restore it from a copy of the "
            "data directory, or restore the cluster with skep restore"
        ) from error
    if len(key) != KEY_BYTES:
        raise FailedPrecondition(f"{path} is damaged: {len(key)} bytes instead of {KEY_BYTES}")
    return key


def save_wrapping_key(paths: Paths, key: bytes) -> None:
    """Keep ``key``, readable for root only, safely on disk.  Raises: Locked."""
    paths.manager_keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    KeyLock(paths).write(paths.wrapping_key, key)


def founding_wrapping_key(paths: Paths) -> bytes:
    """The wrapping key; made at the first start of the first manager.

    Raises: FailedPrecondition: it is lost or damaged; Locked.
    """
    if paths.root_ca_key.exists() and not paths.wrapping_key.exists():
        save_wrapping_key(paths, new_wrapping_key())
    return load_wrapping_key(paths)
