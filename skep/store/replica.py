"""One manager's copy of the cluster, with the merged state, the waiters for revisions, and the watches.

Only its owner writes it, which is the reflector of etcd or the store in memory.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from heapq import heappop, heappush
from itertools import count

from skep.store.interface import Commit, Event, Object, Watch
from skep.store.keys import LEADER
from skep.store.schema import SCHEMA_BY_TYPE
from skep.store.state import State
from skep.store.tables import KeyChange
from skep.store.watches import CAPACITY, Watches

_EVERY_KIND = frozenset(SCHEMA_BY_TYPE)


class Replica:
    """The state at one revision.  ``state`` is a view; ``reset`` replaces it."""

    def __init__(self, watch_capacity: int = CAPACITY) -> None:
        self.state = State()
        self.leader_record: bytes | None = None
        """The value of the leader key, undecoded."""
        self.resets = 0
        """Number of times that everything was reloaded."""
        self.watches = Watches(watch_capacity)
        self.waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = count()

    @property
    def revision(self) -> int:
        """The last revision that was applied completely."""
        return self.state.revision

    def apply(self, revision: int, changes: Sequence[KeyChange]) -> None:
        """Apply one complete revision, wake its waiters and publish its events."""
        for change in changes:
            if change.key == LEADER:
                self.leader_record = change.value
        events = self.state.apply(revision, changes)
        self._publish(Commit(revision, events))

    def advance(self, revision: int) -> None:
        """Move to ``revision`` without a change."""
        if revision > self.state.revision:
            self.state.revision = revision
            self._wake()

    def reset(self, state: State, leader_record: bytes | None, events: Iterable[Event] = ()) -> None:
        """Replace everything by a newly loaded state.  Watchers get the difference as ``events``."""
        self.state, self.leader_record = state, leader_record
        self.resets += 1
        self._publish(Commit(state.revision, tuple(events)))

    async def wait_reached(self, revision: int) -> None:
        """Wait until the state shows everything up to ``revision``."""
        if self.revision >= revision:
            return
        arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heappush(self.waiting, (revision, next(self._order), arrived))
        await arrived

    @asynccontextmanager
    async def watch(self, *kinds: type[Object]) -> AsyncIterator[Watch]:
        """Watch the commits that change objects of ``kinds`` (any kind by default)."""
        with self.watches.open(self.state, frozenset(kinds) or _EVERY_KIND) as queue:
            yield queue

    def _publish(self, commit: Commit) -> None:
        # Waiters come first, because they return results to callers, while watchers only begin their work.
        self._wake()
        if commit.events:
            self.watches.publish(commit)

    def _wake(self) -> None:
        while self.waiting and self.waiting[0][0] <= self.revision:
            *_, arrived = heappop(self.waiting)
            if not arrived.done():
                arrived.set_result(None)
