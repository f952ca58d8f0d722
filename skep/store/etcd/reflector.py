"""Keeps the replica equal to etcd.  It loads everything once, then applies the watch (a list-watch loop, or reflector).

All events of one etcd transaction have the same revision and become visible together.  If the history needed to resume
was deleted (by compaction or a restore), everything is loaded again and watchers get exactly the difference.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from itertools import islice

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import FailedPrecondition, Unavailable
from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import LOAD_S, EtcdClient, WatchStream, prefix_end
from skep.store.etcd.encryption.cipher import Cipher, decoded_ring
from skep.store.etcd.errors import Compacted, Uncertain
from skep.store.etcd.requests import PREFIX, by_revision, change_of
from skep.store.interface import Event
from skep.store.level import decoded_level
from skep.store.replica import Replica
from skep.store.state import State, differences
from skep.store.tables import KeyChange

log = structlog.get_logger()

PAGE_KEYS_MAX = 500
"""Maximum keys of one page of a load, which take a few milliseconds to process."""

PAGE_KEYS_FIRST = 16
"""Number of keys of the first page, when the size of values is not known yet."""
PAGE_BYTES = 2 * 1024 * 1024
"""Target size of a page in bytes, because 500 of the largest configs would be half a gigabyte."""

YIELD_EVERY = 200
"""Number of events applied, or objects compared, before other tasks of the event loop run."""

PROGRESS_S = 0.02
"""Seconds to wait for the next watch event before a progress notification is requested."""


class Reflector:
    """Feeds one replica.  ``observe`` is called with etcd key, stored value and revision before a write becomes
    visible.
    """

    def __init__(
        self,
        client: EtcdClient,
        replica: Replica,
        cipher: Cipher,
        observe: Callable[[bytes, bytes | None, int], None],
        clock: Clock,
        backoff: Backoff,
    ) -> None:
        self._client = client
        self.replica = replica
        self._cipher = cipher
        self._observe = observe
        self._clock = clock
        self._backoff = backoff
        self._stream: WatchStream | None = None
        self._cluster_id = 0
        self._fragments: list[pb.Event] = []
        """Events of a response that arrives in fragments, as long as it is incomplete."""
        self._loaded = asyncio.Event()
        self._needs_load = True

    @property
    def is_current(self) -> bool:
        """Whether the watch is open, so that no event means no change."""
        return self._stream is not None

    async def wait_loaded(self) -> None:
        """Wait until the replica has shown the whole store once."""
        await self._loaded.wait()

    async def run(self) -> None:
        """Load and watch until cancelled, and resume after the connection is lost."""
        while True:
            try:
                if self._needs_load:
                    await self._load()
                await self._watch()
            except Compacted as error:
                log.info("replica reloads the store", reason=str(error))
                self._needs_load = True
            except Unavailable as error:
                log.debug("watch interrupted", reason=str(error))
                await self._backoff.sleep(self._clock)

    async def wait_reached(self, revision: int) -> None:
        """Wait until the replica shows everything up to ``revision``.  Requests progress if no event arrives."""
        while self.replica.revision < revision:
            try:
                async with asyncio.timeout(PROGRESS_S):
                    await self.replica.wait_reached(revision)
            except TimeoutError:
                if self._stream is not None:
                    with suppress(Unavailable):
                        await self._stream.request_progress()

    async def _load(self) -> None:
        """Read every key at one revision and replace the replica's state.

        Raises:
            Compacted: The revision was compacted meanwhile.  The caller has to retry.
        """
        state = State()
        leader: bytes | None = None
        ring = await self._client.range(pb.RangeRequest(key=_KEY_RING))
        for kv in ring.kvs:
            self._use_key_ring(kv.value, kv.mod_revision)
        first, revision, limit = PREFIX, ring.header.revision, PAGE_KEYS_FIRST
        while True:
            page = await self._client.range(
                pb.RangeRequest(key=first, range_end=prefix_end(PREFIX), limit=limit, revision=revision),
                timeout_s=LOAD_S,
            )
            for kv in page.kvs:
                if kv.key == _LEVEL:
                    decoded_level(kv.value)  # The level may have been raised while the watch was closed.
            changes = [change for kv in page.kvs if (change := change_of(kv, self._cipher)) is not None]
            leader = next((change.value for change in changes if change.key == keys.LEADER), leader)
            state.apply(revision, changes)
            if not page.more:
                break
            first = page.kvs[-1].key + b"\0"
            limit = next_limit(limit, page.ByteSize())
            await asyncio.sleep(0)
        state.keep_unreadable(self.replica.state)
        events = await self._difference(state) if self._loaded.is_set() else []
        self.replica.reset(state, leader, events)
        self._cluster_id = page.header.cluster_id
        self._needs_load = False
        self._loaded.set()

    async def _difference(self, state: State) -> list[Event]:
        events: list[Event] = []
        pending = differences(self.replica.state, state)
        while some := list(islice(pending, YIELD_EVERY)):
            events += some
            await asyncio.sleep(0)
        return events

    async def _watch(self) -> None:
        async with self._client.watch(PREFIX, self.replica.revision) as stream:
            self._fragments = []
            stream.offer_to(self._apply_at_once)
            try:
                while True:
                    response = await stream.receive()
                    self._check(response)
                    if response.created:
                        self._stream = stream
                        self._backoff.reset()
                    self._fragments.extend(response.events)
                    if response.fragment:
                        continue
                    await self._apply(self._fragments)
                    if not self._fragments and not response.created:
                        self.replica.advance(response.header.revision)
                    self._fragments = []
            finally:
                self._stream = None

    def _check(self, response: pb.WatchResponse) -> None:
        """Raise Compacted if the response does not continue the replica's state, Uncertain if the watch ended."""
        if response.canceled:
            if response.compact_revision:
                raise Compacted(f"history before revision {response.compact_revision} is gone")
            raise Uncertain(f"the store ended the watch: {response.cancel_reason}")
        if response.header.cluster_id != self._cluster_id:
            raise Compacted("this is another cluster's store")
        if response.header.revision < self.replica.revision:
            # etcd accepts a watch from a future revision but never sends an event.
            raise Compacted("the store was restored to an older state")

    def _apply_at_once(self, response: pb.WatchResponse) -> bool:
        """Apply a small response as soon as it arrives.  Returns False for other responses, which ``_watch``
        handles.
        """
        events = response.events
        if not 0 < len(events) < YIELD_EVERY or self._fragments or response.fragment or response.created:
            return False
        try:
            self._check(response)
        except Unavailable:
            return False
        for revision, group in by_revision(events):
            changes = (self._change(event, revision) for event in group)
            self.replica.apply(revision, [change for change in changes if change is not None])
        return True

    async def _apply(self, events: list[pb.Event]) -> None:
        applied = 0
        for revision, group in by_revision(events):
            changes: list[KeyChange] = []
            for event in group:
                change = self._change(event, revision)
                if change is not None:
                    changes.append(change)
                applied += 1
                if applied % YIELD_EVERY == 0:
                    await asyncio.sleep(0)
            self.replica.apply(revision, changes)

    def _change(self, event: pb.Event, revision: int) -> KeyChange | None:
        """Return the change of one key, or None if its value cannot be read."""
        kv = event.kv
        is_delete = event.type == pb.Event.DELETE
        if kv.key == _KEY_RING and not is_delete:
            self._use_key_ring(kv.value, kv.mod_revision)
        if kv.key == _LEVEL and not is_delete:
            decoded_level(
                kv.value
            )  # It raises for an unknown level. This manager must end, because it would misread what others write.
        self._observe(kv.key, None if is_delete else kv.value, revision)
        return change_of(kv, self._cipher, is_delete=is_delete)

    def _use_key_ring(self, encoded: bytes, revision: int) -> None:
        """Use a new key ring, which arrives before the values that are encrypted with its keys."""
        try:
            self._cipher.use(decoded_ring(encoded), revision)
        except FailedPrecondition as error:
            log.error("new key ring cannot be used", error=str(error))


def next_limit(limit: int, page_bytes: int) -> int:
    """Return the number of keys of the next page, so that it approaches ``PAGE_BYTES``.  ``limit`` keys had
    ``page_bytes``, and the next page has at most four times as many.
    """
    fitting = limit * PAGE_BYTES // max(page_bytes, 1)
    return max(1, min(fitting, 4 * limit, PAGE_KEYS_MAX))


_KEY_RING = PREFIX + keys.KEY_RING.encode()
_LEVEL = PREFIX + keys.LEVEL.encode()
