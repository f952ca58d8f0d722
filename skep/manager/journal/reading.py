"""Queries of the journal: matching entries, one page at a time, and the store's revision at a time."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence

import msgspec

from skep.errors import InvalidArgument
from skep.manager.journal.chunks import Mark, entries_in, of_changes, time_ns
from skep.model.history import EntryType, HistoryPage, JournalEntry
from skep.model.values.times import Timestamp, timestamp
from skep.store.interface import View
from skep.store.kinds import JournalChunk

LIMIT_MAX = 1000
"""Maximum entries of a page."""
TIME_MAX = 2**63
"""A time after all entries."""
CHUNKS_AT_ONCE = 20
"""Chunks whose marks are read between two pauses: 4,000 marks, each in a tenth of a microsecond."""


class HistoryQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Selection and order of entries.

    Attributes:
        services, nodes: Ids and names, of which an entry must have one.  Empty for any.
        since_ns, until_ns: Both are included.
        cursor: Cursor of the previous page.
    """

    services: frozenset[str] = frozenset()
    nodes: frozenset[str] = frozenset()
    stack: str = ""
    about: frozenset[str] = frozenset()
    """Ids and names of a service, a node or a stack, whichever exists."""
    stacks: frozenset[str] | None = None
    """The only stacks that the client may see, or None for everything."""
    kinds: frozenset[EntryType] = frozenset(EntryType)
    since_ns: int = 0
    until_ns: int = TIME_MAX
    limit: int = 200
    is_ascending: bool = False
    cursor: str = ""

    def matches(self, entry: JournalEntry) -> bool:
        """Whether the entry matches, apart from its time.  Entries about missing entries match every query."""
        if entry.kind not in self.kinds:
            return False
        if entry.type == "journal":
            return True
        if self.stacks is not None and entry.stack not in self.stacks:
            return False
        return (
            (not self.services or bool(self.services & {entry.service_id, entry.service}))
            and (not self.nodes or bool(self.nodes & {entry.node_id, entry.node}))
            and (not self.stack or entry.stack == self.stack)
            and (
                not self.about
                or not self.about.isdisjoint(
                    (entry.service_id, entry.service, entry.node_id, entry.node, entry.stack)
                )
            )
        )


Position = tuple[int, str]
"""Time in nanoseconds and id: the order of entries."""


def position_of(entry: JournalEntry) -> Position:
    """Return the entry's place in the order."""
    return time_ns(entry.time), entry.id


def cursor_of(entry: JournalEntry) -> str:
    """Return the cursor of the page that begins after ``entry``."""
    at, id = position_of(entry)
    return f"{at}/{id}"


def _parsed(cursor: str) -> Position:
    at, slash, id = cursor.partition("/")
    if not (slash and at.isascii() and at.isdigit() and len(at) < 20 and len(id) < 200):
        raise InvalidArgument(f"invalid cursor {cursor[:100]!r}: expected the Next of a page")
    return int(at), id


async def page(view: View, query: HistoryQuery) -> HistoryPage:
    """Return one page, yielding to the event loop after each chunk.  Raises InvalidArgument for an invalid cursor."""
    after = _parsed(query.cursor) if query.cursor else None
    all_chunks = view.find(JournalChunk)
    sign = 1 if query.is_ascending else -1
    wanted = [one for one in all_chunks if one.first <= query.until_ns and one.last >= query.since_ns]
    wanted.sort(key=lambda one: one.first if query.is_ascending else -one.last)
    found: list[tuple[Position, JournalEntry]] = []
    for chunk in wanted:
        if len(found) > query.limit:
            found.sort(key=lambda one: one[0], reverse=not query.is_ascending)
            del found[query.limit + 1 :]
            edge = chunk.first if query.is_ascending else chunk.last
            if sign * edge > sign * found[-1][0][0]:
                break  # all further chunks belong to later pages
        for entry in entries_in(chunk):
            place = position_of(entry)
            if not query.since_ns <= place[0] <= query.until_ns or not query.matches(entry):
                continue
            if after is None or (place > after if query.is_ascending else place < after):
                found.append((place, entry))
        await asyncio.sleep(0)
    found.sort(key=lambda one: one[0], reverse=not query.is_ascending)
    entries = tuple(entry for _, entry in found[: query.limit])
    oldest = min((one.first for one in all_chunks), default=0)
    return HistoryPage(
        entries=entries,
        next=cursor_of(entries[-1]) if len(found) > query.limit else "",
        oldest=timestamp(oldest) if oldest else Timestamp(""),
        total=sum(one.count for one in all_chunks),
    )


# -- times and revisions ---------------------------------------------------------------------------------------------


async def _marks_in(view: View, own: Iterable[Mark]) -> AsyncIterator[Sequence[Mark]]:
    """Yield the marks of this manager and of the journal, up to 200,000, in parts, so that other coroutines can run."""
    chunks = of_changes(view)
    yield tuple(own)
    for number, chunk in enumerate(chunks):
        if number % CHUNKS_AT_ONCE == 0:
            await asyncio.sleep(0)
        yield chunk.marks


async def revision_at(view: View, own: Iterable[Mark], at_ns: int) -> int | None:
    """Return the latest revision with a mark at ``at_ns`` or before, or None."""
    found = [
        latest
        async for marks in _marks_in(view, own)
        if (latest := max((one for at, one in marks if at <= at_ns), default=None)) is not None
    ]
    return max(found, default=None)


async def time_of(view: View, own: Iterable[Mark], revision: int) -> int | None:
    """Return the latest time at which the store may have reached ``revision``, in nanoseconds, or None if unknown."""
    found = [
        first
        async for marks in _marks_in(view, own)
        if (first := min((at for at, one in marks if one >= revision), default=None)) is not None
    ]
    return min(found, default=None)
