"""Keeps the rows of the dashboard while there are viewers, for all of them together.

Without viewers nothing is watched, kept or computed.  Changes within a short time are one step.  After a step the loop
pauses in proportion to the cost of the step, so that many changes take a fiftieth of a processor and each viewer gets
fewer, larger steps.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

import structlog

from skep.aio.clock import Clock
from skep.aio.time_slices import TimeSlices
from skep.errors import Unavailable
from skep.manager.control_loops.failures import isolated
from skep.manager.control_loops.informer import run_informer
from skep.manager.routes.access import Sent
from skep.manager.view.building import GLOBALS, WATCHED, RowBuilder, affected_by, all_keys
from skep.manager.view.past import snapshot_of
from skep.manager.view.rows import ClusterRow
from skep.manager.view.table import CLUSTER_KEY, Key, RowTableState
from skep.model.service import Service
from skep.model.values.times import SECOND_NS
from skep.store.interface import Commit, Store, View

log = structlog.get_logger(__name__)

GATHER_S: Final = 0.1
"""Seconds from a change until the step that shows it."""
REST: Final = 50.0
"""Pause after a step, as a multiple of the step's duration."""
REST_S_MAX: Final = 5.0
"""Longest pause in seconds."""
CLUSTER_S: Final = 10.0
"""Seconds between two checks of facts that no commit shows: warnings, and whether a leader exists."""
HEARTBEAT_S: Final = 15.0
"""Seconds without a change after which a viewer is sent a sign of life."""
LINGER_S: Final = 30.0
"""Seconds for which the rows are kept after the last viewer, so that reloading a page costs nothing."""
READY_S_MAX: Final = 20.0
"""Seconds that a viewer waits for the first rows."""
VIEWERS_MAX: Final = 32
"""Simultaneous viewers of one manager."""


