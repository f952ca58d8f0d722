"""Keeps the rows of the dashboard while there are viewers, for all of them together.

Without viewers nothing is watched, kept or computed.  Changes within a short time are one step.  After a step the loop
pauses in proportion to the cost of the step, so that many changes take a fiftieth of a processor and each viewer gets
fewer, larger steps.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

from skep.aio.clock import Clock
from skep.errors import Unavailable
from skep.manager.control_loops.informer import run_informer
from skep.manager.routes.access import Sent
from skep.manager.view.building import WATCHED, snapshot_of
from skep.manager.view.followed_rows import FindCluster, FollowedRows, Viewers
from skep.manager.view.table import RowTableState
from skep.store.interface import Commit, Store, View

GATHER_S: Final = 0.1
"""Seconds from a change until the step that shows it."""
REST: Final = 50.0
"""Pause after a step, as a multiple of the step's duration."""
REST_S_MAX: Final = 5.0
"""Longest pause in seconds."""
HEARTBEAT_S: Final = 15.0
"""Seconds without a change after which a viewer is sent a sign of life."""
READY_S_MAX: Final = 20.0
"""Seconds that a viewer waits for the first rows."""


class ClusterView:
    """The rows of one manager's replica.  ``run`` must be running."""

    def __init__(self, store: Store, clock: Clock, cluster: FindCluster) -> None:
        """``cluster`` returns the row of the cluster as a whole."""
        self._store = store
        self._clock = clock
        self._cluster = cluster
        self.rows: FollowedRows | None = None
        """The rows, or None while nothing is followed."""
        self._changed = asyncio.Event()
        self._stepped = asyncio.Event()
        """Set with the next step.  Each step has its own event."""
        self.viewers = Viewers()

    async def run(self) -> None:
        """Follow the cluster whenever there are viewers, until cancelled."""
        while True:
            await self.viewers.wait_came()
            async with asyncio.TaskGroup() as group:
                following = group.create_task(self._follow(), name="follow the cluster")
                await self.viewers.wait_left()
                following.cancel()
            self.rows = None

    def prepare(self) -> None:
        """Start to follow the cluster for a viewer that is about to connect."""
        self.viewers.announce()

    async def snapshot(self) -> bytes:
        """Return all rows as one JSON object.  Raises: Unavailable."""
        with self.viewers.viewing():
            return (await self._ready()).snapshot()

    async def snapshot_of(self, past: View, at_s: float) -> bytes:
        """Return the rows of an earlier state."""
        return await snapshot_of(past, self._store.incarnation, at_s, self._clock)

    async def watch(self, cursor: str = "") -> AsyncGenerator[Sent | None, None]:
        """Yield a snapshot, or the changes after ``cursor``, then new changes.  Yields None after an idle period.

        If it can resume after ``cursor``, the first change comes at once, so that a stream's head is not held back.
        Unread changes are not queued: a reader gets each row in its state at the time of reading.

        Raises:
            Unavailable: There are too many viewers.
        """
        with self.viewers.viewing():
            known, number = await self._ready(), None
            if cursor and (found := known.number_of(cursor)) is not None:
                number = known.number
                if (change := known.change_for_resumed(found)) is not None:
                    yield Sent("change", known.cursor, change)
                else:
                    yield Sent("snapshot", known.cursor, known.snapshot())
            while True:
                table, stepped = await self._ready(), self._stepped
                if table is not known:
                    known, number = table, None
                if number != table.number:
                    change = table.change_after(number) if number is not None else None
                    number = table.number
                    if change is None:
                        yield Sent("snapshot", table.cursor, table.snapshot())
                    else:
                        yield Sent("change", table.cursor, change)
                    continue
                try:
                    async with asyncio.timeout(HEARTBEAT_S):
                        await stepped.wait()
                except TimeoutError:
                    yield None

    async def _ready(self) -> RowTableState:
        """Wait for the table's first step and return the table.  Raises: Unavailable."""
        try:
            async with asyncio.timeout(READY_S_MAX):
                while self.rows is None or not self.rows.table.number:
                    await self._stepped.wait()
        except TimeoutError as error:
            raise Unavailable(
                f"this manager has not read its objects within {READY_S_MAX:g} s: try again"
            ) from error
        return self.rows.table

    async def _follow(self) -> None:
        await run_informer(
            self._store, WATCHED, on_snapshot=self._begin, on_commit=self._note, work=self._work
        )

    def _begin(self, view: View) -> None:
        self.rows = FollowedRows(self._store, self._clock, self._cluster, view)

    def _note(self, commit: Commit) -> None:
        assert self.rows is not None, "the informer starts with a snapshot"
        self.rows.note(commit)
        self._changed.set()

    async def _work(self) -> None:
        rows = self.rows
        assert rows is not None, "the informer starts with a snapshot"
        while True:
            began = self._clock.monotonic()
            self._changed.clear()
            if await rows.step():
                stepped, self._stepped = self._stepped, asyncio.Event()
                stepped.set()
            now = self._clock.monotonic()
            rest_s = min(REST * (now - began), REST_S_MAX)
            gather_s = GATHER_S
            try:
                async with asyncio.timeout(max(rows.idle_s(), GATHER_S)):
                    await self._changed.wait()
            except TimeoutError:
                rows.recheck_cluster()
                gather_s = 0.0
            await self._clock.sleep(max(gather_s, now + rest_s - self._clock.monotonic()))
