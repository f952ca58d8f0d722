"""Group commit.  The proposals that are queued while a raft entry is in flight share the next entry.

Each proposal is a nested transaction with its own compares, so a proposal with a conflict fails alone.  Two entries are
in flight at a time.  No timer delays an entry. etcd evaluates all compares of an entry on the state before the entry.
Therefore proposals share an entry only if neither reads what the other writes (``Footprint``), and a proposal that
conflicts with an entry in flight waits.

**Unknown outcomes.** Every entry compares the key ring and this manager's *writer epoch*, a key that only this manager
writes.  If a response does not arrive, this manager advances the epoch.  From then on, the lost entry can never take
effect.  The epoch's new value is random, so if the watch shows it, the epoch is advanced even if that write got no
response either, as on a slow store.  Then the replica at that revision decides.  A proposal whose first write appeared
there is committed, and any other is sent again.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import count
from secrets import token_bytes

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import ResourceExhausted, SkepError, Unavailable
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import AdaptiveTimeout, EtcdClient
from skep.store.etcd.encryption.cipher import Cipher, decoded_ring
from skep.store.etcd.errors import Busy, Uncertain
from skep.store.etcd.process.flags import MAX_OPERATIONS
from skep.store.etcd.requests import Marker, etcd_key, fill_txn, guard, is_clear, is_fence_lost
from skep.store.interface import NotLeader
from skep.store.leadership import TermState
from skep.store.replica import Replica
from skep.store.transactions.proposal import Committed, Footprint, Outcome, Proposal, WriteConflict

log = structlog.get_logger()

QUEUE_MAX = 10_000
"""Maximum proposals in the queue.  Further ones are refused, so that a stalled store does not exhaust the memory."""

BATCH_PROPOSALS_MAX = 100
"""Maximum proposals of a batch."""
BATCH_BYTES_MAX = 1024 * 1024
"""Maximum bytes of a batch, below etcd's 1.5 MiB per request."""
ETCD_OPERATIONS_MAX = MAX_OPERATIONS - 1
"""Limit of the number of a batch's proposals plus the operations of its largest one.  The batch adds two compares
itself.
"""

IN_FLIGHT_MAX = 2
"""Maximum entries in flight at a time."""

SLOW_S = 0.25
"""If an entry takes this many seconds, the disk counts as slow."""
IN_FLIGHT_MAX_SLOW = 8
"""Maximum entries in flight on a slow disk.  With two, a write would have to wait for two entries in a row."""

EPOCH_BYTES = 16
"""Bytes of a random epoch.  They suffice to make it unique."""

YIELD_EVERY = 25
"""Number of proposals that are encrypted and encoded before other tasks of the event loop run."""


class QueuedProposal:
    """A proposal in the queue or in flight, and the future of its outcome."""

    def __init__(self, proposal: Proposal, fence: int | None) -> None:
        self.proposal = proposal
        self.fence = fence
        self.footprint = Footprint.of(proposal)
        self.size_bytes = proposal.size_bytes
        self.operations = proposal.operations + 1
        """Number of operations as etcd counts them, with the fence and the marker."""
        self.outcome: asyncio.Future[Outcome | SkepError] = asyncio.get_running_loop().create_future()
        self.is_in_flight = False
        """Whether it is in an entry that may still take effect."""
        self._late: asyncio.Future[Outcome | SkepError] | None = None

    def resolve(self, outcome: Outcome | SkepError) -> None:
        """Set the outcome, unless nothing waits for it."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)
        elif self._late is not None and not self._late.done():
            self._late.set_result(outcome)

    def returned(self) -> None:
        """Note that its entry has not taken effect and never will."""
        self.is_in_flight = False
        if self.outcome.cancelled():
            self.resolve(Unavailable("the writer was cancelled"))

    def late_outcome(self) -> "asyncio.Future[Outcome | SkepError] | None":
        """Return the future outcome of a proposal whose writer was cancelled, or None if it was never sent."""
        if self.outcome.done() and not self.outcome.cancelled():
            return self.outcome
        self.outcome.cancel()
        if self.is_in_flight:
            self._late = asyncio.get_running_loop().create_future()
        return self._late


class Batch:
    """Proposals that share one raft entry, in order, and the request that they are encoded into.

    Attributes:
        resets: Number of reloads of the replica when the batch was created.
        ring_revision: Revision of the key ring at that time.
    """

    def __init__(self, resets: int = 0, ring_revision: int = 0) -> None:
        self.resets = resets
        self.ring_revision = ring_revision
        self.proposals: list[QueuedProposal] = []
        self.footprint = Footprint()
        self.request = pb.TxnRequest()
        self.markers: list[Marker] = []
        """Markers of the encoded proposals."""
        self.response: Awaitable[pb.TxnResponse] | None = None
        """Set once the request is sent."""
        self.sent_at = 0.0
        self._size_bytes = 0
        self._operations_max = 0

    def has_room(self, queued: QueuedProposal) -> bool:
        """Return whether ``queued`` fits within etcd's limits.  A single proposal always fits."""
        if not self.proposals:
            return True
        count = len(self.proposals) + 1
        largest = max(self._operations_max, queued.operations)
        return (
            count <= BATCH_PROPOSALS_MAX
            and count + largest <= ETCD_OPERATIONS_MAX
            and self._size_bytes + queued.size_bytes <= BATCH_BYTES_MAX
        )

    def add(self, queued: QueuedProposal) -> None:
        """Append ``queued``."""
        self.proposals.append(queued)
        self.footprint.add(queued.footprint)
        self._size_bytes += queued.size_bytes
        self._operations_max = max(self._operations_max, queued.operations)


