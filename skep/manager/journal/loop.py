"""The journal's loop: derives entries from commits, collects entries of requests, and writes both in batches.

Every manager derives the entries of all commits, and keeps them until they are in the store.  The leader writes
them, fenced by its term, and each write records up to which revision the journal is complete.  So a new leader resumes
exactly there, and neither loses nor repeats an entry.  Requests are written by the manager that served them.

Nothing waits for the journal.  If entries could not be written, because the store was unavailable for long or managers
were not running, an entry reports it.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from random import Random

from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.aio.failures import retry
from skep.aio.race import wait_first
from skep.errors import SkepError
from skep.manager.control_loops.failures import isolated, object_id
from skep.manager.control_loops.informer import run_informer
from skep.manager.journal import chunks
from skep.manager.journal.changes import WATCHED, entries_of, folded, folded_requests
from skep.manager.journal.pending import Pending, missing
from skep.model.history import EntryType, JournalEntry, bounded
from skep.model.options.labels import history_entries
from skep.model.swarm import Swarm
from skep.model.values.ids import NodeId
from skep.model.values.times import timestamp
from skep.store.interface import Commit, NotLeader, Store, Term, Transaction, View
from skep.store.kinds import JournalChunk
from skep.store.level import JOURNAL
from skep.store.transactions.updates import batched

WRITE_S = 0.5
"""Seconds between writes, whose cost does not grow with the number of entries."""
BATCH = 1000
"""Maximum entries in one write."""
DELETED_TOGETHER = 200
"""Maximum chunks in one transaction."""
MARK_S = 10.0
"""Seconds between marks in a quiet cluster."""
MARKS_KEPT = 4096
"""Maximum marks in a manager's memory."""
SETTLED_S = 10.0
"""A manager that begins to lead so soon after its start may find no other manager that saw the earlier commits."""
RETRY_S_MAX = 30.0
"""Maximum seconds between attempts to write."""
LAST_WRITE_S = 1.0
"""Timeout in seconds of the last write when a manager stops."""


