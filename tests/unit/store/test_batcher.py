"""Which proposals go together in one raft entry."""

import asyncio
from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from skep.store.etcd.batcher import (
    ENTRY_BYTES_MAX,
    ENTRY_PROPOSALS_MAX,
    ETCD_OPERATIONS_MAX,
    Entry,
    Pending,
    next_entry,
)
from skep.store.proposal import Exists, Footprint, NothingSince, Proposal, Unchanged


def proposals() -> st.SearchStrategy[Proposal]:
    """Small ones over few keys, so that they often meet."""
    plain = st.sampled_from(["o/a/1", "o/a/2", "o/a/3", "n/a/x", "p/tcp/80"])
    references = st.sampled_from(["r/secret/1/service/a", "r/secret/1/service/b", "r/secret/2/service/a"])
    compares = st.one_of(
        plain.map(lambda key: Unchanged(key, 1)),
        plain.map(lambda key: Exists(key, 1)),
        st.sampled_from(["r/secret/1/", "r/secret/2/"]).map(lambda prefix: NothingSince(prefix, 1)),
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


def queued(them: list[Proposal]) -> deque[Pending]:
    return deque(Pending(one, None) for one in them)


def drained(queue: deque[Pending]) -> list[Entry]:
    entries = []
    while queue:
        entry = next_entry(queue, [])
        assert entry.pending, "the first in the queue can always go"
        entries.append(entry)
    return entries


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
            compared |= {f"{compare.prefix}service/{id}" for id in "ab"}
        else:
            compared.add(compare.key)
    return written, compared


@given(st.lists(proposals(), max_size=12))
def test_no_entry_holds_two_proposals_of_which_one_reads_or_writes_what_the_other_writes(them):
    for entry in in_loop(lambda: drained(queued(them))):
        for one in entry.pending:
            for other in entry.pending:
                if one is not other:
                    written, _ = keys_of(one.proposal)
                    assert written.isdisjoint(set.union(*keys_of(other.proposal)))


@given(st.lists(proposals(), max_size=12))
def test_every_proposal_is_sent_once_and_rivals_keep_their_order(them):
    sent = [one.proposal for entry in in_loop(lambda: drained(queued(them))) for one in entry.pending]
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
        entry = next_entry(queue, [footprint])
        written, compared = keys_of(away)
        for one in entry.pending:
            mine, read = keys_of(one.proposal)
            assert mine.isdisjoint(written | compared)
            assert read.isdisjoint(written)
        assert len(entry.pending) + len(queue) == len(them)

    in_loop(check)


@given(st.lists(st.integers(1, 120), min_size=1, max_size=150))
def test_an_entry_stays_within_etcds_limit_of_operations(sizes):
    def check():
        them = [
            Proposal(puts=tuple((f"o/{number}/{key}", b"") for key in range(size)))
            for number, size in enumerate(sizes)
        ]
        for entry in drained(queued(them)):
            largest = max(one.operations for one in entry.pending)
            assert len(entry.pending) == 1 or len(entry.pending) + largest <= ETCD_OPERATIONS_MAX
            assert len(entry.pending) <= ENTRY_PROPOSALS_MAX

    in_loop(check)


def test_an_entry_stays_within_its_bytes_and_a_large_proposal_goes_alone():
    def check():
        small = [Proposal(puts=((f"o/{n}", b"x" * 300_000),)) for n in range(6)]
        large = Proposal(puts=(("o/large", b"x" * 1_400_000),))
        entries = drained(queued([*small, large]))
        assert [len(entry.pending) for entry in entries] == [3, 3, 1]
        for entry in entries[:2]:
            assert sum(one.proposal.size_bytes for one in entry.pending) <= ENTRY_BYTES_MAX

    in_loop(check)


def test_a_proposal_nobody_waits_for_is_not_sent():
    def check():
        queue = queued([Proposal(puts=(("o/a", b""),)), Proposal(puts=(("o/b", b""),))])
        queue[0].outcome.cancel()
        return [one.proposal.puts[0][0] for one in next_entry(queue, []).pending]

    assert in_loop(check) == ["o/b"]
