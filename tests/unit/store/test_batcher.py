"""Which proposals go together in one raft batch."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.aio.backoff import Backoff
from skep.aio.clock import SystemClock
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.batcher import (
    BATCH_BYTES_MAX,
    BATCH_PROPOSALS_MAX,
    ETCD_OPERATIONS_MAX,
    Batch,
    Batcher,
    QueuedProposal,
    fill_batch,
)
from skep.store.etcd.client import WRITE_S_MAX
from skep.store.etcd.encryption.cipher import Cipher, new_key_ring, new_wrapping_key
from skep.store.etcd.errors import Uncertain, error_of
from skep.store.etcd.requests import etcd_key
from skep.store.leadership import TermState
from skep.store.replica import Replica
from skep.store.transactions.proposal import Committed, Exists, Footprint, NothingSince, Proposal, Unchanged


def proposals() -> st.SearchStrategy[Proposal]:
    """Small ones over few keys, so that they often meet."""
    plain = st.sampled_from(["o/a/1", "o/a/2", "o/service/a", "o/service/b", "n/a/x", "p/tcp/80"])
    references = st.sampled_from(["r/secret/1/service/a", "r/secret/1/service/b", "r/secret/2/service/a"])
    compares = st.one_of(
        plain.map(lambda key: Unchanged(key, 1)),
        plain.map(lambda key: Exists(key, 1)),
        st.sampled_from(["r/secret/1/", "r/secret/2/", "o/service/"]).map(
            lambda prefix: NothingSince(prefix, 1)
        ),
    )
    keys = st.one_of(plain, references)
    return st.builds(
        lambda compares, puts, deletes: Proposal(
            tuple(compares), tuple((key, b"v") for key in puts), tuple(set(deletes) - set(puts))
        ),
        st.lists(compares, max_size=2),
        st.lists(keys, min_size=1, max_size=2, unique=True),
        st.lists(keys, max_size=1),
    )


def queued(them: list[Proposal]) -> deque[QueuedProposal]:
    return deque(QueuedProposal(one, None) for one in them)


def drained(queue: deque[QueuedProposal]) -> list[Batch]:
    batches = []
    while queue:
        batch = fill_batch(Batch(), queue, [])
        assert batch.proposals, "the first in the queue can always go"
        batches.append(batch)
    return batches


def in_loop(check):
    async def run():
        return check()

    return asyncio.run(run())


def keys_of(proposal: Proposal) -> tuple[set[str], set[str]]:
    """What it writes; what it compares, with prefixes spelled out over all keys that tests use."""
    written = {key for key, _ in proposal.puts} | set(proposal.deletes)
    compared = set()
    for compare in proposal.compares:
        if isinstance(compare, NothingSince):
            prefix = compare.prefix if compare.prefix.startswith("o/") else f"{compare.prefix}service/"
            compared |= {f"{prefix}{id}" for id in "ab"}
        else:
            compared.add(compare.key)
    return written, compared


@given(st.lists(proposals(), max_size=12))
def test_no_entry_holds_two_proposals_of_which_one_reads_or_writes_what_the_other_writes(them):
    for batch in in_loop(lambda: drained(queued(them))):
        for one in batch.proposals:
            for other in batch.proposals:
                if one is not other:
                    written, _ = keys_of(one.proposal)
                    assert written.isdisjoint(set.union(*keys_of(other.proposal)))


@given(st.lists(proposals(), max_size=12))
def test_every_proposal_is_sent_once_and_rivals_keep_their_order(them):
    sent = [one.proposal for batch in in_loop(lambda: drained(queued(them))) for one in batch.proposals]
    assert sorted(map(id, sent)) == sorted(map(id, them))
    for first, one in enumerate(them):
        for other in them[first + 1 :]:
            if keys_of(one)[0] & keys_of(other)[0]:
                assert [id(x) for x in sent].index(id(one)) < [id(x) for x in sent].index(id(other))


@given(st.lists(proposals(), min_size=1, max_size=6), proposals())
def test_what_touches_something_on_its_way_waits(them, away):
    def check():
        footprint = Footprint.of(away)
        queue = queued(them)
        batch = fill_batch(Batch(), queue, [footprint])
        written, compared = keys_of(away)
        for one in batch.proposals:
            mine, read = keys_of(one.proposal)
            assert mine.isdisjoint(written | compared)
            assert read.isdisjoint(written)
        assert len(batch.proposals) + len(queue) == len(them)

    in_loop(check)


@given(st.lists(st.integers(1, 120), min_size=1, max_size=150))
def test_an_entry_stays_within_etcds_limit_of_operations(sizes):
    def check():
        them = [
            Proposal(puts=tuple((f"o/{number}/{key}", b"") for key in range(size)))
            for number, size in enumerate(sizes)
        ]
        for batch in drained(queued(them)):
            largest = max(one.operations for one in batch.proposals)
            assert len(batch.proposals) == 1 or len(batch.proposals) + largest <= ETCD_OPERATIONS_MAX
            assert len(batch.proposals) <= BATCH_PROPOSALS_MAX

    in_loop(check)


def test_an_entry_stays_within_its_bytes_and_a_large_proposal_goes_alone():
    def check():
        small = [Proposal(puts=((f"o/{n}", b"x" * 300_000),)) for n in range(6)]
        large = Proposal(puts=(("o/large", b"x" * 1_400_000),))
        batches = drained(queued([*small, large]))
        assert [len(batch.proposals) for batch in batches] == [3, 3, 1]
        for batch in batches[:2]:
            assert sum(one.proposal.size_bytes for one in batch.proposals) <= BATCH_BYTES_MAX

    in_loop(check)


def test_a_proposal_without_a_waiter_is_not_sent():
    def check():
        queue = queued([Proposal(puts=(("o/a", b""),)), Proposal(puts=(("o/b", b""),))])
        queue[0].outcome.cancel()
        return [one.proposal.puts[0][0] for one in fill_batch(Batch(), queue, []).proposals]

    assert in_loop(check) == ["o/b"]


class Unanswering:
    """etcd that takes entries and says nothing; ``entries``: what it took."""

    def __init__(self) -> None:
        self.entries: asyncio.Queue[pb.TxnRequest] = asyncio.Queue()

    async def put(self, key: bytes, value: bytes, *, timeout_s: float) -> pb.PutResponse:
        return pb.PutResponse(header=pb.ResponseHeader(revision=1))

    async def txn(self, request: pb.TxnRequest, *, timeout_s: float) -> pb.TxnResponse:
        self.entries.put_nowait(request)
        return await asyncio.Event().wait()  # type: ignore[return-value]


@asynccontextmanager
async def a_batcher(client: Unanswering) -> AsyncIterator[Batcher]:
    key = new_wrapping_key()
    cipher = Cipher(new_key_ring(key), key)
    batcher = Batcher(client, cipher, Replica(), "w/m1", SystemClock(), lambda: Backoff(0.01, 0.1))  # type: ignore[arg-type]
    async with asyncio.TaskGroup() as group:
        running = group.create_task(batcher.run())
        yield batcher
        running.cancel()


async def put_of(client: Unanswering) -> pb.PutRequest:
    """The write of the one proposal in the next batch."""
    batch = await client.entries.get()
    return batch.success[0].request_txn.success[0].request_put


async def test_a_write_that_the_watch_has_brought_is_committed_before_etcd_answers():
    client = Unanswering()
    async with a_batcher(client) as batcher, asyncio.timeout(5):
        proposing = asyncio.create_task(batcher.propose([Proposal(puts=(("o/a/1", b"v"),))], None))
        put = await put_of(client)
        batcher.observe(put.key, b"what another manager wrote there", 6)
        batcher.observe(put.key, None, 7)
        await asyncio.sleep(0)
        assert not proposing.done()
        batcher.observe(put.key, put.value, 8)
        assert await proposing == [Committed(8)]


async def test_what_others_may_have_written_as_well_waits_for_the_answer():
    client = Unanswering()
    async with a_batcher(client) as batcher, asyncio.timeout(5):
        clear = asyncio.create_task(batcher.propose([Proposal(puts=(("meta/level", b"1"),))], None))
        put = await put_of(client)
        batcher.observe(put.key, put.value, 6)
        removal = asyncio.create_task(batcher.propose([Proposal(deletes=("o/a/1",))], None))
        await client.entries.get()
        batcher.observe(etcd_key("o/a/1"), None, 7)
        await asyncio.sleep(0)
        assert not clear.done()
        assert not removal.done()
        clear.cancel()
        removal.cancel()


async def test_no_more_than_two_entries_are_on_their_way():
    client = Unanswering()
    async with a_batcher(client) as batcher, asyncio.timeout(5):
        proposing = []
        puts = []
        for number in range(6):
            proposal = Proposal(puts=((f"o/a/{number}", b"v"),))
            proposing.append(asyncio.create_task(batcher.propose([proposal], None)))
            if number < 2:
                puts.append(await put_of(client))
        for _ in range(5):
            await asyncio.sleep(0)
        assert client.entries.empty()
        for revision, put in enumerate(puts, 2):
            batcher.observe(put.key, put.value, revision)
            assert await proposing[revision - 2] == [Committed(revision)]
        for one in proposing[2:]:
            one.cancel()


class Taking(Unanswering):
    """etcd whose calls are on their way as soon as they are made, as those of the real client."""

    def txn(  # type: ignore[override]
        self, request: pb.TxnRequest, *, timeout_s: float
    ) -> asyncio.Future[pb.TxnResponse]:
        self.entries.put_nowait(request)
        return asyncio.get_running_loop().create_future()


async def test_a_small_entry_has_left_before_its_proposer_waits():
    client = Taking()
    async with a_batcher(client) as batcher, asyncio.timeout(5):
        first = asyncio.create_task(batcher.propose([Proposal(puts=(("o/a/0", b"v"),))], None))
        await client.entries.get()  # those who send are there now
        second = batcher.propose([Proposal(puts=(("o/a/1", b"v"),))], None)
        second.send(None)  # up to its first wait
        assert client.entries.get_nowait().success[0].request_txn.success[0].request_put.key == etcd_key(
            "o/a/1"
        )
        second.close()
        first.cancel()


async def test_concurrent_proposals_share_a_batch_in_any_order():
    client = Taking()
    async with a_batcher(client) as batcher, asyncio.timeout(5):
        many = [Proposal(puts=((f"o/a/{number}", b"v"),)) for number in range(60)]
        proposing = asyncio.create_task(batcher.propose(many, None))
        batch = await client.entries.get()
        assert [txn.request_txn.success[0].request_put.key for txn in batch.success] == [
            etcd_key(f"o/a/{number}") for number in range(60)
        ]
        proposing.cancel()


async def test_an_entry_compares_the_ring_of_before_its_first_value_was_encrypted():
    """A new ring that comes while a long batch is being encoded voids it: its first values are under the old key."""
    client = Taking()
    key = new_wrapping_key()
    cipher = Cipher(new_key_ring(key), key, 5)
    batcher = Batcher(client, cipher, Replica(), "w/m1", SystemClock(), lambda: Backoff(0.01, 0.1))  # type: ignore[arg-type]
    async with asyncio.TaskGroup() as group, asyncio.timeout(5):
        running = group.create_task(batcher.run())
        many = [Proposal(puts=((f"o/a/{number}", b"v"),)) for number in range(60)]
        proposing = group.create_task(batcher.propose(many, None))
        while not batcher.markers:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0)
        assert client.entries.empty()  # it is under way, and has given way to others
        cipher.use(cipher.new_ring(), 6)
        batch = await client.entries.get()
        assert [
            compare.mod_revision for compare in batch.compare if compare.key == etcd_key("meta/keys")
        ] == [5]
        proposing.cancel()
        running.cancel()


class Slow(Taking):
    """etcd that does what it is asked for and never answers in time: only the watch shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.tickets: asyncio.Queue[bytes] = asyncio.Queue()
        self.timeouts_s: list[float] = []
        self.is_slow = False

    async def put(self, key: bytes, value: bytes, *, timeout_s: float) -> pb.PutResponse:
        if not self.is_slow:
            return await super().put(key, value, timeout_s=timeout_s)
        self.tickets.put_nowait(value)
        self.timeouts_s.append(timeout_s)
        raise Uncertain("no answer in time")

    def txn(  # type: ignore[override]
        self, request: pb.TxnRequest, *, timeout_s: float
    ) -> asyncio.Future[pb.TxnResponse]:
        self.timeouts_s.append(timeout_s)
        response = super().txn(request, timeout_s=timeout_s)
        if self.is_slow:
            response.set_exception(Uncertain("no answer in time"))
        return response


