"""The wrapping key of the store's data keys, on this manager's disk.

One file with one key; while the key is replaced (``manager.eviction``), candidates for its replacement follow it.  A
manager that has confirmed a key has it safely on its disk; which key the store uses is found by trying.
"""

import asyncio

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import FailedPrecondition, InvalidArgument, SkepError
from skep.paths import Paths
from skep.security.locking import REPLACING, KeyLock
from skep.store.etcd.cipher import KEY_BYTES, WRAPPING_KEYS_MAX, new_wrapping_key, split_keys
from skep.store.etcd.store import EtcdStore

log = structlog.get_logger(__name__)


def load_wrapping_keys(paths: Paths) -> bytes:
    """The wrapping keys, concatenated.  Raises: FailedPrecondition: missing or damaged; Locked."""
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
    """Write ``keys``, readable for root only, durably.  Raises: Locked."""
    paths.manager_keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    KeyLock(paths).write(paths.wrapping_key, keys)


def founding_wrapping_key(paths: Paths) -> bytes:
    """The wrapping key; created at the first start of the first manager.

    Raises: FailedPrecondition: it is lost or damaged; Locked.
    """
    if paths.root_ca_key.exists() and not paths.wrapping_key.exists():
        save_wrapping_keys(paths, new_wrapping_key())
    return load_wrapping_keys(paths)


class WrappingKeys:
    """Wrapping keys on one manager's disk.  Writing runs in a thread that continues if the caller is cancelled."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    def load(self) -> bytes:
        """As ``load_wrapping_keys``."""
        return load_wrapping_keys(self._paths)

    async def add(self, key: bytes) -> None:
        """Add a key; on disk when this returns.  Raises: InvalidArgument; FailedPrecondition; Locked."""
        if len(key) != KEY_BYTES:
            raise InvalidArgument(f"a wrapping key has {KEY_BYTES} bytes, not {len(key)}")
        await asyncio.to_thread(self._add, key)

    async def settle(self, key: bytes) -> None:
        """The store uses ``key``: remove the earlier ones.  Raises: FailedPrecondition; Locked."""
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
    """The wrapping keys that a manager's store accepts, each of which is on its disk, too."""

    def __init__(self, store: EtcdStore, disk: WrappingKeys) -> None:
        self.store = store
        self.disk = disk

    async def keep(self, key: bytes) -> None:
        """Accept a key that the data keys may be wrapped with soon; it is on disk when this returns.

        Raises: as ``WrappingKeys.add``.
        """
        await self.disk.add(key)
        self.store.learn_wrapping_key(key)

    async def prune(self, clock: Clock) -> None:
        """Keep only the present wrapping key on disk, until cancelled."""
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
