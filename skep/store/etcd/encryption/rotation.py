"""Rotation of the data key.  New values use the new key at once, the leader re-encrypts the others, and then old keys
are removed.

The ring in the store is the state of a rotation.  If it has several keys, some values may have older keys, and the next
term resumes the rotation.  Every write compares the ring with which it is encrypted (``guard``).  So nothing is
encrypted with an old key after the ring has changed, and one pass over all keys is enough.  Values that others write
during the pass have the new key.

Users notice nothing, because versions are inside the values, and a replica publishes no event for an equal value.  The
leader's record is the fence of its term.  If it is encrypted with an old key, the term ends, and the next term writes
the record again.
"""

from collections.abc import Callable, Iterable, Sequence

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.race import wait_first
from skep.errors import Unavailable
from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import LOAD_S, WRITE_S_MAX, EtcdClient, nested, prefix_end
from skep.store.etcd.encryption.cipher import Cipher, KeyRing, Undecryptable, decoded_ring
from skep.store.etcd.reflector import PAGE_KEYS_FIRST, next_limit
from skep.store.etcd.requests import PREFIX, compared_key, compared_leader, compared_ring, etcd_key, is_clear
from skep.store.interface import NotLeader
from skep.store.leadership import TermState

log = structlog.get_logger()

BATCH_KEYS_MAX = 50
"""Maximum values that are re-encrypted in one raft entry."""
BATCH_BYTES_MAX = 512 * 1024
"""Maximum bytes of these values."""
PAUSE_S = 0.01
"""Seconds between two batches, so that users' writes take precedence."""

CHECK_S = 3600.0
"""Seconds between checks whether the data key has to be rotated."""
REVISIONS_PER_KEY = 2**24
"""Number of revisions of the store after which the data key is rotated.

A revision has at most 127 values, and random nonces of 96 bits are safe for 2**32 values of one key (NIST SP 800-38D,
8.3).
"""

_LEADER = etcd_key(keys.LEADER)
_RING = etcd_key(keys.KEY_RING)


class _Superseded(Exception):
    """This attempt is outdated, because its term is over or the ring has changed."""