async def test_a_write_is_settled_by_its_ticket_in_the_watch_alone_and_each_attempt_waits_longer():
    client = Slow()
    async with a_batcher(client) as batcher, asyncio.timeout(5):
        first = asyncio.create_task(batcher.propose([Proposal(puts=(("o/a/0", b"v"),))], None))
        put = await put_of(client)
        client.is_slow = True
        batcher.observe(put.key, put.value, 2)
        await first
        client.timeouts_s.clear()
        one = asyncio.create_task(batcher.propose([Proposal(puts=(("o/a/1", b"v"),))], None))
        await client.entries.get()
        ticket = await client.tickets.get()
        assert len(set(ticket)) > 1  # different from every other marker
        assert await client.tickets.get() == ticket
        assert client.timeouts_s == [1.0, 2.0, 4.0]
        await client.tickets.get()
        assert client.timeouts_s[-1] == WRITE_S_MAX
        batcher.replica.advance(6)
        batcher.observe(etcd_key("w/m1"), b"of another move", 6)
        with pytest.raises(TimeoutError):  # it would be void
            await asyncio.wait_for(client.entries.get(), 0.05)
        client.is_slow = False
        batcher.replica.advance(7)
        batcher.observe(etcd_key("w/m1"), ticket, 7)
        batch = await client.entries.get()  # sent again, as nothing of it had appeared
        compared = {compare.key: compare.mod_revision for compare in batch.compare}
        assert compared[etcd_key("w/m1")] == 7
        put = batch.success[0].request_txn.success[0].request_put
        batcher.observe(put.key, put.value, 8)
        assert await one == [Committed(8)]