def fill_batch(batch: Batch, queue: deque[QueuedProposal], in_flight: list[Footprint]) -> Batch:
    """Move the proposals that can be sent together now from ``queue`` to ``batch``.  The others keep their order.

    A proposal stays queued if it conflicts with entries in flight, with this batch, or with earlier proposals in the
    queue.
    """
    left: list[QueuedProposal] = []
    ahead = Footprint()
    while queue:
        queued = queue.popleft()
        if queued.outcome.done():
            continue  # its writer was cancelled
        others = (batch.footprint, ahead, *in_flight)
        if not all(footprint.is_compatible_with(queued.footprint) for footprint in others):
            left.append(queued)
            ahead.add(queued.footprint)
        elif batch.has_room(queued):
            batch.add(queued)
        else:
            queue.appendleft(queued)
            break
    queue.extendleft(reversed(left))
    return batch


class Batcher:
    """Sends proposals to etcd.  ``run`` must be running."""

    def __init__(
        self,
        client: EtcdClient,
        cipher: Cipher,
        replica: Replica,
        epoch_key: str,
        clock: Clock,
        backoff: Callable[[], Backoff],
    ) -> None:
        self._client = client
        self._cipher = cipher
        self.replica = replica
        self._epoch_key = epoch_key
        self._epoch_etcd_key = etcd_key(epoch_key)
        self._epoch_value = b""
        self._epoch_revision = 0
        self._advancing: asyncio.Future[int] | None = None
        """The future revision of the writer epoch that is being written.  Nothing is sent until it is known."""
        self._timeout = AdaptiveTimeout()
        self.acknowledged = 0
        """The last revision at which a write may have been acknowledged to its writer."""
        self._took_s = 0.0
        """Duration of the last entry."""
        self._clock = clock
        self._backoff = backoff
        self._queue: deque[QueuedProposal] = deque()
        self._in_flight: list[Footprint] = []
        self._idle_workers: deque[asyncio.Future[Batch]] = deque()
        self.markers: dict[bytes, tuple[Marker, QueuedProposal]] = {}
        self._marker_numbers = count()
        self._spare_marker_keys: list[bytes] = []
        """Marker keys of earlier deletions, which are used again."""
        self._observed: dict[QueuedProposal, int] = {}

    async def propose(
        self, proposals: Sequence[Proposal], term: TermState | None = None
    ) -> Sequence[Outcome | SkepError]:
        """Commit proposals.  Implements ``updates.Propose``.

        The term ends if its fence failed or an outcome is unknown, because the next term, of this or another manager,
        voids all writes that may still take effect.  It also ends if its writer is cancelled and the outcome of the
        sent proposals does not become known soon.
        """
        if term is None:
            return await self._propose(proposals, None)
        if term.is_lost:
            raise NotLeader("this term of leadership is over")
        outcomes = await self._propose(proposals, term)
        if any(isinstance(outcome, NotLeader | Uncertain) for outcome in outcomes):
            term.lose()
        return outcomes

    async def _propose(
        self, proposals: Sequence[Proposal], term: TermState | None
    ) -> Sequence[Outcome | SkepError]:
        if len(self._queue) + len(proposals) > QUEUE_MAX:
            raise ResourceExhausted("too many writes are waiting for the store")
        fence = term.fence if term is not None else None
        queued = [QueuedProposal(proposal, fence) for proposal in proposals]
        self._queue.extend(queued)
        self._send_queued()
        try:
            return [await one.outcome for one in queued]
        except asyncio.CancelledError:
            if term is not None:
                await term.settle(partial(self._settle_outcomes, queued))
            raise
        finally:
            for one in queued:
                one.outcome.cancel()

    async def _settle_outcomes(self, queued: Sequence[QueuedProposal]) -> None:
        """Wait until the outcome of each proposal is known and visible in the replica.  Raises Uncertain."""
        for late in [late for one in queued if (late := one.late_outcome()) is not None]:
            outcome = await late
            if isinstance(outcome, Uncertain):
                raise outcome
            if isinstance(outcome, Committed):
                await self.replica.wait_reached(outcome.revision)

    async def run(self) -> None:
        """Send queued proposals until cancelled."""
        await self._advance_epoch()
        async with asyncio.TaskGroup() as group:
            for number in range(IN_FLIGHT_MAX_SLOW):
                group.create_task(self._work(), name=f"batcher-{number}")

    def observe(self, key: bytes, value: bytes | None, revision: int) -> None:
        """Handle a write that the watch has delivered, before the replica shows it.

        It resolves the proposal before etcd's response arrives.  In about half of all cases the response arrives after
        the watch, and it would be handled after all coroutines that the commit wakes.  This works for encrypted values
        only, because no other manager can have written the same bytes.
        """
        found = self.markers.get(key)
        if found is not None and found[0].value == value:
            self._observed[found[1]] = revision
            if not is_clear(key):
                found[1].resolve(Committed(revision))
        elif key == self._epoch_etcd_key and value == self._epoch_value:
            self._epoch_advanced(revision)

    async def _work(self) -> None:
        while True:
            assigned: asyncio.Future[Batch] = asyncio.get_running_loop().create_future()
            self._idle_workers.append(assigned)
            self._send_queued()
            batch = await assigned
            try:
                await self._complete(batch)
            finally:
                self._in_flight.remove(batch.footprint)

    def _send_queued(self) -> None:
        """Assign batches of sendable proposals to idle workers.

        A small batch is sent before this returns, and not only when the event loop runs its worker.
        """
        while self._queue and self._idle_workers and self._advancing is None and self._may_send():
            if self._idle_workers[0].done():
                self._idle_workers.popleft()  # cancelled
                continue
            batch = fill_batch(
                Batch(self.replica.resets, self._cipher.ring_revision), self._queue, self._in_flight
            )
            if not batch.proposals:
                return
            self._in_flight.append(batch.footprint)
            for queued in batch.proposals:
                queued.is_in_flight = True
            self._idle_workers.popleft().set_result(batch)
            if len(batch.proposals) < YIELD_EVERY:
                for queued in batch.proposals:
                    self._encode(queued, batch)
                self._send(batch)

    def _may_send(self) -> bool:
        return len(self._in_flight) < (IN_FLIGHT_MAX if self._took_s < SLOW_S else IN_FLIGHT_MAX_SLOW)

    def _encode(self, queued: QueuedProposal, batch: Batch) -> None:
        txn = batch.request.success.add().request_txn
        marker = fill_txn(txn, queued.proposal, queued.fence, self._cipher, self._new_marker_key)
        batch.markers.append(marker)
        self.markers[marker.key] = (marker, queued)

    def _new_marker_key(self) -> bytes:
        return (
            self._spare_marker_keys.pop()
            if self._spare_marker_keys
            else b"%b/%d" % (self._epoch_etcd_key, next(self._marker_numbers))
        )

    def _send(self, batch: Batch) -> None:
        batch.request.MergeFrom(guard(self._epoch_key, self._epoch_revision, batch.ring_revision))
        batch.sent_at = self._clock.monotonic()
        batch.response = self._client.txn(batch.request, timeout_s=self._timeout.seconds)

    async def _complete(self, batch: Batch) -> None:
        try:
            for queued in batch.proposals[len(batch.markers) :]:
                self._encode(queued, batch)
                if len(batch.markers) % YIELD_EVERY == 0:
                    await asyncio.sleep(0)  # the batch already counts as in flight
            if batch.response is None:
                self._send(batch)
            assert batch.response is not None, "it was just sent"
            response = await batch.response
        except Uncertain as error:
            log.warning("outcome of writes unknown", proposals=len(batch.proposals), error=str(error))
            self._took_s = self._timeout.seconds
            self._timeout.expired()
            await self._settle(batch)
        except Busy:
            await self._backoff().sleep(self._clock)
            self._requeue(batch.proposals)
        except SkepError as error:
            for queued in batch.proposals:
                queued.resolve(error)
        else:
            self._took_s = self._clock.monotonic() - batch.sent_at
            self._timeout.responded(self._took_s)
            self._resolve(batch, response)
        finally:
            for queued, marker in zip(batch.proposals, batch.markers, strict=False):
                self._observed.pop(queued, None)
                self.markers.pop(marker.key, None)
                if marker.key.startswith(self._epoch_etcd_key):
                    self._spare_marker_keys.append(marker.key)

    def _resolve(self, batch: Batch, response: pb.TxnResponse) -> None:
        if not response.succeeded:
            # This manager has advanced its epoch, or the key ring has changed. Nothing was written.
            epoch, ring = (read.response_range.kvs for read in response.responses)
            if epoch:
                self._epoch_revision = epoch[0].mod_revision
            if ring and ring[0].mod_revision > self._cipher.ring_revision:
                self._cipher.use(decoded_ring(ring[0].value), ring[0].mod_revision)
            self._requeue(batch.proposals)
            return
        revision = response.header.revision
        self.acknowledged = max(self.acknowledged, revision)
        for queued, operation in zip(batch.proposals, response.responses, strict=True):
            nested = operation.response_txn
            if nested.succeeded:
                queued.resolve(Committed(revision))
            elif queued.fence is not None and is_fence_lost(nested, queued.fence):
                queued.resolve(NotLeader("another manager leads"))
            else:
                queued.resolve(WriteConflict(revision))

    async def _settle(self, batch: Batch) -> None:
        """Find out the outcome of an entry that got no response, and send its proposals again if they were not
        committed.
        """
        revision = await self._advance_epoch()
        await self.replica.wait_reached(revision)
        if self.replica.resets != batch.resets:
            # The replica was reloaded, and may have missed the write and later changes of the same key.
            for queued in batch.proposals:
                queued.resolve(Uncertain("the outcome of a write could not be determined"))
            return
        lost: list[QueuedProposal] = []
        for queued in batch.proposals:
            if queued in self._observed:
                queued.resolve(Committed(self._observed[queued]))
            else:
                lost.append(queued)
        self._requeue(lost)

    async def _advance_epoch(self) -> int:
        """Void all entries in flight.  Returns the revision after which they cannot take effect.

        Concurrent calls share one write, because all entries sent before it ends compare an older epoch.
        """
        if self._advancing is not None:
            return await asyncio.shield(self._advancing)
        advancing: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._advancing = advancing
        self._epoch_value = token_bytes(EPOCH_BYTES)
        try:
            async with asyncio.TaskGroup() as group:
                putting = group.create_task(self._put_epoch(), name="writer-epoch")
                revision = await advancing
                putting.cancel()
        finally:
            advancing.cancel()  # concurrent calls end too
            self._advancing = None
        self._send_queued()
        return revision

    async def _put_epoch(self) -> None:
        backoff = self._backoff()
        while True:
            try:
                response = await self._client.put(
                    self._epoch_etcd_key, self._epoch_value, timeout_s=self._timeout.seconds
                )
            except Unavailable:
                self._timeout.expired()
                await backoff.sleep(self._clock)
            else:
                return self._epoch_advanced(response.header.revision)

    def _epoch_advanced(self, revision: int) -> None:
        self._epoch_revision = max(self._epoch_revision, revision)
        if self._advancing is not None and not self._advancing.done():
            self._advancing.set_result(revision)

    def _requeue(self, queued: list[QueuedProposal]) -> None:
        for one in queued:
            one.returned()
        self._queue.extendleft(reversed(queued))
        self._send_queued()
