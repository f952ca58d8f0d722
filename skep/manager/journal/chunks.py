"""Stores entries compressed, several dozen in each object, and limits their total size.  Pure.

There are two series of chunks: the leader writes ``change-REVISION``, and each manager writes ``request-TIME-NODE``.
Each series may take half of the space, so that a client that floods the API does not displace the changes.  The last
chunk grows until it is full.  With one chunk for each write there would be 10,000 objects.  Larger chunks would be
rewritten too often, and etcd keeps every version for a while.
"""

import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import msgspec
from msgspec.structs import replace

from skep.model.history import JournalEntry
from skep.model.values.times import SECOND_NS, unix_ns
from skep.store.interface import View
from skep.store.kinds import JournalChunk

ENTRIES_MAX = 50
"""Maximum entries in a chunk, which then takes some 3 KiB."""
BYTES_MAX = 8 * 1024 * 1024
"""Maximum bytes of all chunks."""
MARKS_MAX = 200
"""Maximum marks in a chunk."""
_DECODED_BYTES_MAX = 4 * 1024 * 1024
"""Maximum decompressed bytes of a chunk, so that a damaged one cannot exhaust memory."""

_CHANGES, _REQUESTS = "change-", "request-"
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(tuple[JournalEntry, ...], strict=False)

time_ns = lru_cache(maxsize=1024)(unix_ns)
"""Cached, because the entries of a commit share one time."""

Mark = tuple[int, int]
"""A time in nanoseconds since 1970, and the store's revision at that time."""


def changes_id(revision: int) -> str:
    """Return the id of a chunk of changes.  Ids sort by revision, because the clocks of two leaders may differ."""
    return f"{_CHANGES}{revision:020d}"


def requests_id(at_ns: int, node_id: str) -> str:
    """Return the id of a chunk of requests.  Ids sort by time."""
    return f"{_REQUESTS}{at_ns:020d}-{node_id}"


def last_of_changes(view: View) -> JournalChunk | None:
    """Return the leader's last chunk.  The history is complete up to its ``revision``."""
    ids = view.ids(JournalChunk)
    place = bisect_left(ids, _REQUESTS) - 1
    return view.lookup(JournalChunk, ids[place]) if place >= 0 else None


def last_of_requests(view: View, node_id: str) -> JournalChunk | None:
    """Return the last chunk of one manager."""
    ids = view.ids(JournalChunk)
    mine = (id for id in reversed(ids) if id.startswith(_REQUESTS) and id.endswith(f"-{node_id}"))
    id = next(mine, None)
    return view.lookup(JournalChunk, id) if id is not None else None


def of_changes(view: View) -> Sequence[JournalChunk]:
    """Return the chunks of the leaders, oldest first."""
    return [one for one in view.find(JournalChunk) if one.id.startswith(_CHANGES)]


def with_changes(
    last: JournalChunk | None, entries: Sequence[JournalEntry], done: int, marks: Iterable[Mark]
) -> list[JournalChunk]:
    """Return the chunks to write for new ``entries`` of the leader, which are all up to revision ``done``, in order."""
    chunks = _chunks(last, entries, lambda first: changes_id(first.revision), repeated)
    newer = [mark for mark in marks if last is None or mark[1] > last.revision]
    chunks[-1] = replace(chunks[-1], revision=done, marks=thinned((*chunks[-1].marks, *newer)))
    return chunks


def with_requests(
    last: JournalChunk | None, entries: Sequence[JournalEntry], node_id: str
) -> list[JournalChunk]:
    """Return the chunks to write for new requests of one manager."""
    # The id must sort after earlier ones, even if the clock was set back.
    newest = int(last.id.removeprefix(_REQUESTS)[:20]) if last is not None else 0
    return _chunks(last, entries, lambda first: requests_id(max(time_ns(first.time), newest + 1), node_id))


