"""Watches: each reader's own bounded line of commits.

The publisher never waits for a reader; one that falls behind by more than its bound loses its line and is told
to start again from a snapshot.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from skep.store.interface import Commit, Created, Deleted, Event, Object, Updated, View, WatchLagged

CAPACITY = 10_000
"""Commits that a reader may be behind."""


class Line:
    """The commits that one reader has not yet taken.  Implements ``interface.Watch``."""

    def __init__(self, snapshot: View, kinds: frozenset[type[Object]], capacity: int) -> None:
        self._snapshot = snapshot
        self._kinds = kinds
        self._capacity = capacity
        self._commits: deque[Commit] = deque()
        self._is_lagged = False
        self._arrived = asyncio.Event()

    @property
    def snapshot(self) -> View:
        return self._snapshot

    def __aiter__(self) -> AsyncIterator[Commit]:
        return self

    async def __anext__(self) -> Commit:
        while not self._commits:
            if self._is_lagged:
                raise WatchLagged(f"more than {self._capacity} commits behind")
            self._arrived.clear()
            await self._arrived.wait()
        return self._commits.popleft()

    def offer(self, commit: Commit) -> None:
        """Add what concerns this reader; never waits."""
        if self._is_lagged:
            return
        events = tuple(event for event in commit.events if type(_object_of(event)) in self._kinds)
        if not events:
            return
        if len(self._commits) >= self._capacity:
            self._commits.clear()
            self._is_lagged = True
        else:
            self._commits.append(
                commit if len(events) == len(commit.events) else Commit(commit.revision, events)
            )
        self._arrived.set()


class Watches:
    """All readers of one replica."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._lines: dict[Line, None] = {}  # ordered, unlike a set: a simulation must run the same way twice

    def publish(self, commit: Commit) -> None:
        """Hand ``commit`` to every reader it concerns."""
        for line in self._lines:
            line.offer(commit)

    @contextmanager
    def open(self, snapshot: View, kinds: frozenset[type[Object]]) -> Iterator[Line]:
        """A line that gets everything published from now on."""
        line = Line(snapshot, kinds, self._capacity)
        self._lines[line] = None
        try:
            yield line
        finally:
            self._lines.pop(line, None)


def _object_of(event: Event) -> Object:
    match event:
        case Created(object) | Deleted(object):
            return object
        case Updated(_, new):
            return new