class Dropping(Taking):
    """etcd whose raft drops the first entry, as during a transfer of leadership."""

    has_dropped = False

    def txn(  # type: ignore[override]
        self, request: pb.TxnRequest, *, timeout_s: float
    ) -> asyncio.Future[pb.TxnResponse]:
        response = super().txn(request, timeout_s=timeout_s)
        if not self.has_dropped:
            self.has_dropped = True
            response.set_exception(error_of("raft proposal dropped"))
        return response


async def test_a_proposal_that_raft_has_dropped_is_sent_again():
    client = Dropping()
    async with a_batcher(client) as batcher, asyncio.timeout(5):
        proposing = asyncio.create_task(batcher.propose([Proposal(puts=(("o/a/1", b"v"),))], None))
        await put_of(client)
        put = await put_of(client)
        batcher.observe(put.key, put.value, 2)
        assert await proposing == [Committed(2)]


async def leaving(
    client: Taking, batcher: Batcher, terms: dict[str, TermState]
) -> tuple[dict[str, "asyncio.Task[object]"], pb.TxnRequest]:
    """Writers of three terms are cancelled: an batch has left with what two of them write, not what the third does."""
    tasks: dict[str, asyncio.Task[object]] = {}
    for name in ("first", "second", "waiting"):
        key = "o/a/2" if name == "second" else "o/a/1"
        proposing = batcher.propose([Proposal(puts=((key, b"v"),))], terms[name])
        tasks[name] = asyncio.create_task(proposing)
    batch = await client.entries.get()
    for task in tasks.values():
        task.cancel()
    await asyncio.wait([tasks["waiting"]])
    assert not terms["waiting"].is_lost
    return tasks, batch


