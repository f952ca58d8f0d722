"""Group commit: the proposals that queued up while a raft entry was on its way go together in the next one.

Each proposal is a nested transaction with compares of its own, so one that lost a race fails alone.  Two entries
are on their way at a time; there is no timer.  etcd judges all compares of an entry on the state before it, so
proposals share an entry only if neither reads what the other writes (``Footprint``), and one that touches what is
on its way waits.

**Unknown outcomes.**  Every entry compares the key ring, and this manager's *ticket*, a key that only it writes.
When an answer does not come, the ticket is moved: from then on the lost entry can never take effect.  The ticket's new
value is a random one, so that the watch proves the move as well as an answer does: of a slow store the answer may never
come in time.  What the replica has seen by that revision is the truth: a proposal whose first write appeared is in; any
other is simply sent again.
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
from skep.store.etcd.cipher import Cipher, decoded_ring
from skep.store.etcd.client import Client, Patience
from skep.store.etcd.errors import Busy, Uncertain
from skep.store.etcd.flags import MAX_OPERATIONS
from skep.store.etcd.requests import Witness, etcd_key, fill_txn, guard, is_clear, is_fence_fallen
from skep.store.interface import NotLeader
from skep.store.leadership import TermState
from skep.store.proposal import Footprint, Proposal
from skep.store.replica import Replica
from skep.store.updates import Committed, Conflict, Outcome, leave

log = structlog.get_logger()

QUEUE_MAX = 10_000
"""Proposals waiting; further ones are refused, so that a stalled store does not eat the memory."""

ENTRY_PROPOSALS_MAX = 100
ENTRY_BYTES_MAX = 1024 * 1024
ETCD_OPERATIONS_MAX = MAX_OPERATIONS - 1
"""Proposals of an entry and operations of its largest proposal, together; around a single one are two compares."""

IN_FLIGHT = 2

SLOW_S = 0.25
IN_FLIGHT_SLOW = 8
"""Where an entry takes ``SLOW_S``, waiting for one before going into the next would double what a write takes."""

TICKET_BYTES = 16

BREATH = 25
"""Proposals encrypted and encoded between two returns to the event loop."""


class Pending:
    """A proposal on its way, and who waits for its outcome."""

    def __init__(self, proposal: Proposal, fence: int | None) -> None:
        self.proposal = proposal
        self.fence = fence
        self.footprint = Footprint.of(proposal)
        self.size_bytes = proposal.size_bytes
        self.operations = proposal.operations + 1
        """What etcd counts for it: the fence is one compare more, the sign of a deletion one write."""
        self.outcome: asyncio.Future[Outcome | SkepError] = asyncio.get_running_loop().create_future()
        self.is_away = False
        """Whether it is in an entry that may take effect, now or later."""
        self._late: asyncio.Future[Outcome | SkepError] | None = None

    def resolve(self, outcome: Outcome | SkepError) -> None:
        """Tell the waiter, if it still waits."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)
        elif self._late is not None and not self._late.done():
            self._late.set_result(outcome)

    def came_back(self) -> None:
        """Its entry has not taken effect, and never will."""
        self.is_away = False
        if self.outcome.cancelled():
            self.resolve(Unavailable("nobody waits for it any more"))

    def late(self) -> "asyncio.Future[Outcome | SkepError] | None":
        """What came, or comes, of it although its waiter was cancelled; None: it has not left, and does not now."""
        if self.outcome.done() and not self.outcome.cancelled():
            return self.outcome
        self.outcome.cancel()
        if self.is_away:
            self._late = asyncio.get_running_loop().create_future()
        return self._late


class Entry:
    """Proposals that go in one raft entry, in order."""

    def __init__(self) -> None:
        self.pending: list[Pending] = []
        self.footprint = Footprint()
        self._size_bytes = 0
        self._operations_max = 0

    def has_room(self, pending: Pending) -> bool:
        """Whether etcd's limits leave room; a proposal alone always has it."""
        if not self.pending:
            return True
        count = len(self.pending) + 1
        largest = max(self._operations_max, pending.operations)
        return (
            count <= ENTRY_PROPOSALS_MAX
            and count + largest <= ETCD_OPERATIONS_MAX
            and self._size_bytes + pending.size_bytes <= ENTRY_BYTES_MAX
        )

    def add(self, pending: Pending) -> None:
        """Take ``pending`` along."""
        self.pending.append(pending)
        self.footprint.add(pending.footprint)
        self._size_bytes += pending.size_bytes
        self._operations_max = max(self._operations_max, pending.operations)


def next_entry(queue: deque[Pending], away: list[Footprint]) -> Entry:
    """Take from ``queue`` what can go together now, in order; the rest stays, in order.

    Left behind: what touches anything on its way (``away``), in this entry, or ahead of it in the queue.
    """
    entry = Entry()
    waiting: list[Pending] = []
    ahead = Footprint()
    while queue:
        pending = queue.popleft()
        if pending.outcome.done():
            continue  # nobody waits for it any more
        held = (entry.footprint, ahead, *away)
        if not all(footprint.admits(pending.footprint) for footprint in held):
            waiting.append(pending)
            ahead.add(pending.footprint)
        elif entry.has_room(pending):
            entry.add(pending)
        else:
            queue.appendleft(pending)
            break
    queue.extendleft(reversed(waiting))
    return entry


