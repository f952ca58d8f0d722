"""The journal's loop: derives entries from commits, collects entries of requests, and writes both in batches.

Every manager derives the entries of all commits, and keeps them until they are in the store.  The leader writes
them, fenced by its term, and each write records up to which revision the journal is complete.  So a new leader resumes
exactly there, and neither loses nor repeats an entry.  Requests are written by the manager that served them.

Nothing waits for the journal.  If entries could not be written, because the store was unavailable for long or managers
were not running, an entry reports it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from random import Random

from msgspec.structs import replace

from skep.aio.clock import Clock, tick
from skep.aio.failures import retry
from skep.aio.race import wait_first
from skep.errors import SkepError
from skep.manager.control_loops.informer import run_informer
from skep.manager.journal import chunks
from skep.manager.journal.changes import WATCHED
from skep.manager.journal.pending import DerivedChanges, Pending
from skep.manager.journal.writing import delete_chunks, history_limit, write_changes, write_requests
from skep.model.history import EntryType, JournalEntry, bounded
from skep.model.values.ids import NodeId
from skep.model.values.times import timestamp
from skep.store.interface import Commit, NotLeader, Store, Term
from skep.store.kinds import JournalChunk
from skep.store.transactions.updates import batched

WRITE_S = 0.5
"""Seconds between writes, whose cost does not grow with the number of entries."""
BATCH = 1000
"""Maximum entries in one write."""
DELETED_TOGETHER = 200
"""Maximum chunks in one transaction."""
MARK_S = 10.0
"""Seconds between marks in a quiet cluster."""
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
        self._changes = DerivedChanges(clock)
        self._requests = Pending(EntryType.REQUEST)
        self._request_came = asyncio.Event()
        self._change_came = asyncio.Event()
        self._numbers = count()

    @property
    def marks(self) -> Sequence[chunks.Mark]:
        """Times with the store's revision then, in order.  The sequence follows later marks."""
        return self._changes.marks

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
            self._store, WATCHED, on_snapshot=self._changes.begin, on_commit=self._derive, work=self._work
        )

    def _derive(self, commit: Commit) -> None:
        if self._changes.derive(commit, self._store.view()):
            self._change_came.set()

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._mark(), name="journal marks")
            group.create_task(self._write_requests(), name="journal of requests")

    async def _mark(self) -> None:
        while True:
            await tick(self._clock, MARK_S)
            self._changes.mark(self._store.view())

    async def lead(self, term: Term) -> None:
        """Write the entries of commits, and keep the journal within its bounds, until cancelled.  Raises NotLeader."""
        if self._changes.note_gap(self._store.view()):
            self._change_came.set()
        while True:
            # Other managers' requests need their bounds too, even if nothing changes.
            await wait_first(self._change_came.wait(), self._clock.sleep(MARK_S))
            await self._clock.sleep(WRITE_S)
            self._change_came.clear()
            await self._until_written(partial(self._write_changes, term))

    async def _write_changes(self, term: Term) -> None:
        while len(self._changes.pending):
            taken = self._changes.pending.first(BATCH, timestamp(self._clock.now_ns()))
            await term.update(write_changes, taken, tuple(self._changes.marks))
            self._changes.pending.done(taken)
        view = self._store.view()
        surplus = chunks.surplus(view.find(JournalChunk), history_limit(view))
        for ids in batched(surplus, DELETED_TOGETHER):
            await term.update(delete_chunks, ids)

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