class Journal:
    """The journal of one manager.  ``run`` must be running, and ``lead`` while the manager leads."""

    def __init__(self, store: Store, own: NodeId, clock: Clock, random: Random) -> None:
        self._store = store
        self._own = own
        self._clock = clock
        self._random = random
        self._changes = Pending(EntryType.CHANGE)
        self._requests = Pending(EntryType.REQUEST)
        self._request_came = asyncio.Event()
        self._change_came = asyncio.Event()
        self._numbers = count()
        self.marks: deque[chunks.Mark] = deque(maxlen=MARKS_KEPT)
        """Times with the store's revision then, in order."""
        self._begun: tuple[float, int] | None = None
        """Since when, and after which revision, commits are followed."""

    def record(self, entry: JournalEntry) -> None:
        """Add the entry of a request, with an id and a time.  Never waits."""
        if not history_limit(self._store.view()):
            return
        now_ns = self._clock.now_ns()
        id = f"{now_ns}-{self._own}-{next(self._numbers)}"
        self._requests.add(bounded(replace(entry, id=id, time=timestamp(now_ns), kind=EntryType.REQUEST)))
        self._request_came.set()

    async def run(self) -> None:
        """Follow commits and write requests until cancelled."""
        await run_informer(
            self._store, WATCHED, on_snapshot=self._begin, on_commit=self._derive, work=self._write_and_mark
        )

    async def _write_and_mark(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._mark(), name="journal marks")
            group.create_task(self._write_requests(), name="journal of requests")

    # -- commits ---------------------------------------------------------------------------------------------------

    def _begin(self, snapshot: View) -> None:
        now_ns = self._clock.now_ns()
        if self._begun is None:
            self._begun = self._clock.monotonic(), snapshot.revision
        else:
            words = "changes are missing here: this manager could not follow the store"
            self._changes.add(missing(words, EntryType.CHANGE, snapshot.revision, timestamp(now_ns)))
        self.marks.append((now_ns, snapshot.revision))

    def _derive(self, commit: Commit) -> None:
        view, now_ns = self._store.view(), self._clock.now_ns()
        if not history_limit(view):
            return
        number, revision, now = 0, commit.revision, timestamp(now_ns)
        for event in commit.events:
            with isolated("history", object_id(event)):
                for entry in entries_of(event, view):
                    entry = replace(entry, id=f"{revision}-{number}", revision=revision, time=now)
                    self._changes.add(bounded(entry))
                    number += 1
        if number:
            self.marks.append((now_ns, revision))
            self._change_came.set()

    async def _mark(self) -> None:
        """Record the current revision regularly, and forget entries that the leader has written."""
        while True:
            await self._clock.sleep(MARK_S)
            view = self._store.view()
            if not self.marks or self.marks[-1][1] != view.revision:
                self.marks.append((self._clock.now_ns(), view.revision))
            self._changes.written_until(journaled(view))

    # -- writes ----------------------------------------------------------------------------------------------------

    async def lead(self, term: Term) -> None:
        """Write the entries of commits, and keep the journal within its bounds, until cancelled.  Raises NotLeader."""
        self._note_gap()
        while True:
            # Other managers' requests need their bounds too, even if nothing changes.
            await wait_first(self._change_came.wait(), self._clock.sleep(MARK_S))
            await self._clock.sleep(WRITE_S)
            self._change_came.clear()
            await self._until_written(partial(self._write_changes, term))

    async def _write_changes(self, term: Term) -> None:
        while len(self._changes):
            taken = self._changes.first(BATCH, timestamp(self._clock.now_ns()))
            await term.update(write_changes, taken, tuple(self.marks))
            self._changes.done(taken)
        view = self._store.view()
        surplus = chunks.surplus(view.find(JournalChunk), history_limit(view))
        for ids in batched(surplus, DELETED_TOGETHER):
            await term.update(_delete, ids)

    async def _until_written(self, write: Callable[[], Awaitable[None]]) -> None:
        await retry(
            write,
            "journal not written, will retry",
            clock=self._clock,
            longest_s=RETRY_S_MAX,
            rng=self._random.random,
            passes=(NotLeader,),
            kinds=(SkepError,),
        )

    def _note_gap(self) -> None:
        """Add an entry about changes while no manager ran, which no journal has."""
        view, now = self._store.view(), timestamp(self._clock.now_ns())
        last = chunks.last_of_changes(view)
        began_s, since = self._begun or (self._clock.monotonic(), view.revision)
        if not history_limit(view) or self._clock.monotonic() - began_s > SETTLED_S:
            return
        if last is not None and last.revision < since:
            words = (
                f"no manager kept the journal from {timestamp(last.last)} to {now}: changes may be missing"
            )
            self._changes.add_first(missing(words, EntryType.CHANGE, since, now))
            self._change_came.set()

    async def _write_requests(self) -> None:
        try:
            while True:
                await self._request_came.wait()
                await self._clock.sleep(WRITE_S)
                self._request_came.clear()
                while len(self._requests):
                    await self._until_written(self._write_some_requests)
        finally:
            if len(self._requests):
                with suppress(SkepError, TimeoutError):
                    async with asyncio.timeout(LAST_WRITE_S):
                        await self._write_some_requests()

    async def _write_some_requests(self) -> None:
        taken = self._requests.first(BATCH, timestamp(self._clock.now_ns()))
        await self._store.update(write_requests, taken, self._own)
        self._requests.done(taken)


def history_limit(view: View) -> int:
    """Return how many entries the cluster keeps.  0 if none, or while a manager has no journal yet."""
    if view.level < JOURNAL:
        return 0
    swarm = next(iter(view.find(Swarm)), None)
    return history_entries(swarm.spec.labels) if swarm is not None else 0


def journaled(view: View) -> int:
    """Return the revision up to which the journal has every change."""
    last = chunks.last_of_changes(view)
    return last.revision if last is not None else 0


def write_changes(tx: Transaction, taken: Sequence[JournalEntry], marks: Sequence[chunks.Mark]) -> None:
    """Write the entries of ``taken``, which are in order of revision, that no leader has written yet."""
    last = chunks.last_of_changes(tx)
    fresh = [entry for entry in taken if last is None or entry.revision > last.revision]
    if fresh:
        for chunk in chunks.with_changes(last, folded(fresh), fresh[-1].revision, marks):
            tx.put(chunk)


def write_requests(tx: Transaction, taken: Sequence[JournalEntry], own: NodeId) -> None:
    """Write ``taken``, except for entries of an earlier attempt with an unknown outcome that are stored already."""
    last = chunks.last_of_requests(tx, own)
    known = {entry.id for entry in chunks.entries_in(last)} if last is not None else set()
    # Only the last of equal entries was written, so it stands for the entries before it.
    done = max((place for place, entry in enumerate(taken, 1) if entry.id in known), default=0)
    fresh = taken[done:]
    if fresh:
        for chunk in chunks.with_requests(last, folded_requests(fresh), own):
            tx.put(chunk)


def _delete(tx: Transaction, ids: Sequence[str]) -> None:
    for id in ids:
        if tx.lookup(JournalChunk, id) is not None:
            tx.delete(JournalChunk, id)