class ClusterView:
    """The rows of one manager's replica.  ``run`` must be running."""

    def __init__(self, store: Store, clock: Clock, cluster: Callable[[View], Awaitable[ClusterRow]]) -> None:
        """``cluster`` returns the row of the cluster as a whole."""
        self._store = store
        self._clock = clock
        self._cluster = cluster
        self._table: RowTableState | None = None
        """None while nothing is followed."""
        self._builder = RowBuilder(self._clock)
        self._dirty: set[Key] = set()
        self._revision = 0
        """Revision of the last commit that was noted."""
        self._changed = asyncio.Event()
        self._stepped = asyncio.Event()
        """Set with the next step.  Each step has its own event."""
        self._viewers = 0
        self._came = asyncio.Event()
        self._left = asyncio.Event()

    @property
    def viewers(self) -> int:
        """The current number of viewers."""
        return self._viewers

    async def run(self) -> None:
        """Follow the cluster whenever there are viewers, until cancelled."""
        while True:
            await self._came.wait()
            async with asyncio.TaskGroup() as group:
                following = group.create_task(self._follow(), name="follow the cluster")
                await self._wait_left()
                following.cancel()
            self._table, self._builder, self._dirty = None, RowBuilder(self._clock), set()

    def prepare(self) -> None:
        """Start to follow the cluster for a viewer that is about to connect."""
        self._came.set()

    async def snapshot(self) -> bytes:
        """Return all rows as one JSON object.  Raises: Unavailable."""
        with self._viewing():
            return (await self._ready()).snapshot()

    async def snapshot_of(self, past: View, at_s: float) -> bytes:
        """Return the rows of an earlier state."""
        return await snapshot_of(past, self._store.incarnation, at_s, self._clock)

    async def watch(self, cursor: str = "") -> AsyncGenerator[Sent | None, None]:
        """Yield a snapshot, or the changes after ``cursor``, then new changes.  Yields None after an idle period.

        Yields None at once if nothing has changed since ``cursor``, so that a stream's head is not held back.
        Unread changes are not queued: a reader gets each row in its state at the time of reading.

        Raises:
            Unavailable: There are too many viewers.
        """
        with self._viewing():
            known, number = await self._ready(), None
            if cursor:
                number = known.number_of(cursor)
                if number == known.number:
                    yield None
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

    @contextmanager
    def _viewing(self) -> Iterator[None]:
        """Count a viewer for the block.  Raises: Unavailable: there are too many viewers."""
        if self._viewers >= VIEWERS_MAX:
            raise Unavailable(
                f"{VIEWERS_MAX} viewers already follow the cluster through this manager: close some of them"
            )
        self._viewers += 1
        self._came.set()
        try:
            yield
        finally:
            self._viewers -= 1
            self._left.set()

    async def _ready(self) -> RowTableState:
        """Wait for the table's first step and return the table.  Raises: Unavailable."""
        try:
            async with asyncio.timeout(READY_S_MAX):
                while self._table is None or not self._table.number:
                    await self._stepped.wait()
        except TimeoutError as error:
            raise Unavailable(
                f"this manager has not read its objects within {READY_S_MAX:g} s: try again"
            ) from error
        return self._table

    async def _wait_left(self) -> None:
        """Return once there has been no viewer for a while."""
        while True:
            while self._viewers:
                self._left.clear()
                await self._left.wait()
            self._came.clear()
            try:
                async with asyncio.timeout(LINGER_S):
                    await self._came.wait()
            except TimeoutError:
                return

    # --- while it is followed -----------------------------------------------------------------------------------

    async def _follow(self) -> None:
        await run_informer(
            self._store, WATCHED, on_snapshot=self._begin, on_commit=self._note, work=self._work
        )

    def _begin(self, view: View) -> None:
        self._table, self._builder = RowTableState(self._store.incarnation), RowBuilder(self._clock)
        self._dirty, self._revision = set(all_keys(view)), view.revision

    def _note(self, commit: Commit) -> None:
        view = self._store.view()
        for event in commit.events:
            self._dirty.update(affected_by(event, view))
        self._revision = commit.revision
        self._changed.set()

    async def _work(self) -> None:
        table = self._table
        assert table is not None, "the informer starts with a snapshot"
        while True:
            began = self._clock.monotonic()
            self._changed.clear()
            await self._step(table)
            now = self._clock.monotonic()
            rest_s = min(REST * (now - began), REST_S_MAX)
            gather_s = GATHER_S
            try:
                async with asyncio.timeout(self._idle_s()):
                    await self._changed.wait()
            except TimeoutError:
                self._dirty.add(CLUSTER_KEY)
                gather_s = 0.0
            await self._clock.sleep(max(gather_s, now + rest_s - self._clock.monotonic()))

    def _idle_s(self) -> float:
        """Return the seconds after which rows are checked without a change in the store."""
        due_ns = self._builder.next_due_ns()
        if due_ns is None:
            return CLUSTER_S
        return min(max((due_ns - self._clock.now_ns()) / SECOND_NS, GATHER_S), CLUSTER_S)

    async def _step(self, table: RowTableState) -> None:
        """Rebuild the rows that may have changed, and publish them."""
        dirty, self._dirty, revision = self._dirty, set(), self._revision
        now_ns = self._clock.now_ns()
        dirty |= self._builder.due(now_ns)
        slices = TimeSlices(self._clock)
        if GLOBALS in dirty:
            services = self._store.view().find(Service)
            dirty.update(Key("services", one.id) for one in services if one.spec.mode.name == "global")
        later = {CLUSTER_KEY, GLOBALS}
        for key in [key for key in dirty if key.kind == "services"]:
            with isolated("row of a service", key.id):
                row, touched = await self._builder.service(self._store.view(), key.id, now_ns)
                table.put(key, row)
                dirty |= touched
            await slices.yield_if_due()
        stacks: set[Key] = set()
        for key in dirty - later:
            if key.kind == "services":
                continue
            if key.kind == "stacks":
                stacks.add(key)
                continue
            with isolated(f"row of {key.kind}", key.id):
                row, touched = self._builder.row(self._store.view(), key)
                table.put(key, row)
                stacks |= touched
            await slices.yield_if_due()
        for key in stacks:
            table.put(key, self._builder.row(self._store.view(), key)[0])
        if CLUSTER_KEY in dirty:
            with isolated("row of the cluster", ""):
                table.put(CLUSTER_KEY, await self._cluster(self._store.view()))
        if table.step(revision, self._clock.now_ns() / SECOND_NS):
            stepped, self._stepped = self._stepped, asyncio.Event()
            stepped.set()
