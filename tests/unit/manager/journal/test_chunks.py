"""How entries are kept: the chunks, their bounds, and what a page has of them."""

import asyncio
from random import Random

import pytest
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.manager.journal import chunks
from skep.manager.journal.pending import Pending
from skep.manager.journal.reading import (
    CHUNKS_AT_ONCE,
    TIME_MAX,
    HistoryQuery,
    page,
    position_of,
    revision_at,
    time_of,
)
from skep.model.history import EntryType, HistoryPage, JournalEntry, bounded
from skep.model.values.times import SECOND_NS, Timestamp, timestamp
from skep.store.kinds import JournalChunk
from skep.store.state import State
from skep.store.transactions.proposal import MAX_BYTES
from tests.support.managers.counted_calls import counting_calls_of_callbacks


def an_entry(number: int, kind: EntryType = EntryType.CHANGE, **fields: object) -> JournalEntry:
    revision = number if kind is EntryType.CHANGE else 0
    return JournalEntry(
        id=f"{number}-{kind.value}",
        time=timestamp(number * SECOND_NS),
        revision=revision,
        kind=kind,
        **fields,
    )  # type: ignore[arg-type]


def view_of(*kept: JournalChunk) -> State:
    view = State()
    for one in kept:
        view.table_by_type[JournalChunk].store(one.id, None, one, moves=True)
    return view


def test_entries_come_back_as_they_were_written() -> None:
    entries = [an_entry(number, message="web → ✓") for number in range(1, 131)]
    first = chunks.with_changes(None, entries[:30], 30, [(1, 2)])
    second = chunks.with_changes(first[-1], entries[30:], 130, [(5 * SECOND_NS, 40)])
    assert [one.count for one in second] == [50, 50, 30]
    assert second[0].id == first[0].id
    assert second[-1].revision == 130
    assert [entry for one in second for entry in chunks.entries_in(one)] == entries


def test_a_chunk_that_cannot_be_read_has_no_entries() -> None:
    unreadable = JournalChunk(id=chunks.changes_id(1), count=3, revision=1, data=b"?")
    assert chunks.entries_in(unreadable) == ()
    (written,) = chunks.with_changes(unreadable, [an_entry(2)], 2, [])
    assert written.id != unreadable.id


def test_requests_after_the_clock_was_set_back_fill_the_newest_chunk() -> None:
    (last,) = chunks.with_requests(None, [an_entry(9000 + n, EntryType.REQUEST) for n in range(50)], "m1")
    (fresh,) = chunks.with_requests(last, [an_entry(1, EntryType.REQUEST)], "m1")
    assert chunks.last_of_requests(view_of(last, fresh), "m1") == fresh
    assert chunks.surplus([last, fresh], 2) == [last.id]


def test_a_service_that_crashes_in_a_loop_leaves_the_history_of_others() -> None:
    (last,) = chunks.with_changes(None, [an_entry(1, message="first")], 1, [])
    for number in range(2, 1000):
        action = ("start", "fail", "replace")[number % 3]
        message = f"{action} on w{number % 7}"
        entry = an_entry(number, type="task", action=action, service_id="s", name="web.1", message=message)
        (last,) = chunks.with_changes(last, [entry], number, [])
    kept = chunks.entries_in(last)
    assert len(kept) == 13
    assert kept[0].message == "first"
    assert sum(entry.count for entry in kept) == last.revision == 999
    assert [entry.revision for entry in kept[-3:]] == [997, 998, 999]
    # The omitted ones were on other nodes as well, so no entry claims 329 starts on w5.
    words = [
        "fail on w3 (the last of 329)",
        "replace on w4 (the last of 330)",
        "start on w5 (the last of 330)",
    ]
    assert [entry.message for entry in kept[-3:]] == words