class Sending:
    """An entry on its way, or about to be: ``answer`` is there as soon as it has left.

    ``loads``: how often the replica had been loaded anew before; ``ring_revision``: of the key ring, at the same time.
    """

    def __init__(self, entry: Entry, loads: int, ring_revision: int) -> None:
        self.entry = entry
        self.loads = loads
        self.ring_revision = ring_revision
        self.request = pb.TxnRequest()
        self.witnesses: list[Witness] = []
        self.answer: Awaitable[pb.TxnResponse] | None = None
        self.sent_at = 0.0


class Batcher:
    """Sends proposals.  ``run`` must be running."""

    def __init__(
        self,
        client: Client,
        cipher: Cipher,
        replica: Replica,
        ticket: str,
        clock: Clock,
        backoff: Callable[[], Backoff],
    ) -> None:
        self._client = client
        self._cipher = cipher
        self._replica = replica
        self._ticket = ticket
        self._ticket_name = etcd_key(ticket)
        self._ticket_value = b""
        self._ticket_revision = 0
        self._move: asyncio.Future[int] | None = None
        """The ticket is being moved; until it has its revision, whatever is sent may be void."""
        self._patience = Patience()
        self._took_s = 0.0
        """What the last entry took."""
        self._clock = clock
        self._backoff = backoff
        self._queue: deque[Pending] = deque()
        self._away: list[Footprint] = []
        self._idle: deque[asyncio.Future[Sending]] = deque()
        """Those who see to entries and have none."""
        self._witnesses: dict[bytes, tuple[Witness, Pending]] = {}
        self._signs = count()
        self._spare_signs: list[bytes] = []
        """Keys that deletions of now may be signed with; a few suffice, as they are used again and again."""
        self._seen: dict[Pending, int] = {}

    async def propose(
        self, proposals: Sequence[Proposal], term: TermState | None = None
    ) -> Sequence[Outcome | SkepError]:
        """Each one's outcome, or its error: NotLeader: the fence of ``term`` has fallen; Uncertain; Unavailable.

        A term whose writer is cancelled is over, unless it is soon known what came of all that had left, and shown.
        Raises: ResourceExhausted: too many proposals wait.
        """
        if len(self._queue) + len(proposals) > QUEUE_MAX:
            raise ResourceExhausted("too many writes are waiting for the store")
        fence = term.fence if term is not None else None
        pending = [Pending(proposal, fence) for proposal in proposals]
        self._queue.extend(pending)
        self._send_on()
        try:
            return [await one.outcome for one in pending]
        except asyncio.CancelledError:
            if term is not None:
                await leave(term, partial(self._settled, pending))
            raise
        finally:
            for one in pending:
                one.outcome.cancel()

    async def _settled(self, pending: Sequence[Pending]) -> None:
        """Return when it is known what came of each, and the replica shows it.  Raises: Uncertain."""
        for late in [late for one in pending if (late := one.late()) is not None]:
            outcome = await late
            if isinstance(outcome, Uncertain):
                raise outcome
            if isinstance(outcome, Committed):
                await self._replica.reached(outcome.revision)

    async def run(self) -> None:
        """Send until cancelled."""
        await self._move_ticket()
        async with asyncio.TaskGroup() as group:
            for number in range(IN_FLIGHT_SLOW):
                group.create_task(self._see_to_entries(), name=f"batcher-{number}")

    def observe(self, key: bytes, value: bytes | None, revision: int) -> None:
        """The replica has met this write.  Called before it shows in the replica.

        Its waiter need not wait for etcd's answer then, which as often as not comes after the watch, and behind all
        that the commit wakes.  That goes for encrypted values alone: nobody else can have written the same.
        """
        found = self._witnesses.get(key)
        if found is not None and found[0].value == value:
            self._seen[found[1]] = revision
            if not is_clear(key):
                found[1].resolve(Committed(revision))
        elif key == self._ticket_name and value == self._ticket_value:
            self._ticket_moved(revision)

    async def _see_to_entries(self) -> None:
        while True:
            given: asyncio.Future[Sending] = asyncio.get_running_loop().create_future()
            self._idle.append(given)
            self._send_on()
            sending = await given
            try:
                await self._see_to(sending)
            finally:
                self._away.remove(sending.entry.footprint)

    def _send_on(self) -> None:
        """Give entries of what may go now to those who are idle.

        A small one leaves before this returns, and not when the turn of who sees to it comes in the event loop.
        """
        while self._queue and self._idle and self._move is None and self._has_room():
            if self._idle[0].done():
                self._idle.popleft()  # it ends
                continue
            entry = next_entry(self._queue, self._away)
            if not entry.pending:
                return
            self._away.append(entry.footprint)
            for pending in entry.pending:
                pending.is_away = True
            sending = Sending(entry, self._replica.resets, self._cipher.ring_revision)
            self._idle.popleft().set_result(sending)
            if len(entry.pending) < BREATH:
                for pending in entry.pending:
                    self._encode(pending, sending)
                self._send(sending)

    def _has_room(self) -> bool:
        return len(self._away) < (IN_FLIGHT if self._took_s < SLOW_S else IN_FLIGHT_SLOW)

    def _encode(self, pending: Pending, sending: Sending) -> None:
        txn = sending.request.success.add().request_txn
        witness = fill_txn(txn, pending.proposal, pending.fence, self._cipher, self._sign)
        sending.witnesses.append(witness)
        self._witnesses[witness.key] = (witness, pending)

    def _sign(self) -> bytes:
        return (
            self._spare_signs.pop()
            if self._spare_signs
            else b"%b/%d" % (self._ticket_name, next(self._signs))
        )

    def _send(self, sending: Sending) -> None:
        sending.request.MergeFrom(guard(self._ticket, self._ticket_revision, sending.ring_revision))
        sending.sent_at = self._clock.monotonic()
        sending.answer = self._client.txn(sending.request, timeout_s=self._patience.seconds)

    async def _see_to(self, sending: Sending) -> None:
        entry = sending.entry
        try:
            for pending in entry.pending[len(sending.witnesses) :]:
                self._encode(pending, sending)
                if len(sending.witnesses) % BREATH == 0:
                    await asyncio.sleep(0)  # others' turn; this entry is already counted as on its way
            if sending.answer is None:
                self._send(sending)
            assert sending.answer is not None, "it was just sent"
            reply = await sending.answer
        except Uncertain as error:
            log.warning("outcome of writes unknown", proposals=len(entry.pending), error=str(error))
            self._took_s = self._patience.seconds
            self._patience.missed()
            await self._settle(entry, sending.loads)
        except Busy:
            await self._backoff().sleep(self._clock)
            self._requeue(entry.pending)
        except SkepError as error:
            for pending in entry.pending:
                pending.resolve(error)
        else:
            self._took_s = self._clock.monotonic() - sending.sent_at
            self._patience.answered(self._took_s)
            self._answer(entry, reply)
        finally:
            for pending, witness in zip(entry.pending, sending.witnesses, strict=False):
                self._seen.pop(pending, None)
                self._witnesses.pop(witness.key, None)
                if witness.key.startswith(self._ticket_name):
                    self._spare_signs.append(witness.key)

    def _answer(self, entry: Entry, reply: pb.TxnResponse) -> None:
        if not reply.succeeded:
            # The ticket moved, by ourselves, or there is another key ring: nothing of this was written.
            ticket, ring = (read.response_range.kvs for read in reply.responses)
            if ticket:
                self._ticket_revision = ticket[0].mod_revision
            if ring and ring[0].mod_revision > self._cipher.ring_revision:
                self._cipher.use(decoded_ring(ring[0].value), ring[0].mod_revision)
            self._requeue(entry.pending)
            return
        revision = reply.header.revision
        for pending, response in zip(entry.pending, reply.responses, strict=True):
            nested = response.response_txn
            if nested.succeeded:
                pending.resolve(Committed(revision))
            elif pending.fence is not None and is_fence_fallen(nested, pending.fence):
                pending.resolve(NotLeader("another manager leads"))
            else:
                pending.resolve(Conflict(revision))

    async def _settle(self, entry: Entry, loads: int) -> None:
        """Find out what became of an entry without an answer, and send again what did not happen."""
        revision = await self._move_ticket()
        await self._replica.reached(revision)
        if self._replica.resets != loads:
            # The replica was loaded anew and may have missed the write and what came after it.
            for pending in entry.pending:
                pending.resolve(Uncertain("the outcome of a write could not be found out"))
            return
        lost: list[Pending] = []
        for pending in entry.pending:
            if pending in self._seen:
                pending.resolve(Committed(self._seen[pending]))
            else:
                lost.append(pending)
        self._requeue(lost)

    async def _move_ticket(self) -> int:
        """Void all entries on their way; the revision from which on that holds.

        One move does for all that were sent before it ends: they compare an older ticket.
        """
        if self._move is not None:
            return await asyncio.shield(self._move)
        move: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._move = move
        self._ticket_value = token_bytes(TICKET_BYTES)
        try:
            async with asyncio.TaskGroup() as group:
                putting = group.create_task(self._put_ticket(), name="ticket")
                revision = await move
                putting.cancel()
        finally:
            move.cancel()  # whoever waits for it ends, too
            self._move = None
        self._send_on()
        return revision

    async def _put_ticket(self) -> None:
        backoff = self._backoff()
        while True:
            try:
                reply = await self._client.put(
                    self._ticket_name, self._ticket_value, timeout_s=self._patience.seconds
                )
            except Unavailable:
                self._patience.missed()
                await backoff.sleep(self._clock)
            else:
                return self._ticket_moved(reply.header.revision)

    def _ticket_moved(self, revision: int) -> None:
        self._ticket_revision = max(self._ticket_revision, revision)
        if self._move is not None and not self._move.done():
            self._move.set_result(revision)

    def _requeue(self, pending: list[Pending]) -> None:
        for one in pending:
            one.came_back()
        self._queue.extendleft(reversed(pending))
        self._send_on()
