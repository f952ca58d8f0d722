"""Keeps the tables of the networks that this node takes part in, and hands them to the parts that act on them.

The parts (``TableListener``) are asked one after another, with all tables and the names of those that changed; what a
node has applied with all of them is what it acknowledges to its manager.  A part that fails is asked again, later and
later; the others go on, and only the acknowledgement waits.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import isolate
from skep.aio.race import wait_first
from skep.dataplane.tables.files import SharedTables, StoredTables
from skep.dataplane.tables.unreachable import NONE_UNREACHABLE, Unreachable, without
from skep.dataplane.tables.validation import valid_set, valid_table
from skep.errors import InvalidArgument, SkepError
from skep.model.ids import NetworkId, NodeId
from skep.model.revisions import Revision, advanced
from skep.model.tables import Table, TableSet, changed, difference, keeping_unread

log = structlog.get_logger(__name__)

FIRST_RETRY_S = 0.1
LONGEST_RETRY_S = 10.0
READ_AGAIN_S = 10.0

NOTHING: Mapping[NetworkId, Table] = MappingProxyType({})


class TableListener(Protocol):
    """Acts on tables: bridges and neighbours, names, virtual addresses, published ports."""

    async def apply(self, tables: Mapping[NetworkId, Table], changed: frozenset[NetworkId]) -> None:
        """Bring what is in force in line with ``tables``; ``changed`` are those that differ from the last time.

        One that is in ``changed`` and not in ``tables`` is none of this node's any more.  Returns when it is done; when
        it raises, it is called again with the same networks and whatever has changed by then.
        """


class TableKeeper:
    """This node's tables."""

    def __init__(
        self,
        stored: StoredTables,
        listeners: Sequence[TableListener],
        clock: Clock,
        rng: Callable[[], float],
    ) -> None:
        self._stored = stored
        self._parts = [_Part(listener, rng) for listener in listeners]
        self._clock = clock
        self._rng = rng
        self._tables: Mapping[NetworkId, Table] = NOTHING
        self._silence = NONE_UNREACHABLE
        self._reduced: dict[NetworkId, tuple[Table, frozenset[NodeId], Table]] = {}
        self._seen = Revision()
        self._applied: Mapping[NetworkId, Revision] = {}
        self._news = asyncio.Event()
        self._applied_more = asyncio.Event()

    @property
    def tables(self) -> Mapping[NetworkId, Table]:
        """As the managers said last; what is in force may be a moment behind."""
        return self._tables

    @property
    def applied(self) -> Mapping[NetworkId, Revision]:
        """Network -> as of when its table is in force with every part of the node."""
        return self._applied

    async def restore(self, shared: SharedTables) -> None:
        """``load`` what an earlier process had in force; what cannot be read is tried again for some seconds.

        Without its table a network would be taken down.
        """
        backoff = Backoff(FIRST_RETRY_S, rng=self._rng)
        until = self._clock.monotonic() + READ_AGAIN_S
        while True:
            self.load(await asyncio.to_thread(shared.load))
            if not (shared.has_unread or self._stored.has_unread) or self._clock.monotonic() >= until:
                return
            await backoff.sleep(self._clock)

    def load(self, in_force: Mapping[NetworkId, Table] = NOTHING) -> None:
        """Begin with what an earlier process of this node kept.  Before ``run``; it reads the disk.

        ``in_force``: what that process had in force when it ended, which the disk may lag behind a little.
        """
        kept, seen = self._stored.load()
        newest = max((table.revision for table in in_force.values()), default=0)
        self._seen = max(seen, Revision(seen.incarnation, newest))
        self._tables = {id: valid_table(one, _left_out) for id, one in {**kept, **in_force}.items()}
        for id, table in in_force.items():
            if kept.get(id) != table:
                self._stored.note(id, table, self._seen.incarnation)
        self._note(frozenset(self._tables))

    def take(self, news: TableSet, incarnation: int) -> None:
        """What a manager says.

        Raises: FailedPrecondition: it is older than what this node has seen; InvalidArgument: it does not follow from
        what was said before.
        """
        seen = advanced(self._seen, Revision(incarnation, news.revision))
        tables, changed = merged(self._tables, valid_set(news, _left_out))
        self._seen, self._tables = seen, tables
        for id in changed:
            self._stored.note(id, tables.get(id), incarnation)
        self._note(changed)

    def leave_out(self, silence: Unreachable) -> None:
        """Have nothing served by these peers from now on, where others serve it; asked again it changes nothing."""
        if silence == self._silence:
            return
        before, self._silence = self._silence, silence
        differing = {id: before.of(table) ^ silence.of(table) for id, table in self._tables.items()}
        self._note(
            frozenset(
                id
                for id, table in self._tables.items()
                if any(one.node_id in differing[id] for one in table.endpoints.values())
            )
        )

    async def clear(self) -> None:
        """The node leaves its swarm: forget everything.  Returns when nothing of it is in force any more."""
        changed = frozenset(self._tables)
        self._tables, self._seen = NOTHING, Revision()
        for id in changed:
            self._stored.note(id, None, 0)
        self._note(changed)
        while self._applied or any(part.is_behind for part in self._parts):
            self._applied_more.clear()
            await self._applied_more.wait()
        await isolate(self._stored.flush(), "network tables not forgotten yet")

    async def run(self) -> None:
        """Hand on and write down what changes, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._stored.run(), name="table files")
            group.create_task(self._hand_on(), name="table listeners")

    async def wait_applied(self, known: Mapping[NetworkId, Revision]) -> Mapping[NetworkId, Revision]:
        """What is in force, as soon as that is not what is ``known``.  For one reader at a time."""
        while self._applied == known:
            self._applied_more.clear()
            await self._applied_more.wait()
        return self._applied

    async def wait_in_force(self, networks: Collection[NetworkId]) -> None:
        """Return when the tables of all ``networks`` are in force: a container that is on them can begin.

        How long to wait is the caller's to say.
        """
        while not self._applied.keys() >= set(networks):
            self._applied_more.clear()
            await self._applied_more.wait()

    # -- handing on ---------------------------------------------------------------------------------------------

    def _note(self, changed: frozenset[NetworkId]) -> None:
        for part in self._parts:
            part.changed |= changed
        self._news.set()

    async def _hand_on(self) -> None:
        while True:
            self._news.clear()
            tables, incarnation = self._in_force(), self._seen.incarnation
            for part in self._parts:
                part.waiting, part.changed = part.waiting | part.changed, frozenset()
            for part in self._parts:
                if part.waiting and part.retry_at <= self._clock.monotonic():
                    await self._apply(part, tables)
            behind = frozenset[NetworkId]().union(*(part.waiting for part in self._parts))
            kept = {id: revision for id, revision in self._applied.items() if id in tables and id in behind}
            done = {
                id: Revision(incarnation, table.revision) for id, table in tables.items() if id not in behind
            }
            self._applied = {**kept, **done}
            self._applied_more.set()
            await self._wait_for_more()

    def _in_force(self) -> Mapping[NetworkId, Table]:
        """The tables without what is left out; one that is the same as before is the same object."""
        reduced = {}
        for id, table in self._tables.items():
            nodes = self._silence.of(table)
            if nodes:
                known = self._reduced.get(id)
                is_known = known is not None and known[0] is table and known[1] == nodes
                reduced[id] = known if known and is_known else (table, nodes, without(table, nodes))
        self._reduced = reduced
        return (
            {**self._tables, **{id: found for id, (_, _, found) in reduced.items()}}
            if reduced
            else self._tables
        )

    async def _apply(self, part: "_Part", tables: Mapping[NetworkId, Table]) -> None:
        """The one broad ``except`` of the keeper: a bug in one part must not keep the others from their tables."""
        try:
            await part.listener.apply(tables, part.waiting)
        except Exception as error:
            delay_s = part.backoff.next_delay_s()
            part.retry_at = self._clock.monotonic() + delay_s
            where = {"part": type(part.listener).__name__, "networks": sorted(part.waiting)}
            say = log.warning if isinstance(error, SkepError | OSError) else log.exception
            say("network tables not applied", **where, error=str(error), retry_s=round(delay_s, 1))
        else:
            part.waiting = frozenset()
            part.retry_at = 0.0
            part.backoff.reset()

    async def _wait_for_more(self) -> None:
        retries = [part.retry_at for part in self._parts if part.waiting]
        if not retries:
            await self._news.wait()
            return
        await wait_first(
            self._news.wait(), self._clock.sleep(max(0.0, min(retries) - self._clock.monotonic()))
        )


def _left_out(what: str) -> None:
    log.warning("network table entry left out", entry=what)


class _Part:
    """One listener and what it does not have in force yet."""

    def __init__(self, listener: TableListener, rng: Callable[[], float]) -> None:
        self.listener = listener
        self.changed: frozenset[NetworkId] = frozenset()
        """Since it was last asked."""
        self.waiting: frozenset[NetworkId] = frozenset()
        """What it has been asked for, or is about to be."""
        self.backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, rng=rng)
        self.retry_at = 0.0

    @property
    def is_behind(self) -> bool:
        return bool(self.changed or self.waiting)


def merged(
    tables: Mapping[NetworkId, Table], news: TableSet
) -> tuple[Mapping[NetworkId, Table], frozenset[NetworkId]]:
    """The tables after ``news``, and which of them are not what they were (or are no more).

    A table that is sent again with the same content has changed in nothing but its revision.
    Raises: InvalidArgument: a difference to a table that is not here.
    """
    after = dict(tables)
    for change in news.changes:
        id = change.head.id
        before = after.get(id)
        if before is None and not change.is_whole:
            raise InvalidArgument(f"a change of network {id}, whose table this node does not have")
        after[id] = changed(before, change)
    gone = set(news.removed)
    if news.is_complete:
        gone |= after.keys() - {change.head.id for change in news.changes}
    for id in gone:
        after.pop(id, None)
    for id in {change.head.id for change in news.changes} & after.keys():
        after[id] = keeping_unread(tables.get(id), after[id])
    differing = {
        id for id in {change.head.id for change in news.changes} if _differ(tables.get(id), after.get(id))
    }
    return after, frozenset(differing | (gone & tables.keys()))


def _differ(before: Table | None, after: Table | None) -> bool:
    if before is None or after is None:
        return before is not after
    return difference(before, after) is not None
