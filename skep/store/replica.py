"""One manager's copy of the cluster: the merged state, who waits for a revision, who watches.

Feeding it (from etcd's watch, or from the memory cluster) is the business of its owner; everybody else reads.
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
    """The state as this manager knows it.  ``state`` is a view; ``reset`` replaces it."""

    def __init__(self, watch_capacity: int = CAPACITY) -> None:
        self.state = State()
        self.leader_record: bytes | None = None
        """What the leader key says, undecoded."""
        self.resets = 0
        """How often everything was loaded anew."""
        self._watches = Watches(watch_capacity)
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = count()

    @property
    def revision(self) -> int:
        """The last revision that is wholly in here."""
        return self.state.revision

    def apply(self, revision: int, changes: Sequence[KeyChange]) -> None:
        """Take in one whole revision and tell everybody."""
        for change in changes:
            if change.key == LEADER:
                self.leader_record = change.value
        events = self.state.apply(revision, changes)
        self._arrived(Commit(revision, events))

    def advance(self, revision: int) -> None:
        """Nothing that is kept here changed up to ``revision``."""
        if revision > self.state.revision:
            self.state.revision = revision
            self._wake()

    def reset(self, state: State, leader_record: bytes | None, events: Iterable[Event] = ()) -> None:
        """Replace everything by a freshly loaded state; observers get exactly the difference, ``events``."""
        self.state, self.leader_record = state, leader_record
        self.resets += 1
        self._arrived(Commit(state.revision, tuple(events)))

    async def reached(self, revision: int) -> None:
        """Return once the state shows everything up to ``revision``."""
        if self.revision >= revision:
            return
        arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heappush(self._waiting, (revision, next(self._order), arrived))
        await arrived

    @asynccontextmanager
    async def watch(self, *kinds: type[Object]) -> AsyncIterator[Watch]:
        """Follow the commits that touch one of ``kinds`` (none given: any)."""
        with self._watches.open(self.state, frozenset(kinds) or _EVERY_KIND) as line:
            yield line

    def _arrived(self, commit: Commit) -> None:
        self._wake()  # first: they end here, with an answer to somebody; for those who watch, work begins
        if commit.events:
            self._watches.publish(commit)

    def _wake(self) -> None:
        while self._waiting and self._waiting[0][0] <= self.revision:
            *_, arrived = heappop(self._waiting)
            if not arrived.done():
                arrived.set_result(None)
