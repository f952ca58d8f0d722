"""A bounded queue of entries that are not written yet.  If entries are dropped, another entry reports their number."""

from collections import deque
from collections.abc import Iterable, Sequence

from skep.model.history import EntryType, JournalEntry, Severity
from skep.model.values.times import Timestamp

PENDING_MAX = 10_000
"""Maximum entries in memory, except those being written."""
BATCH_CHARACTERS = 250_000
"""Maximum characters in one write.  A character takes up to four bytes, and a transaction is limited to 1.5 MB."""


class Pending:
    """A queue of entries that drops the oldest when there are too many."""

    def __init__(self, kind: EntryType, most: int = PENDING_MAX) -> None:
        self._kind = kind
        self._most = most
        self._entries: deque[JournalEntry] = deque()
        self._taken = 0
        """Number of the oldest entries that are being written.  They are kept, in addition to ``most``."""
        self._lost = 0
        self._reported_lost = 0
        self._lost_revision = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: JournalEntry) -> None:
        """Add an entry.  Never waits."""
        self._entries.append(entry)
        if len(self._entries) - self._taken > self._most:
            gone = self._entries[self._taken]
            del self._entries[self._taken]
            self._lost += gone.count
            self._lost_revision = gone.revision

    def add_first(self, entry: JournalEntry) -> None:
        """Add an entry before all others.  Not allowed while entries are being written."""
        self._entries.appendleft(entry)

    def first(self, most: int, now: Timestamp) -> Sequence[JournalEntry]:
        """Return the oldest entries for one write.  Entries of the same revision stay together.  If entries were lost,
        the first one reports that.
        """
        entries: list[JournalEntry] = []
        self._reported_lost = self._lost
        if self._lost:
            words = f"{self._lost} entries are missing here: they arrived faster than they could be written"
            entries.append(missing(words, self._kind, self._lost_revision, now))
        characters = 0
        for entry in self._entries:
            characters += _characters(entry)
            is_full = bool(entries) and (len(entries) >= most or characters > BATCH_CHARACTERS)
            if is_full and (not entry.revision or entry.revision != entries[-1].revision):
                break
            entries.append(entry)
        self._taken = len(entries) - bool(self._lost)
        return entries

    def done(self, entries: Iterable[JournalEntry]) -> None:
        """Remove ``entries``, which ``first`` returned, because they were written."""
        ids = {entry.id for entry in entries}
        while self._entries and self._entries[0].id in ids:
            self._entries.popleft()
        self._taken = 0
        self._lost -= self._reported_lost
        self._reported_lost = 0

    def written_until(self, revision: int) -> None:
        """Remove entries up to ``revision``, because another manager has written them."""
        while self._entries and self._entries[0].revision <= revision:
            self._entries.popleft()
            self._taken = max(self._taken - 1, 0)
        if self._lost_revision <= revision:
            self._lost = self._reported_lost = 0


def _characters(entry: JournalEntry) -> int:
    """Return the length of the fields that users choose, plus an estimate for all other fields."""
    names = (entry.type, entry.action, entry.object_id, entry.name, entry.service, entry.node, entry.stack)
    return 100 + len(entry.message) + len(entry.path) + sum(map(len, names))


def missing(message: str, kind: EntryType, revision: int, now: Timestamp) -> JournalEntry:
    """Return an entry that reports missing entries."""
    return JournalEntry(
        id=f"lost-{kind.value}-{now}",
        time=now,
        revision=revision,
        kind=kind,
        type="journal",
        action="lost-entries",
        severity=Severity.WARNING,
        message=message,
    )
