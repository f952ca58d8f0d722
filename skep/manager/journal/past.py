"""Reads past states of the cluster from the store's history: finds the revision at a time, then reads the objects of
that revision.

One state is read at a time, and the last few are kept for a moment, because users drag a timeline back and forth.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Iterable

import msgspec

from skep.aio.clock import Clock
from skep.api.formats.timestamps import parse_time
from skep.errors import InvalidArgument, Unavailable
from skep.manager.journal.chunks import Mark
from skep.manager.journal.reading import revision_at, time_of
from skep.model.values.times import Timestamp, timestamp
from skep.store.interface import HistoryGone, Store, View

KEPT_MAX = 3
"""Maximum states in memory."""
KEPT_S = 30.0
"""Seconds after the last request for which states are kept."""
WAITING_MAX = 8
"""Maximum requests that wait for a state."""
OLDEST_S = 10.0
"""Seconds for which the oldest revision is cached, since every page of the history needs it."""

_REVISION = re.compile(r"revision:([0-9]{1,18})")


class Past(msgspec.Struct, frozen=True):
    """A state, and the latest time at which it is known to have existed."""

    view: View
    at_ns: int


class PastStates:
    """The past states on one manager.  ``marks``: the marks of this manager (``journal.loop``)."""

    def __init__(self, store: Store, marks: Iterable[Mark], clock: Clock) -> None:
        self._store = store
        self._marks = marks
        self._clock = clock
        self._reading = asyncio.Lock()
        self._waiting = 0
        self._kept: OrderedDict[int, View] = OrderedDict()
        self._expiry: asyncio.TimerHandle | None = None
        self._oldest: tuple[float, int] | None = None

    async def at(self, when: str) -> Past:
        """Return the state at ``when``: a time, or ``revision:N``.

        Raises:
            InvalidArgument: It is neither, or in the future.
            HistoryGone: The store has deleted that state.  The error names the oldest available time.
            Unavailable: The store cannot be read, or too many requests wait.
        """
        revision, at_ns = await self._resolve(when)
        if revision is None:
            raise HistoryGone(await self._gone_message(when))
        try:
            return Past(await self._state_at(revision), at_ns)
        except HistoryGone as error:
            raise HistoryGone(await self._gone_message(when)) from error

    async def _resolve(self, when: str) -> tuple[int | None, int]:
        """Return the revision, or None if it was too long ago, and its time."""
        now_ns, view = self._clock.now_ns(), self._store.view()
        if match := _REVISION.fullmatch(when):
            revision = int(match[1])
            if not 0 < revision <= view.revision:
                raise InvalidArgument(
                    f"revision {revision} does not exist yet: the store is at revision {view.revision}"
                )
            return revision, await time_of(view, self._marks, revision) or now_ns
        at_ns = parse_time(when, now_ns)
        if at_ns > now_ns:
            raise InvalidArgument(f"{when} is in the future: use a time in the past")
        return await revision_at(view, self._marks, at_ns), at_ns

    async def oldest(self) -> Timestamp:
        """Return the time of the oldest available state, or an empty string if it is unknown.  Raises Unavailable."""
        now = self._clock.monotonic()
        if self._oldest is None or now - self._oldest[0] > OLDEST_S:
            self._oldest = now, await self._store.oldest_revision()
        at_ns = await time_of(self._store.view(), self._marks, self._oldest[1])
        return timestamp(at_ns) if at_ns is not None else Timestamp("")

    async def _gone_message(self, when: str) -> str:
        self._oldest = None
        oldest = await self.oldest()
        since = f", whose oldest state is of {oldest}" if oldest else ""
        gone = f"the state of the cluster at {when} is no longer in the store{since}"
        return f"{gone} (skep history reaches further back)"

    async def _state_at(self, revision: int) -> View:
        if self._waiting >= WAITING_MAX:
            raise Unavailable(
                "several earlier states of the cluster are being read already: try again in a moment"
            )
        self._waiting += 1
        try:
            async with self._reading:
                if revision not in self._kept:
                    self._kept[revision] = await self._store.state_at(revision)
                self._kept.move_to_end(revision)
                while len(self._kept) > KEPT_MAX:
                    self._kept.popitem(last=False)
                self._forget_later()
                return self._kept[revision]
        finally:
            self._waiting -= 1

    def _forget_later(self) -> None:
        """Forget the states after a while, because each takes as much memory as the current state."""
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = asyncio.get_running_loop().call_later(KEPT_S, self._kept.clear)
