"""The key that wraps the store's data keys, on this manager's disk.

One file contains the key.  While the key is being replaced (``manager.eviction``), the file also contains the
candidates for its replacement.  A manager confirms a key only after it has stored it durably.  A manager finds the key
that the store uses by trying each one.
"""

import asyncio

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import FailedPrecondition, InvalidArgument, SkepError
from skep.linux.files import file_exists
from skep.paths import Paths
from skep.security.locking import REPLACING, KeyLock
from skep.store.etcd.encryption.cipher import KEY_BYTES, WRAPPING_KEYS_MAX, new_wrapping_key, split_keys
from skep.store.etcd.store import EtcdStore

log = structlog.get_logger(__name__)


def load_wrapping_keys(paths: Paths) -> bytes:
    """Return the concatenated wrapping keys.  Raises: FailedPrecondition: the file is missing or damaged; Locked."""
    path = paths.wrapping_key
    try:
        keys = KeyLock(paths).read(path)
    except FileNotFoundError as error:
        raise FailedPrecondition(
            f"{path} is missing, and without it the cluster's data cannot be read: restore it from a copy of the "
            "data directory, or restore the cluster with skep restore"
        ) from error
    if not keys or len(keys) % KEY_BYTES:
        raise FailedPrecondition(f"{path} is damaged: {len(keys)} bytes instead of {KEY_BYTES}")
    return keys


def save_wrapping_keys(paths: Paths, keys: bytes) -> None:
    """Write ``keys`` durably, readable only for root.  Raises: Locked."""
    paths.manager_keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    KeyLock(paths).write(paths.wrapping_key, keys)


def founding_wrapping_key(paths: Paths) -> bytes:
    """Return the wrapping key.  The first manager creates it at its first start.

    Raises:
        FailedPrecondition: The key is lost or damaged.
        Locked: The keys on disk are locked.
    """
    if file_exists(paths.root_ca_key) and not file_exists(paths.wrapping_key):
        save_wrapping_keys(paths, new_wrapping_key())
    return load_wrapping_keys(paths)


class WrappingKeys:
    """Wrapping keys on one manager's disk.  A write runs in a thread and continues if the caller is cancelled."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    def load(self) -> bytes:
        """Read the keys with ``load_wrapping_keys``."""
        return load_wrapping_keys(self._paths)

    async def add(self, key: bytes) -> None:
        """Add a key, which is on disk when this returns.  Raises: InvalidArgument; FailedPrecondition; Locked."""
        if len(key) != KEY_BYTES:
            raise InvalidArgument(f"a wrapping key has {KEY_BYTES} bytes, not {len(key)}")
        await asyncio.to_thread(self._add, key)

    async def settle(self, key: bytes) -> None:
        """Remove the keys before ``key``, which the store uses now.  Raises: FailedPrecondition; Locked."""
        await asyncio.to_thread(self._settle, key)

    def _add(self, key: bytes) -> None:
        with REPLACING:
            first, *others = split_keys(self.load())
            if key not in (first, *others):
                save_wrapping_keys(self._paths, b"".join((first, *others[-(WRAPPING_KEYS_MAX - 2) :], key)))

    def _settle(self, key: bytes) -> None:
        with REPLACING:
            kept = split_keys(self.load())
            if key in kept[1:]:
                save_wrapping_keys(self._paths, b"".join(kept[kept.index(key) :]))
                log.info("wrapping key replaced", path=str(self._paths.wrapping_key))


class StoreKeys:
    """The wrapping keys that a manager's store accepts.  Each is also on the manager's disk."""

    def __init__(self, store: EtcdStore, disk: WrappingKeys) -> None:
        self.store = store
        self.disk = disk

    async def keep(self, key: bytes) -> None:
        """Accept a key that may soon wrap the data keys.  It is on disk when this returns.

        Raises:
            InvalidArgument, FailedPrecondition, Locked: See ``WrappingKeys.add``.
        """
        await self.disk.add(key)
        self.store.learn_wrapping_key(key)

    async def prune(self, clock: Clock) -> None:
        """Keep only the current wrapping key on disk, until cancelled."""
        key, backoff = self.store.wrapping_key, Backoff(longest_s=10.0)
        while True:
            try:
                await self.disk.settle(key)
            except (SkepError, OSError) as error:
                log.error("old wrapping keys not removed from disk, will retry", reason=str(error))
                await backoff.sleep(clock)
                continue
            backoff.reset()
            key = await self.store.wait_rewrapped()