async def test_a_writer_that_goes_waits_for_what_came_of_its_write_and_its_term_goes_on():
    client = Taking()
    terms = {name: TermState(1, 1) for name in ("first", "second", "waiting")}
    async with a_batcher(client) as batcher, asyncio.timeout(5):
        tasks, batch = await leaving(client, batcher, terms)
        for revision, one in zip((7, 8), batch.success, strict=True):
            put = one.request_txn.success[0].request_put
            batcher.observe(put.key, put.value, revision)
        await asyncio.sleep(0.01)
        assert not tasks["first"].done()  # it is known, and does not show yet
        batcher.replica.advance(8)
        await asyncio.wait([tasks["first"], tasks["second"]])
        assert not any(term.is_lost for term in terms.values())
        assert tasks["first"].cancelled()


async def test_a_writer_that_goes_ends_its_term_where_nothing_is_known():
    client = Taking()
    terms = {name: TermState(1, 1, settle_s=0.05) for name in ("first", "second", "waiting")}
    async with a_batcher(client) as batcher, asyncio.timeout(5):
        tasks, _ = await leaving(client, batcher, terms)
        await asyncio.wait(tasks.values())
        assert {name: term.is_lost for name, term in terms.items()} == {
            "first": True,
            "second": True,
            "waiting": False,
        }


async def test_a_writer_of_a_term_that_is_over_goes_at_once():
    client = Taking()
    terms = {name: TermState(1, 1) for name in ("first", "second", "waiting")}
    async with a_batcher(client) as batcher, asyncio.timeout(5):
        writing = asyncio.create_task(batcher.propose([Proposal(puts=(("o/a/1", b"v"),))], terms["first"]))
        await client.entries.get()
        for term in terms.values():
            term.lose()
        writing.cancel()
        await asyncio.wait([writing])
