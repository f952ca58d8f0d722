"""Entries that a manager derives from commits and keeps until the leader has written them.  Nothing here waits."""

from collections import deque

from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.manager.control_loops.failures import isolated, object_id
from skep.manager.journal import chunks
from skep.manager.journal.changes import entries_of
from skep.manager.journal.pending import Pending, missing
from skep.manager.journal.writing import history_limit, journaled
from skep.model.history import EntryType, bounded
from skep.model.values.times import timestamp
from skep.store.interface import Commit, View

MARKS_KEPT = 4096
"""Maximum marks in a manager's memory."""
SETTLED_S = 10.0
"""A manager that begins to lead so soon after its start may find no other manager that saw the earlier commits."""


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