def _chunks(
    last: JournalChunk | None,
    entries: Sequence[JournalEntry],
    id_of: Callable[[JournalEntry], str],
    fold: Callable[[Sequence[JournalEntry]], Sequence[JournalEntry]] = tuple,
) -> list[JournalChunk]:
    chunks: list[JournalChunk] = []
    # A chunk that is unreadable, for example from a newer version, stays as it is.
    if last is not None and last.count < ENTRIES_MAX and (known := entries_in(last)):
        together = fold([*known, *entries])
        chunks.append(_chunk(last, together[:ENTRIES_MAX]))
        entries = together[ENTRIES_MAX:]
    for start in range(0, len(entries), ENTRIES_MAX):
        some = entries[start : start + ENTRIES_MAX]
        chunks.append(_chunk(JournalChunk(id=id_of(some[0])), some))
    return chunks


def repeated(entries: Sequence[JournalEntry], alone_max: int = 3) -> Sequence[JournalEntry]:
    """Return ``entries`` in order, with only the first few and the last of repeated actions on one slot.

    The last entry represents the omitted ones, whose number is its ``count``, and says so: they may have had another
    node, or failed for another reason.  Otherwise a service in a crash loop would displace everything else from the
    history within hours.
    """
    kept: dict[int, JournalEntry] = {}
    places: dict[tuple[str, ...], list[int]] = {}
    for place, entry in enumerate(entries):
        if entry.type == "task" and entry.service_id:
            alike = places.setdefault((entry.service_id, entry.name, entry.action), [])
            if len(alike) > alone_max:
                before = kept.pop(alike.pop())
                count = entry.count + before.count
                entry = replace(entry, count=count, message=f"{entry.message} (the last of {count})")
            alike.append(place)
        kept[place] = entry
    return tuple(kept.values())


def _chunk(base: JournalChunk, entries: Sequence[JournalEntry]) -> JournalChunk:
    times = [time_ns(entry.time) for entry in entries]
    return replace(
        base,
        count=len(entries),
        revision=max(entry.revision for entry in entries) if base.id.startswith(_CHANGES) else 0,
        first=min(times),
        last=max(times),
        data=zlib.compress(_encoder.encode(entries)),
    )


def entries_in(chunk: JournalChunk) -> tuple[JournalEntry, ...]:
    """Return the entries of ``chunk``, or nothing if it is unreadable, as a newer version's chunk may be."""
    try:
        decompressor = zlib.decompressobj()
        return _decoder.decode(decompressor.decompress(chunk.data, _DECODED_BYTES_MAX))
    except (zlib.error, msgspec.MsgspecError, UnicodeDecodeError):
        return ()


def surplus(chunks: Iterable[JournalChunk], entries_max: int) -> list[str]:
    """Return the ids of chunks to delete, oldest first.  Each series has half of ``entries_max`` and ``BYTES_MAX``."""
    series: dict[bool, list[JournalChunk]] = {True: [], False: []}
    for chunk in chunks:
        series[chunk.id.startswith(_CHANGES)].append(chunk)
    ids: list[str] = []
    for each in series.values():
        count = size = 0
        for chunk in reversed(each):  # ids sort by age
            count += chunk.count
            size += len(chunk.data)
            if entries_max == 0 or count - chunk.count >= entries_max // 2 or size > BYTES_MAX // 2:
                ids.append(chunk.id)
    return sorted(ids)


def thinned(marks: Sequence[Mark], most: int = MARKS_MAX) -> tuple[Mark, ...]:
    """Return ``marks`` in order, at most one per second and at most ``most``, always including the last."""
    kept: list[Mark] = []
    for at, revision in sorted(marks):
        if kept and at - kept[-1][0] < SECOND_NS:
            kept.pop()
        kept.append((at, max(revision, kept[-1][1] if kept else 0)))
    while len(kept) > most:
        kept = [*kept[:-1:2], kept[-1]]
    return tuple(kept)
