"""Finds out whether any node may still send new connections to a task that is about to stop.

A task is unused once every node of its networks has applied tables in which the task does not serve.  Each manager has
the acknowledgements of its own nodes, and requests other nodes' from their managers over the link, once for all
tasks that wait for the same revision.  If a node switches managers meanwhile, both might miss it, so its new manager is
asked as well.
"""

import asyncio
from collections.abc import Callable, Sequence
from random import Random

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.groups import first_alone
from skep.aio.race import LostRace, run_unless
from skep.errors import SkepError
from skep.manager.discovery.loop import Discovery
from skep.model.task import Task
from skep.model.values.ids import NetworkId, NodeId
from skep.store.interface import Store
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.client import ManagerChannel
from skep.wire.service import Handler, unary

WAIT_S = 2.0
"""Seconds that a manager waits for its nodes before it responds that they have not acknowledged yet."""
CALL_SECONDS_MAX = WAIT_S + 1.0
"""Timeout of a request to another manager, with a second for the network."""
FIRST_RETRY_S = 0.02
"""Seconds before the first new attempt: a task that stops waits for it."""
LONGEST_RETRY_S = 0.5
"""Longest pause in seconds between requests to another manager."""
CACHED_MAX = 10_000
"""Maximum entries of the cache of acknowledged revisions.  A full cache is cleared."""


class Draining:
    """Waits until tasks are unused, on the nodes of all managers."""

    def __init__(
        self,
        store: Store,
        own: NodeId,
        discovery: Discovery,
        channel: Callable[[NodeId], ManagerChannel],
        clock: Clock,
        random: Random,
    ) -> None:
        """``channel`` returns the link's connection to another manager, or raises Unavailable."""
        self._store = store
        self._own = own
        self._discovery = discovery
        self.channel = channel
        self._clock = clock
        self._random = random
        self.acknowledged: dict[tuple[NodeId, NetworkId], _Acknowledged] = {}

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (unary(methods.AWAIT_TABLES, self.await_tables),)

    async def wait_unused(self, task: Task, revision: int) -> None:
        """Wait until no node sends new connections to ``task``, which was retired at ``revision`` of the store.

        The caller sets a timeout.  Nodes of an unreachable manager may still use the task.
        """
        revisions = await self._discovery.wait_not_serving(task, revision)
        with first_alone(SkepError):
            async with asyncio.TaskGroup() as group:
                for network_id, changed_at in revisions.items():
                    group.create_task(self._wait_applied_by_all(network_id, changed_at))

    async def _wait_applied_by_all(self, network_id: NetworkId, revision: int) -> None:
        """Wait until every node on the network has applied this table, whichever manager has its session."""
        await self._discovery.wait_handled()
        sessions_at = self._discovery.state.sessions_changed_at
        managers = frozenset(self._discovery.state.managers_on(network_id))
        while managers:
            async with asyncio.TaskGroup() as group:
                for manager in sorted(managers):
                    group.create_task(self._wait_applied(manager, network_id, revision, sessions_at))
            if managers != {self._own}:
                # Another manager may have noticed before this one that a node has left.
                await self._catch_up()
            await self._discovery.wait_handled()
            managers = self._discovery.state.managers_of_moved(network_id, sessions_at)
            sessions_at = self._discovery.state.sessions_changed_at

    async def _catch_up(self) -> None:
        backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, rng=self._random.random)
        while True:
            try:
                return await self._store.barrier()
            except SkepError:
                await backoff.sleep(self._clock)

    async def _wait_applied(
        self, manager: NodeId, network_id: NetworkId, revision: int, sessions_at: int
    ) -> None:
        """Wait until the nodes with sessions at ``manager`` have applied this table or have left."""
        if manager == self._own:
            await self._discovery.state.acknowledgements.wait_applied(network_id, revision)
            return
        backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, rng=self._random.random)
        while not await self._has_applied(manager, network_id, revision, sessions_at):
            await backoff.sleep(self._clock)
            await self._discovery.wait_handled()
            if manager not in self._discovery.state.managers_on(network_id):
                return  # the caller then waits for the managers that have its nodes now

    async def _has_applied(
        self, manager: NodeId, network_id: NetworkId, revision: int, sessions_at: int
    ) -> bool:
        """Ask another manager, unless its acknowledgement is known already.

        Args:
            sessions_at: Revision of the store.  The acknowledgement must cover all nodes that have their session with
                the manager at this revision or later.
        """
        key = manager, network_id
        if key not in self.acknowledged and len(self.acknowledged) >= CACHED_MAX:
            self.acknowledged.clear()
        acknowledged = self.acknowledged.setdefault(key, _Acknowledged())
        async with acknowledged.one_at_a_time:
            if acknowledged.applied < revision or acknowledged.sessions_at < sessions_at:
                asked_at = self._discovery.state.sessions_changed_at
                request = skep.AwaitTablesRequest(network_id=network_id, revision=revision)
                try:
                    reply = await self.channel(manager).call(
                        methods.AWAIT_TABLES, request, timeout_s=CALL_SECONDS_MAX
                    )
                except SkepError:
                    return False
                acknowledged.applied, acknowledged.sessions_at = reply.applied, asked_at
            return acknowledged.applied >= revision

    async def await_tables(
        self, request: skep.AwaitTablesRequest, caller: Caller
    ) -> skep.AwaitTablesResponse:
        acknowledgements = self._discovery.state.acknowledgements
        network_id = NetworkId(request.network_id)
        are_counted = False

        async def wait_applied() -> None:
            nonlocal are_counted
            await self._store.barrier()  # the caller may know nodes that are not in this view yet
            await self._discovery.wait_handled()
            are_counted = True
            await acknowledgements.wait_applied(network_id, request.revision)

        try:
            await run_unless(wait_applied(), self._clock.sleep(WAIT_S))
        except LostRace:
            smallest = acknowledgements.smallest(network_id) if are_counted else 0
            return skep.AwaitTablesResponse(applied=request.revision if smallest is None else smallest)
        # A node that has connected since is not covered. The caller asks again if such a node may have earlier tables.
        return skep.AwaitTablesResponse(
            applied=max(request.revision, acknowledgements.smallest(network_id) or 0)
        )


class _Acknowledged:
    """The last acknowledged revision of a network on another manager."""

    def __init__(self) -> None:
        self.applied = 0
        self.sessions_at = 0
        """The acknowledgement covers the nodes with sessions as of this revision of the store, or of a later one."""
        self.one_at_a_time = asyncio.Lock()
