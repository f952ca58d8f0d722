"""Watches, with a bounded queue of commits for each reader.

The publisher never waits for a reader.  A reader that falls behind by more than the bound loses its queue and gets
``WatchLagged``, and has to restart from a snapshot.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from skep.store.interface import Commit, Object, Updated, View, WatchLagged

CAPACITY = 10_000
"""Maximum commits in one queue."""


class WatchQueue:
    """The commits that one reader has not yet taken.  Implements ``interface.Watch``."""

    def __init__(self, snapshot: View, kinds: frozenset[type[Object]], capacity: int) -> None:
        self._snapshot: View | None = snapshot
        self.kinds = kinds
        self._capacity = capacity
        self._commits: deque[Commit] = deque()
        self._is_lagged = False
        self._arrival: asyncio.Future[None] | None = None

    @property
    def snapshot(self) -> View:
        """The state at the beginning.  Read it before the first commit, which releases the reference to it."""
        assert self._snapshot is not None, "it is read before the first commit"
        return self._snapshot

    def __aiter__(self) -> AsyncIterator[Commit]:
        return self

    async def __anext__(self) -> Commit:
        # After a reload the replica has another state object, and a reference here would keep the old one in memory.
        self._snapshot = None
        while not self._commits:
            self._check_lag()
            # A future is cheaper than an event, and each commit wakes about ten readers.
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        return self._commits.popleft()

    def waiting(self) -> Iterator[Commit]:
        while self._commits:
            yield self._commits.popleft()
        self._check_lag()

    def _check_lag(self) -> None:
        if self._is_lagged:
            raise WatchLagged(f"more than {self._capacity} commits behind")

    def offer(self, commit: Commit) -> None:
        """Add a commit of ``kinds``.  Never waits."""
        if self._is_lagged:
            return
        if len(self._commits) >= self._capacity:
            self._commits.clear()
            self._is_lagged = True
        else:
            self._commits.append(commit)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)


class Watches:
    """All readers of one replica."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self.queues: dict[
            WatchQueue, None
        ] = {}  # A dict is ordered, unlike a set, so that a simulation runs the same way twice.

    def publish(self, commit: Commit) -> None:
        """Queue the events of each reader's kinds.  Readers of the same kinds share one commit object."""
        kinds = [type(event.new if isinstance(event, Updated) else event.object) for event in commit.events]
        present = frozenset(kinds)
        shares: dict[frozenset[type[Object]], Commit | None] = {}
        for queue in self.queues:
            wanted = queue.kinds & present
            if wanted not in shares:
                shares[wanted] = _share(commit, kinds, wanted, present)
            if (share := shares[wanted]) is not None:
                queue.offer(share)

    @contextmanager
    def open(self, snapshot: View, kinds: frozenset[type[Object]]) -> Iterator[WatchQueue]:
        """Return a queue of everything published from now on."""
        queue = WatchQueue(snapshot, kinds, self._capacity)
        del snapshot  # only the queue keeps it, until it is read
        self.queues[queue] = None
        try:
            yield queue
        finally:
            self.queues.pop(queue, None)


def _share(
    commit: Commit,
    kinds: list[type[Object]],
    wanted: frozenset[type[Object]],
    present: frozenset[type[Object]],
) -> Commit | None:
    """Return the commit with only the events of ``wanted`` kinds, or None without such events."""
    if wanted == present:
        return commit if wanted else None
    if not wanted:
        return None
    events = zip(commit.events, kinds, strict=True)
    return Commit(commit.revision, tuple(event for event, kind in events if kind in wanted))