def test_each_series_keeps_half_and_the_oldest_go() -> None:
    changes = [replace(JournalChunk(id=chunks.changes_id(n)), count=50) for n in range(10)]
    requests = [replace(JournalChunk(id=chunks.requests_id(n, "m1")), count=50) for n in range(2)]
    assert chunks.surplus([*changes, *requests], 400) == [one.id for one in changes[:6]]
    assert chunks.surplus([*changes, *requests], 0) == sorted(one.id for one in [*changes, *requests])
    large = [replace(one, data=bytes(2 * 1024 * 1024)) for one in changes]
    assert chunks.surplus(large, 100_000) == [one.id for one in large[:8]]


def test_marks_are_thinned_and_keep_the_last() -> None:
    marks = chunks.thinned([(n * SECOND_NS, n) for n in range(1000)], most=100)
    assert len(marks) <= 100
    assert marks[-1] == (999 * SECOND_NS, 999)
    assert marks == tuple(sorted(marks))


async def test_the_revision_of_a_time_is_that_of_the_last_mark() -> None:
    (chunk,) = chunks.with_changes(None, [an_entry(10)], 10, [(10 * SECOND_NS, 10), (20 * SECOND_NS, 15)])
    view, own = view_of(chunk), [(30 * SECOND_NS, 21)]
    assert await revision_at(view, own, 9 * SECOND_NS) is None
    assert await revision_at(view, own, 12 * SECOND_NS) == 10
    assert await revision_at(view, own, 29 * SECOND_NS) == 15
    assert await revision_at(view, own, 99 * SECOND_NS) == 21
    assert await time_of(view, own, 11) == 20 * SECOND_NS
    assert await time_of(view, own, 22) is None


async def test_no_step_reads_all_marks_of_a_full_journal() -> None:
    marks = tuple((n * SECOND_NS, n) for n in range(chunks.MARKS_MAX))
    (chunk,) = chunks.with_changes(None, [an_entry(10)], 10, ())
    view = view_of(*(replace(chunk, id=f"{chunk.id}-{n:03}", marks=marks) for n in range(300)))
    with counting_calls_of_callbacks() as counts:
        for _ in range(3):  # the first step is that of this test
            await asyncio.sleep(0)
            assert await revision_at(view, (), TIME_MAX) == chunks.MARKS_MAX - 1
            assert await time_of(view, (), 7) == 7 * SECOND_NS
    assert max(counts) < 3 * CHUNKS_AT_ONCE * chunks.MARKS_MAX


# -- pages ---------------------------------------------------------------------------------------------------------


def kept(changes: int, requests: int) -> State:
    one = [an_entry(n, service="web" if n % 2 else "db") for n in range(1, changes + 1)]
    other = [an_entry(n, EntryType.REQUEST, node="m1") for n in range(1, requests + 1)]
    return view_of(*chunks.with_changes(None, one, changes, ()), *chunks.with_requests(None, other, "m1"))


def pages(view: State, query: HistoryQuery) -> list[HistoryPage]:
    found = [asyncio.run(page(view, query))]
    while found[-1].next:
        found.append(asyncio.run(page(view, replace(query, cursor=found[-1].next))))
    return found


@pytest.mark.parametrize("is_ascending", [False, True])
@pytest.mark.parametrize("limit", [1, 7, 200])
def test_pages_have_every_entry_once_and_in_order(limit: int, *, is_ascending: bool) -> None:
    view = kept(120, 80)
    found = pages(view, HistoryQuery(limit=limit, is_ascending=is_ascending))
    assert all(len(one.entries) == limit for one in found[:-1])
    entries = [entry for one in found for entry in one.entries]
    places = [(position_of(entry), entry.kind.value) for entry in entries]
    assert len(set(places)) == 200
    assert [at for (at, _), _ in places] == sorted((at for (at, _), _ in places), reverse=not is_ascending)
    assert found[0].total == 200


