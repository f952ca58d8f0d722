"""The tables of this node's networks: received from managers, saved, and applied by listeners.

The listeners (``TableListener``) are called one after another, with all tables and the ids of changed ones.  The node
acknowledges a table to its manager once all listeners have applied it.  A listener that fails is called again with
increasing delays.  The other listeners are not affected, and only the acknowledgement waits.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import isolate
from skep.aio.race import wait_first
from skep.dataplane.tables.files import SharedTables, StoredTables
from skep.dataplane.tables.unreachable import NONE_UNREACHABLE, Unreachable, with_far_tasks
from skep.dataplane.tables.validation import valid_set, valid_table
from skep.errors import InvalidArgument, SkepError
from skep.model.networks.tables import NetworkTable, TableSet, changed, difference, keeping_unread
from skep.model.node_reports.revisions import Revision, advanced
from skep.model.values.ids import NetworkId, NodeId

log = structlog.get_logger(__name__)

FIRST_RETRY_S = 0.1
"""Seconds before the first new attempt to apply a table."""
LONGEST_RETRY_S = 10.0
"""Longest pause in seconds.  Short, because a container may wait for the network."""
REREAD_S = 10.0
"""Seconds for which reading an unreadable table is retried."""

NOTHING: Mapping[NetworkId, NetworkTable] = MappingProxyType({})


class TableListener(Protocol):
    """Applies tables: to bridges and neighbors, names, virtual addresses, published ports."""

    async def apply(
        self, node_id: NodeId, tables: Mapping[NetworkId, NetworkTable], changed: frozenset[NetworkId]
    ) -> None:
        """Apply ``tables``.

        Returns when all is applied.  After an error it is called again with the same networks and those changed since.

        Args:
            node_id: This node's id in the cluster that the tables belong to.
            changed: Networks whose tables differ from the last call.  The node has left a network that is not in
                ``tables``.
        """


class ClusterIdentity(Protocol):
    """The node's id in its cluster (``agent.session.session_state``)."""

    @property
    def node_id(self) -> NodeId:
        """The node's id.  Empty if the node is in no cluster, or the id is not known yet."""

    async def wait_joined(self) -> None:
        """Wait until ``node_id`` is known."""


_MadeOf = tuple[NetworkTable, frozenset[NodeId], NodeId, bool]
"""The parts of a table for the listeners: the managers' table, excluded peers, this node, and whether it hides what the
table publishes.
"""


