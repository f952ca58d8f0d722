"""Rebuilds the rows that a commit affects, in steps, and counts the viewers for whom rows are kept."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Final

from skep.aio.clock import Clock
from skep.aio.time_slices import TimeSlices
from skep.errors import Unavailable
from skep.manager.control_loops.failures import isolated
from skep.manager.view.building import GLOBALS, RowBuilder, affected_by, all_keys
from skep.manager.view.rows import ClusterRow
from skep.manager.view.table import CLUSTER_KEY, Key, RowTableState
from skep.model.service import Service
from skep.model.values.times import SECOND_NS
from skep.store.interface import Commit, Store, View

CLUSTER_S: Final = 10.0
"""Seconds between two checks of facts that no commit shows: warnings, and whether a leader exists."""

FindCluster = Callable[[View], Awaitable[ClusterRow]]
"""Returns the row of the cluster as a whole."""

LINGER_S: Final = 30.0
"""Seconds for which the rows are kept after the last viewer, so that reloading a page costs nothing."""
VIEWERS_MAX: Final = 32
"""Simultaneous viewers of one manager."""


class FollowedRows:
    """The rows of one manager's replica since a snapshot of its store."""

    def __init__(self, store: Store, clock: Clock, cluster: FindCluster, snapshot: View) -> None:
        """Plan to build every row of ``snapshot`` in the first step."""
        self._store = store
        self._clock = clock
        self._cluster = cluster
        self.table = RowTableState(store.incarnation)
        self._builder = RowBuilder(clock)
        self._dirty = set(all_keys(snapshot))
        self._revision = snapshot.revision
        """Revision of the last commit that was noted."""

    def note(self, commit: Commit) -> None:
        """Plan to rebuild the rows that a commit affects."""
        view = self._store.view()
        for event in commit.events:
            self._dirty.update(affected_by(event, view))
        self._revision = commit.revision

    def recheck_cluster(self) -> None:
        """Plan to rebuild the row of the cluster, which may change without a commit."""
        self._dirty.add(CLUSTER_KEY)

    def idle_s(self) -> float:
        """Return the seconds after which rows are checked without a change in the store."""
        due_ns = self._builder.next_due_ns()
        return CLUSTER_S if due_ns is None else min((due_ns - self._clock.now_ns()) / SECOND_NS, CLUSTER_S)

    async def step(self) -> bool:
        """Rebuild the rows that may have changed.  Returns whether any of them has."""
        dirty, self._dirty, revision = self._dirty, set(), self._revision
        now_ns, slices = self._clock.now_ns(), TimeSlices(self._clock)
        dirty |= self._builder.due(now_ns)
        dirty |= global_services(dirty, self._store.view())
        for key in [key for key in dirty if key.kind == "services"]:
            with isolated("row of a service", key.id):
                row, touched = await self._builder.service(self._store.view(), key.id, now_ns)
                self.table.put(key, row)
                dirty |= touched
            await slices.yield_if_due()
        stacks = {key for key in dirty if key.kind == "stacks"}
        for key in [key for key in dirty if key not in LAST and key.kind not in ("services", "stacks")]:
            with isolated(f"row of {key.kind}", key.id):
                row, touched = self._builder.row(self._store.view(), key)
                self.table.put(key, row)
                stacks |= touched
            await slices.yield_if_due()
        for key in stacks:
            self.table.put(key, self._builder.row(self._store.view(), key)[0])
        if CLUSTER_KEY in dirty:
            with isolated("row of the cluster", ""):
                self.table.put(CLUSTER_KEY, await self._cluster(self._store.view()))
        return self.table.step(revision, self._clock.now_ns() / SECOND_NS)


LAST: Final = frozenset({CLUSTER_KEY, GLOBALS})
"""Keys that are not rows of one object."""


def global_services(dirty: Collection[Key], view: View) -> set[Key]:
    """Return the keys of all global services if a change may concern any of them."""
    if GLOBALS not in dirty:
        return set()
    return {Key("services", one.id) for one in view.find(Service) if one.spec.mode.name == "global"}


class Viewers:
    """The viewers of one manager."""

    def __init__(self) -> None:
        self.count = 0
        self._came = asyncio.Event()
        self._left = asyncio.Event()

    @contextmanager
    def viewing(self) -> Iterator[None]:
        """Count a viewer for the block.  Raises: Unavailable: there are too many viewers."""
        if self.count >= VIEWERS_MAX:
            raise Unavailable(
                f"{VIEWERS_MAX} viewers already follow the cluster through this manager: close some of them"
            )
        self.count += 1
        self._came.set()
        try:
            yield
        finally:
            self.count -= 1
            self._left.set()

    def announce(self) -> None:
        """Act as if there was a viewer, because one is about to connect."""
        self._came.set()

    async def wait_came(self) -> None:
        """Return once there is a viewer, or one is announced."""
        await self._came.wait()

    async def wait_left(self) -> None:
        """Return once there has been no viewer for ``LINGER_S``."""
        while True:
            while self.count:
                self._left.clear()
                await self._left.wait()
            self._came.clear()
            try:
                async with asyncio.timeout(LINGER_S):
                    await self._came.wait()
            except TimeoutError:
                return