def test_a_page_has_what_was_asked_for() -> None:
    view = kept(120, 80)

    def count(query: HistoryQuery) -> int:
        return sum(len(one.entries) for one in pages(view, query))

    assert count(HistoryQuery(services=frozenset({"web"}))) == 60
    assert count(HistoryQuery(nodes=frozenset({"m1"}))) == 80
    assert count(HistoryQuery(about=frozenset({"web"}))) == 60
    assert count(HistoryQuery(kinds=frozenset({EntryType.REQUEST}))) == 80
    assert count(HistoryQuery(since_ns=100 * SECOND_NS)) == 21
    assert count(HistoryQuery(until_ns=10 * SECOND_NS)) == 20
    with pytest.raises(InvalidArgument, match="cursor"):
        asyncio.run(page(view, HistoryQuery(cursor="x")))


# -- what is not written yet -----------------------------


def test_what_does_not_fit_is_reported_by_an_entry() -> None:
    pending = Pending(EntryType.CHANGE, most=3)
    for number in range(1, 6):
        pending.add(an_entry(number))
    first = pending.first(10, Timestamp("2026-01-31T12:00:00Z"))
    assert [one.action for one in first] == ["lost-entries", "", "", ""]
    assert first[0].message.startswith("2 entries are missing here")
    pending.add(an_entry(6))  # meanwhile
    pending.done(first)
    assert [one.id for one in pending.first(10, Timestamp(""))] == ["6-change"]


def test_what_is_being_written_is_not_lost_when_more_comes_than_fits() -> None:
    pending = Pending(EntryType.CHANGE, most=3)
    for number in (1, 2, 3):
        pending.add(an_entry(number))
    taken = pending.first(2, Timestamp(""))
    assert [one.revision for one in taken] == [1, 2]
    for number in (4, 5, 6):
        pending.add(an_entry(number))  # while they are being written
    pending.done(taken)
    rest = pending.first(9, Timestamp(""))
    assert rest[0].message.startswith("1 entry is missing here")
    assert [one.revision for one in rest[1:]] == [4, 5, 6]


def test_what_no_leader_writes_stays_within_its_bound() -> None:
    pending = Pending(EntryType.CHANGE, most=3)
    for number in range(100):
        pending.add(an_entry(number))
        if number == 10:
            pending.first(3, Timestamp(""))  # and the leader lost its term
    assert len(pending) == 3 + 2
    pending.written_until(98)
    pending.add(an_entry(100))
    assert [one.revision for one in pending.first(9, Timestamp(""))] == [99, 100]


def test_all_entries_of_a_revision_are_taken_together() -> None:
    pending = Pending(EntryType.CHANGE)
    for number, id in ((1, "a"), (2, "b"), (2, "c"), (3, "d")):
        pending.add(replace(an_entry(number), id=id))
    assert [one.id for one in pending.first(2, Timestamp(""))] == ["a", "b", "c"]


def test_what_another_manager_has_written_is_dropped() -> None:
    pending = Pending(EntryType.CHANGE)
    for number in (1, 2, 3):
        pending.add(an_entry(number))
    pending.written_until(2)
    assert [one.revision for one in pending.first(9, Timestamp(""))] == [3]


def test_an_entry_is_bounded() -> None:
    entry = bounded(JournalEntry(message="x" * 5000, path="/" * 5000, name="n" * 5000, service="s" * 5000))
    assert len(entry.message) == 500
    assert len(entry.path) == 200
    assert len(entry.name) == len(entry.service) == 100


def test_words_of_a_path_are_bounded() -> None:
    entry = bounded(JournalEntry(type="t" * 5000, action="a" * 5000, method="m" * 5000))
    assert len(entry.type) == len(entry.action) == len(entry.method) == 100


def test_a_write_of_the_longest_entries_fits_a_transaction() -> None:
    pending, rng = Pending(EntryType.REQUEST), Random(1)
    for number in range(1000):
        text = "".join(map(chr, rng.choices(range(0x20000, 0x2A000), k=1000)))
        entry = an_entry(
            number, EntryType.REQUEST, message=text[:500], path=text[500:700], name=text[700:800]
        )
        pending.add(replace(entry, type=text[800:900], action=text[900:]))
    taken = pending.first(1000, Timestamp(""))
    assert sum(len(chunk.data) for chunk in chunks.with_requests(None, taken, "m1")) < MAX_BYTES
