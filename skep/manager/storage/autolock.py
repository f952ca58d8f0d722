"""Encrypts (locks) the keys on this manager's disk with the cluster's unlock key.

Each manager does so itself whenever the unlock key differs from the key with which its disk is locked.  A manager that
was offline during a rotation catches up when it returns.
"""

import asyncio
from random import Random

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.control.swarm import unlock_key_of
from skep.manager.control_loops.informer import run_informer
from skep.security.locking import KeyLock
from skep.store.interface import Commit, Created, Deleted, Store, Updated, View
from skep.store.kinds import UNLOCK_KEY_ID, Payload

log = structlog.get_logger(__name__)


class Autolock:
    """Keeps one node's keys locked or unlocked as the cluster requires."""

    def __init__(self, store: Store, lock: KeyLock, clock: Clock, random: Random) -> None:
        self._store = store
        self._lock = lock
        self._clock = clock
        self._random = random
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Follow the cluster's unlock key until cancelled."""
        await run_informer(
            self._store, (Payload,), on_snapshot=self._on_snapshot, on_commit=self._on_commit, work=self._work
        )

    def _on_snapshot(self, _view: View) -> None:
        self._changed.set()

    def _on_commit(self, commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Created(Payload(id=id)) | Updated(_, Payload(id=id)) | Deleted(Payload(id=id)):
                    if id == UNLOCK_KEY_ID:
                        self._changed.set()

    async def _work(self) -> None:
        backoff = Backoff(longest_s=10.0, rng=self._random.random)
        while True:
            await self._changed.wait()
            self._changed.clear()
            view = self._store.view()
            if UNLOCK_KEY_ID in view.unreadable(Payload):
                continue  # without the unlock key, the keys on disk would be written in clear text
            key = unlock_key_of(view)
            try:
                if await asyncio.to_thread(self._lock.turn, key):
                    log.info("lock of the keys on disk changed", locked=key is not None)
                backoff.reset()
            except (SkepError, OSError) as error:
                log.error("keys on disk not locked or unlocked, will retry", reason=str(error))
                self._changed.set()
                await backoff.sleep(self._clock)
