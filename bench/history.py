"""The cost of ``skep history`` over an hour for a manager whose journal is full.

::

    .venv/bin/python -m bench.history                 # kept in results/
    .venv/bin/python -m bench.history --dry           # only printed

The journal in a store in memory has as many entries as a cluster keeps by default, half of them changes and half
requests, all of the same hour.  The benchmark reads the newest page as the command requests it, and then every page of
the hour.
"""

import statistics
import time
from collections.abc import Sequence

import msgspec

from bench.run import commit, measure_alone
from skep.aio.clock import SystemClock
from skep.aio.event_loop.gc_settings import configure_gc
from skep.manager.journal.chunks import ENTRIES_MAX, with_changes, with_requests
from skep.manager.journal.reading import LIMIT_MAX, HistoryQuery, page
from skep.model.history import By, EntryType, HistoryPage, JournalEntry
from skep.model.options.labels import HISTORY_DEFAULT
from skep.model.values.times import SECOND_NS, timestamp
from skep.store.interface import Transaction
from skep.store.kinds import JournalChunk
from skep.store.memory import MemoryStore

HOUR_S = 3600
BEGIN_NS = 1_800_000_000 * SECOND_NS
REPEATED = 9


class Result(msgspec.Struct, kw_only=True):
    """Times in milliseconds."""

    entries: int
    newest_ms: list[float]
    """Time of the newest page, including its transfer."""
    all_ms: list[float]
    all_pages: int
    all_processor_ms: float


def main() -> None:
    """Measure, and keep the result."""
    measure_alone(__doc__ or "", "history", _measure, _text)


async def _measure() -> Result:
    store = MemoryStore(SystemClock())
    half = HISTORY_DEFAULT // 2
    await _fill(store, [_change(number, half) for number in range(half)])
    await _fill(store, [_request(number, half) for number in range(half)])
    configure_gc()
    newest, every, pages, processor = [], [], 0, 0.0
    for _ in range(REPEATED):
        began = time.perf_counter()
        await _page(store, HistoryQuery(since_ns=BEGIN_NS, until_ns=BEGIN_NS + HOUR_S * SECOND_NS))
        newest.append((time.perf_counter() - began) * 1e3)
        began, spent = time.perf_counter(), time.process_time()
        pages, cursor = 0, ""
        while not pages or cursor:
            query = HistoryQuery(since_ns=BEGIN_NS, limit=LIMIT_MAX, is_ascending=True, cursor=cursor)
            cursor = (await _page(store, query)).next
            pages += 1
        every.append((time.perf_counter() - began) * 1e3)
        processor = (time.process_time() - spent) * 1e3
    return Result(
        entries=2 * half, newest_ms=newest, all_ms=every, all_pages=pages, all_processor_ms=processor
    )


async def _page(store: MemoryStore, query: HistoryQuery) -> HistoryPage:
    found = await page(store.view(), query)
    assert msgspec.json.encode(found)
    return found


async def _fill(store: MemoryStore, entries: Sequence[JournalEntry]) -> None:
    """Write ``entries`` in chunks."""

    def write(tx: Transaction, first: int) -> None:
        part = entries[first : first + ENTRIES_MAX]
        chunks = (
            with_changes(None, part, part[-1].revision, ())
            if part[0].kind is EntryType.CHANGE
            else with_requests(None, part, "m1")
        )
        for one in chunks:
            tx.put(one)

    for first in range(0, len(entries), ENTRIES_MAX):
        await store.update(write, first)
    kept = sum(one.count for one in store.view().find(JournalChunk) if one.id[0] == entries[0].id[0])
    assert kept == len(entries), (kept, len(entries))


def _at(number: int, of: int) -> int:
    return BEGIN_NS + number * HOUR_S * SECOND_NS // of


def _change(number: int, of: int) -> JournalEntry:
    return JournalEntry(
        id=f"c{number}",
        time=timestamp(_at(number, of)),
        revision=number + 1,
        type="task",
        action="failed",
        object_id=f"task{number:021}",
        name=f"shop_web{number % 40}.{number % 50}",
        service_id=f"service{number % 40:018}",
        service=f"shop_web{number % 40}",
        node_id=f"node{number % 500:021}",
        node=f"w{number % 500}",
        stack="shop",
        message="task shop_web.3 failed: task: non-zero exit (1); replaced on w2",
    )


def _request(number: int, of: int) -> JournalEntry:
    return JournalEntry(
        id=f"r{number}",
        time=timestamp(_at(number, of)),
        kind=EntryType.REQUEST,
        type="service",
        action="update",
        name=f"shop_web{number % 40}",
        message=f"update service shop_web{number % 40}: 200",
        method="POST",
        path="/services/ID/update",
        status=200,
        by=By(user="ann", node="m1", through="token"),
    )


def _text(result: Result, busy: float) -> str:
    newest, every = statistics.median(result.newest_ms), statistics.median(result.all_ms)
    return (
        f"# `skep history` over an hour, {commit()}\n\n"
        f"{result.entries} entries of one hour in the journal; {REPEATED} readings each, medians; "
        f"{busy:.0%} of the machine was busy before.\n\n"
        "| | ms | limit |\n|---|---|---|\n"
        f"| the newest page (200 entries), encoded | {newest:.0f} | 1,000 |\n"
        f"| all {result.all_pages} pages of the hour, encoded | {every:.0f} "
        f"(processor {result.all_processor_ms:.0f}) | 1,000 |\n"
    )


if __name__ == "__main__":
    main()
