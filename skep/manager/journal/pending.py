"""Entries that are not written yet, in a bounded queue, and the entries that a manager derives from commits.

If entries are dropped, another entry reports their number.  Nothing here waits.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.manager.control_loops.failures import isolated, object_id
from skep.manager.journal import chunks
from skep.manager.journal.changes import entries_of
from skep.manager.journal.writing import history_limit, journaled
from skep.model.history import EntryType, JournalEntry, Severity, bounded
from skep.model.values.counts import counted
from skep.model.values.times import Timestamp, timestamp
from skep.store.interface import Commit, View

PENDING_MAX = 10_000
"""Maximum entries in memory, except those being written."""
BATCH_CHARACTERS = 250_000
"""Maximum characters in one write.  A character takes up to four bytes, and a transaction is limited to 1.5 MB."""

MARKS_KEPT = 4096
"""Maximum marks in a manager's memory."""
SETTLED_S = 10.0
"""A manager that begins to lead so soon after its start may find no other manager that saw the earlier commits."""


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
            lost = counted(self._lost, "entry is", "entries are")
            words = f"{lost} missing here: they arrived faster than they could be written"
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


class DerivedChanges:
    """The entries of all commits that a manager saw and that are not in the store yet."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.pending = Pending(EntryType.CHANGE)
        self.marks: deque[chunks.Mark] = deque(maxlen=MARKS_KEPT)
        """Times with the store's revision then, in order."""
        self._begun: tuple[float, int] | None = None
        """Since when, and after which revision, commits are followed."""

    def begin(self, snapshot: View) -> None:
        """Follow commits from ``snapshot`` on.  An entry reports a gap if commits were followed before."""
        now_ns = self._clock.now_ns()
        if self._begun is None:
            self._begun = self._clock.monotonic(), snapshot.revision
        else:
            words = "changes are missing here: this manager could not follow the store"
            self.pending.add(missing(words, EntryType.CHANGE, snapshot.revision, timestamp(now_ns)))
        self.marks.append((now_ns, snapshot.revision))

    def derive(self, commit: Commit, view: View) -> bool:
        """Add the entries of a commit.  Returns whether it has any."""
        now_ns = self._clock.now_ns()
        if not history_limit(view):
            return False
        number, revision, now = 0, commit.revision, timestamp(now_ns)
        for event in commit.events:
            with isolated("history", object_id(event)):
                for entry in entries_of(event, view):
                    entry = replace(entry, id=f"{revision}-{number}", revision=revision, time=now)
                    self.pending.add(bounded(entry))
                    number += 1
        if number:
            self.marks.append((now_ns, revision))
        return number > 0

    def mark(self, view: View) -> None:
        """Record the current revision, and forget entries that the leader has written."""
        if not self.marks or self.marks[-1][1] != view.revision:
            self.marks.append((self._clock.now_ns(), view.revision))
        self.pending.written_until(journaled(view))

    def note_gap(self, view: View) -> bool:
        """Add an entry about changes while no manager ran, which no journal has.  Returns whether there were any."""
        now = timestamp(self._clock.now_ns())
        last = chunks.last_of_changes(view)
        began_s, since = self._begun or (self._clock.monotonic(), view.revision)
        if not history_limit(view) or self._clock.monotonic() - began_s > SETTLED_S:
            return False
        if last is None or last.revision >= since:
            return False
        words = f"no manager kept the journal from {timestamp(last.last)} to {now}: changes may be missing"
        self.pending.add_first(missing(words, EntryType.CHANGE, since, now))
        return True