class NetworkTables:
    """This node's tables.  They are applied once the node's id is known."""

    def __init__(
        self,
        stored: StoredTables,
        listeners: Sequence[TableListener],
        identity: ClusterIdentity,
        clock: Clock,
        rng: Callable[[], float],
    ) -> None:
        self._stored = stored
        self._subscribers = [_Subscriber(listener, rng) for listener in listeners]
        self._identity = identity
        self._clock = clock
        self._rng = rng
        self._tables: Mapping[NetworkId, NetworkTable] = NOTHING
        self._unreachable = NONE_UNREACHABLE
        self._filtered: dict[NetworkId, tuple[_MadeOf, NetworkTable]] = {}
        self._seen = Revision()
        self._applied: Mapping[NetworkId, Revision] = {}
        self._has_changes = asyncio.Event()
        self.applied_changed = asyncio.Event()

    @property
    def tables(self) -> Mapping[NetworkId, NetworkTable]:
        """The tables that managers have sent last.  Listeners may not have applied the latest changes yet."""
        return self._tables

    @property
    def applied(self) -> Mapping[NetworkId, Revision]:
        """The revision of each network's table that all listeners have applied."""
        return self._applied

    async def restore(self, shared: SharedTables) -> None:
        """Load the tables that an earlier process had applied.

        Retries unreadable files for some seconds, because a network whose table is missing would be removed from the
        node.
        """
        backoff = Backoff(FIRST_RETRY_S, rng=self._rng)
        until = self._clock.monotonic() + REREAD_S
        while True:
            self.load(await asyncio.to_thread(shared.load))
            if not (shared.has_unread or self._stored.has_unread) or self._clock.monotonic() >= until:
                return
            await backoff.sleep(self._clock)

    def load(self, in_force: Mapping[NetworkId, NetworkTable] = NOTHING) -> None:
        """Load the tables that an earlier process of this node saved.  Call before ``run``.  Reads the disk.

        ``in_force`` are the tables that the process had applied when it ended, which may be newer than the saved ones.
        """
        kept, seen = self._stored.load()
        newest = max((table.revision for table in in_force.values()), default=0)
        self._seen = max(seen, Revision(seen.incarnation, newest))
        self._tables = {id: valid_table(one, _log_left_out) for id, one in {**kept, **in_force}.items()}
        for id, table in in_force.items():
            if kept.get(id) != table:
                self._stored.schedule(id, table, self._seen.incarnation)
        self._mark_changed(frozenset(self._tables))

    def update(self, received: TableSet, incarnation: int) -> None:
        """Apply ``received`` from a manager.

        Raises:
            FailedPrecondition: It is older than a table set that this node has seen.
            InvalidArgument: It changes a table that this node does not have.
        """
        seen = advanced(self._seen, Revision(incarnation, received.revision))
        tables, changed = merged(self._tables, valid_set(received, _log_left_out))
        self._seen, self._tables = seen, tables
        for id in changed:
            self._stored.schedule(id, tables.get(id), incarnation)
        self._mark_changed(changed)

    def exclude(self, unreachable: Unreachable) -> None:
        """Exclude the endpoints of these peers from now on, if others serve the same service.  Idempotent."""
        if unreachable == self._unreachable:
            return
        before, self._unreachable = self._unreachable, unreachable
        differing = {id: before.of(table) ^ unreachable.of(table) for id, table in self._tables.items()}
        self._mark_changed(
            frozenset(
                id
                for id, table in self._tables.items()
                if before.hides(table) != unreachable.hides(table)
                or any(one.node_id in differing[id] for one in table.endpoints.values())
            )
        )

    def apply_again(self, concerns: Callable[[NetworkTable], bool]) -> None:
        """Apply tables again, because something else changed that a listener uses with them."""
        self._mark_changed(frozenset(id for id, table in self._tables.items() if concerns(table)))

    async def clear(self) -> None:
        """Drop all tables, because the node leaves its swarm.  Returns when all listeners have removed them."""
        changed = frozenset(self._tables)
        self._tables, self._seen = NOTHING, Revision()
        for id in changed:
            self._stored.schedule(id, None, 0)
        self._mark_changed(changed)
        while self._applied or any(subscriber.has_pending for subscriber in self._subscribers):
            self.applied_changed.clear()
            await self.applied_changed.wait()
        await isolate(self._stored.flush(), "network table files not removed yet")

    async def run(self) -> None:
        """Call listeners and write files when tables change, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._stored.run(), name="table files")
            group.create_task(self._distribute(), name="table listeners")

    async def wait_applied(self, known: Mapping[NetworkId, Revision]) -> Mapping[NetworkId, Revision]:
        """Wait until ``applied`` differs from ``known``, and return it.  For one caller at a time."""
        while self._applied == known:
            self.applied_changed.clear()
            await self.applied_changed.wait()
        return self._applied

    # -- listeners ---------------------------------------------------------------------------------------------

    def _mark_changed(self, changed: frozenset[NetworkId]) -> None:
        for subscriber in self._subscribers:
            subscriber.changed |= changed
        self._has_changes.set()

    async def _distribute(self) -> None:
        while True:
            self._has_changes.clear()
            tables, incarnation, node_id = self._effective(), self._seen.incarnation, self._identity.node_id
            if tables and not node_id:
                await wait_first(self._has_changes.wait(), self._identity.wait_joined())
                continue
            for subscriber in self._subscribers:
                subscriber.pending, subscriber.changed = subscriber.pending | subscriber.changed, frozenset()
            for subscriber in self._subscribers:
                if subscriber.pending and subscriber.retry_at <= self._clock.monotonic():
                    await self._apply(subscriber, node_id, tables)
            pending = frozenset[NetworkId]().union(*(one.pending for one in self._subscribers))
            kept = {id: revision for id, revision in self._applied.items() if id in tables and id in pending}
            done = {
                id: Revision(incarnation, table.revision) for id, table in tables.items() if id not in pending
            }
            self._applied = {**kept, **done}
            self.applied_changed.set()
            await self._wait_for_more()

    def _effective(self) -> Mapping[NetworkId, NetworkTable]:
        """Return the tables without excluded endpoints and hidden ports, and with far endpoints marked.

        An unchanged table is the same object as before.
        """
        filtered = {}
        own = self._identity.node_id
        for id, table in self._tables.items():
            made_of = (table, self._unreachable.of(table), own, self._unreachable.hides(table))
            known = self._filtered.get(id)
            if known is None or known[0][0] is not table or known[0][1:] != made_of[1:]:
                known = (made_of, with_far_tasks(self._unreachable.shown(table), own))
            filtered[id] = known
        self._filtered = filtered
        return {id: found for id, (_, found) in filtered.items()}

    async def _apply(
        self, subscriber: "_Subscriber", node_id: NodeId, tables: Mapping[NetworkId, NetworkTable]
    ) -> None:
        """Call a listener.  The ``except`` is broad: a bug in one listener must not keep tables from the others."""
        try:
            await subscriber.listener.apply(node_id, tables, subscriber.pending)
        except Exception as error:
            delay_s = subscriber.backoff.next_delay_s()
            subscriber.retry_at = self._clock.monotonic() + delay_s
            where = {"listener": type(subscriber.listener).__name__, "networks": sorted(subscriber.pending)}
            report = log.warning if isinstance(error, SkepError | OSError) else log.exception
            report("network tables not applied", **where, error=str(error), retry_s=round(delay_s, 1))
        else:
            subscriber.pending = frozenset()
            subscriber.retry_at = 0.0
            subscriber.backoff.reset()

    async def _wait_for_more(self) -> None:
        retries = [subscriber.retry_at for subscriber in self._subscribers if subscriber.pending]
        if not retries:
            await self._has_changes.wait()
            return
        await wait_first(
            self._has_changes.wait(), self._clock.sleep(max(0.0, min(retries) - self._clock.monotonic()))
        )


def _log_left_out(what: str) -> None:
    log.warning("network table entry left out", entry=what)


class _Subscriber:
    """One listener, and the networks that it has not applied yet."""

    def __init__(self, listener: TableListener, rng: Callable[[], float]) -> None:
        self.listener = listener
        self.changed: frozenset[NetworkId] = frozenset()
        """Networks changed since the last call."""
        self.pending: frozenset[NetworkId] = frozenset()
        """Networks of the call in progress, or of the last failed call."""
        self.backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, rng=rng)
        self.retry_at = 0.0

    @property
    def has_pending(self) -> bool:
        return bool(self.changed or self.pending)


def merged(
    tables: Mapping[NetworkId, NetworkTable], received: TableSet
) -> tuple[Mapping[NetworkId, NetworkTable], frozenset[NetworkId]]:
    """Return the tables after ``received``, and the networks whose tables were changed or removed.

    A table that is sent again with the same content has another revision, and does not count as changed.
    Raises: InvalidArgument: a change of a table that this node does not have.
    """
    after = dict(tables)
    for change in received.changes:
        id = change.head.id
        before = after.get(id)
        if before is None and not change.is_whole:
            raise InvalidArgument(f"cannot apply a change of network {id}: this node does not have its table")
        after[id] = changed(before, change)
    gone = set(received.removed)
    if received.is_complete:
        gone |= after.keys() - {change.head.id for change in received.changes}
    for id in gone:
        after.pop(id, None)
    for id in {change.head.id for change in received.changes} & after.keys():
        after[id] = keeping_unread(tables.get(id), after[id])
    differing = {
        id for id in {change.head.id for change in received.changes} if _differ(tables.get(id), after.get(id))
    }
    return after, frozenset(differing | (gone & tables.keys()))


def _differ(before: NetworkTable | None, after: NetworkTable | None) -> bool:
    if before is None or after is None:
        return before is not after
    return difference(before, after) is not None