class KeyRotation:
    """Rotates the data keys of one store.  ``begin`` runs on any manager, ``run`` on the leader."""

    def __init__(self, client: EtcdClient, cipher: Cipher, clock: Clock) -> None:
        self._client = client
        self._cipher = cipher
        self._clock = clock
        self._last_pass: tuple[int, tuple[str, ...]] | None = None
        """Revision of the ring during the last complete pass, and the keys of values that the pass could not read."""

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Keys of values that the last complete pass could not re-encrypt."""
        ring_revision, left = self._last_pass or (0, ())
        return left if ring_revision == self._cipher.ring_revision else ()

    async def begin(self) -> None:
        """Add a data key to the ring, for all later writes.  Raises Unavailable."""
        while not await self._replace_ring(self._cipher.new_ring(), ()):
            pass  # the ring had changed, and its new state has been read

    async def replace_wrapping_key(self, fence: int, wrapping_key: bytes) -> None:
        """Wrap the ring with another key and add a new data key, in one write that ``fence`` protects.

        Every manager must have stored the wrapping key before.  Without it, a manager can no longer open the store.

        Raises:
            NotLeader: The term is over.
            Unavailable: The store did not respond.
        """
        self._cipher.learn(wrapping_key)
        while self._cipher.wrapping_key != wrapping_key:
            before = self._cipher.ring_revision
            ring = self._cipher.rewrapped_ring(wrapping_key)
            is_written = await self._replace_ring(ring, (compared_leader(fence),))
            if not is_written and self._cipher.ring_revision == before:
                raise NotLeader("this term of leadership is over")

    async def run(self, term: TermState, *, rng: Callable[[], float]) -> None:
        """Rotate and re-encrypt when necessary, until the term is over."""
        await wait_first(self._work(term, Backoff(longest_s=5.0, rng=rng)), term.wait_lost())

    async def _work(self, term: TermState, backoff: Backoff) -> None:
        while True:
            self._cipher.changed.clear()
            try:
                if len(self._cipher.ring.keys) == 1:
                    await wait_first(self._cipher.changed.wait(), self._clock.sleep(CHECK_S))
                    if not self._cipher.changed.is_set():
                        await self._begin_if_due()
                    continue
                await self._finish(term)
                backoff.reset()
            except (_Superseded, Unavailable) as error:
                log.debug("data key rotation delayed", reason=str(error))
                await backoff.sleep(self._clock)

    async def _begin_if_due(self) -> None:
        """Begin a rotation after ``REVISIONS_PER_KEY``.  Raises Unavailable."""
        leader = await self._client.range(pb.RangeRequest(key=_LEADER, count_only=True))
        if leader.header.revision - self._cipher.ring_revision >= REVISIONS_PER_KEY:
            log.info("data key rotation due", data_key=self._cipher.ring.current)
            await self.begin()

    async def _finish(self, term: TermState) -> None:
        """Finish the current rotation.  Raises _Superseded or Unavailable, after which it is retried."""
        leader = await self._client.range(pb.RangeRequest(key=_LEADER))
        if leader.kvs and not self._cipher.is_current(leader.kvs[0].value):
            log.info("term ends: leader key has an old data key", term=term.number)
            term.lose()
            return
        log.info("re-encryption started", data_key=self._cipher.ring.current)
        count, after, limit = 0, PREFIX, PAGE_KEYS_FIRST
        ring_revision = self._cipher.ring_revision
        damaged: list[str] = []
        while after:
            page = await self._client.range(
                pb.RangeRequest(key=after, range_end=prefix_end(PREFIX), limit=limit), timeout_s=LOAD_S
            )
            limit = next_limit(limit, page.ByteSize())
            for batch in batches(self._outdated(page.kvs)):
                damaged += await self._rewrite(batch, term)
                count += len(batch)
                await self._clock.sleep(PAUSE_S)
            after = page.kvs[-1].key + b"\0" if page.more else b""
        fence = compared_leader(term.fence)
        if damaged:
            # Another member may have undamaged copies, which need the old keys.
            log.warning("old data keys kept: some values cannot be read on this manager", values=len(damaged))
            self._last_pass = ring_revision, tuple(damaged)
            await self._cipher.changed.wait()
            return
        if not await self._replace_ring(self._cipher.ring.without_old_keys(), (fence,)):
            raise _Superseded("the leader's term is over, or the key ring has changed")
        log.info("re-encryption finished", values=count, data_key=self._cipher.ring.current)

    def _outdated(self, kvs: Iterable[pb.KeyValue]) -> Sequence[pb.KeyValue]:
        return [
            kv
            for kv in kvs
            if not is_clear(kv.key) and kv.key != _LEADER and not self._cipher.is_current(kv.value)
        ]

    async def _rewrite(self, batch: Sequence[pb.KeyValue], term: TermState) -> Sequence[str]:
        """Re-encrypt each value, unless it changed meanwhile.  Returns the keys of unreadable values.

        Raises _Superseded or Unavailable.
        """
        operations: list[pb.RequestOp] = []
        damaged: list[str] = []
        for kv in batch:
            try:
                value = self._cipher.encrypt(kv.key, self._cipher.decrypt(kv.key, kv.value))
            except Undecryptable as error:
                log.error("stored value cannot be read", key=kv.key.decode(), error=str(error))
                damaged.append(kv.key.decode())
                continue
            unchanged = compared_key(kv.key, kv.mod_revision)
            put = pb.RequestOp(request_put=pb.PutRequest(key=kv.key, value=value))
            operations.append(pb.RequestOp(request_txn=pb.TxnRequest(compare=[unchanged], success=[put])))
        reply = await self._client.txn(
            pb.TxnRequest(
                compare=[compared_leader(term.fence), compared_ring(self._cipher.ring_revision)],
                success=operations,
            ),
            timeout_s=WRITE_S_MAX,
        )
        if not reply.succeeded:
            raise _Superseded("the leader's term is over, or the key ring has changed")
        return damaged

    async def _replace_ring(self, ring: KeyRing, conditions: Sequence[pb.Compare]) -> bool:
        """Replace the known ring by ``ring``.  Returns False if the stored ring had changed.  The cipher then uses
        that.

        Raises Unavailable.
        """
        reply = await self._client.txn(
            pb.TxnRequest(
                compare=[compared_ring(self._cipher.ring_revision), *conditions],
                success=[
                    nested(
                        pb.RequestOp(request_put=pb.PutRequest(key=_RING, value=msgspec.json.encode(ring)))
                    )
                ],
                failure=[pb.RequestOp(request_range=pb.RangeRequest(key=_RING))],
            ),
            timeout_s=WRITE_S_MAX,
        )
        if reply.succeeded:
            self._cipher.use(ring, reply.header.revision)
            return True
        (found,) = reply.responses[0].response_range.kvs
        self._cipher.use(decoded_ring(found.value), found.mod_revision)
        return False


def batches(kvs: Iterable[pb.KeyValue]) -> Iterable[Sequence[pb.KeyValue]]:
    """Group ``kvs`` into batches that fit into one raft entry.  A value that is larger than that is a batch of its
    own.
    """
    batch: list[pb.KeyValue] = []
    size = 0
    for kv in kvs:
        if batch and (len(batch) == BATCH_KEYS_MAX or size + len(kv.value) > BATCH_BYTES_MAX):
            yield batch
            batch, size = [], 0
        batch.append(kv)
        size += len(kv.value)
    if batch:
        yield batch
