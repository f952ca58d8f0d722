"""Whether any node still sends new connections to a task that is to stop.

A task is unused when every node of its networks has applied tables in which it does not serve.  Each manager has the
acknowledgements of its own nodes; those of the others are requested over the link, once for all tasks that wait for
the same revision.
"""

import asyncio
from collections.abc import Callable, Sequence
from random import Random

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.race import Preempted, run_unless
from skep.errors import SkepError
from skep.manager.discovery.loop import Discovery
from skep.model.ids import NetworkId, NodeId
from skep.model.node import Node, NodeState
from skep.model.planes import is_docker_node
from skep.model.task import Task
from skep.store.interface import Store
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.client import Channel
from skep.wire.service import Handler, unary

WAIT_S = 2.0
"""How long a manager waits for its nodes before it responds that they have not acknowledged yet."""
CALL_SECONDS_MAX = WAIT_S + 1.0
FIRST_RETRY_S = 0.02
LONGEST_RETRY_S = 0.5
CACHED_MAX = 10_000
"""Entries of each cache."""


class Draining:
    """Waits for tasks to be unused, on this manager's nodes and on those of others."""

    def __init__(
        self,
        store: Store,
        own: NodeId,
        discovery: Discovery,
        channel: Callable[[NodeId], Channel],
        clock: Clock,
        random: Random,
    ) -> None:
        """``channel``: the link's connection to another manager; raises Unavailable."""
        self._store = store
        self._own = own
        self._discovery = discovery
        self._channel = channel
        self._clock = clock
        self._random = random
        self._managers: dict[NetworkId, tuple[int, tuple[NodeId, ...]]] = {}
        """The managers of each network's nodes, as of a revision: tasks that stop together find them once."""
        self._acknowledged: dict[tuple[NodeId, NetworkId], _Acknowledged] = {}

    def services(self) -> Sequence[Handler]:
        """What to hand to ``wire.server.serve``."""
        return (unary(methods.AWAIT_TABLES, self._await_tables),)

    async def wait_unused(self, task: Task, revision: int) -> None:
        """Return when no node sends new connections to ``task``, which is to stop since ``revision`` of the store.

        Time-outs are the caller's.  Nodes of a manager that cannot be reached may still use the task.
        """
        revisions = await self._discovery.wait_not_serving(task, revision)
        async with asyncio.TaskGroup() as group:
            for network_id, changed_at in revisions.items():
                for manager in self._managers_of(network_id):
                    group.create_task(self._wait_applied(manager, network_id, changed_at))

    def _managers_of(self, network_id: NetworkId) -> tuple[NodeId, ...]:
        """The managers with sessions of nodes on the network, including this one, whose replica may be behind."""
        view = self._store.view()
        revision, acknowledgements = self._managers.get(network_id, (0, ()))
        if revision == view.revision:
            return acknowledgements
        ids = self._discovery.nodes_on(network_id)
        nodes = view.find(Node) if ids is None else [view.lookup(Node, id) for id in ids]
        managers = {
            node.session.manager_id
            for node in nodes
            if node is not None
            and node.session is not None
            and node.status.state is NodeState.READY
            and not is_docker_node(node)
        }
        acknowledgements = tuple(sorted(managers | {self._own}))
        if len(self._managers) >= CACHED_MAX:
            self._managers.clear()
        self._managers[network_id] = view.revision, acknowledgements
        return acknowledgements

    async def _wait_applied(self, manager: NodeId, network_id: NetworkId, revision: int) -> None:
        if manager == self._own:
            await self._discovery.acknowledgements.wait_applied(network_id, revision)
            return
        backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, rng=self._random.random)
        while not await self._has_applied(manager, network_id, revision):
            await backoff.sleep(self._clock)

    async def _has_applied(self, manager: NodeId, network_id: NetworkId, revision: int) -> bool:
        """Ask another manager, unless its acknowledgement is known already."""
        key = manager, network_id
        if key not in self._acknowledged and len(self._acknowledged) >= CACHED_MAX:
            self._acknowledged.clear()
        acknowledged = self._acknowledged.setdefault(key, _Acknowledged())
        async with acknowledged.one_at_a_time:
            if acknowledged.applied < revision:
                request = skep.AwaitTablesRequest(network_id=network_id, revision=revision)
                try:
                    reply = await self._channel(manager).call(
                        methods.AWAIT_TABLES, request, timeout_s=CALL_SECONDS_MAX
                    )
                except SkepError:
                    return False
                acknowledged.applied = reply.applied
            return acknowledged.applied >= revision

    async def _await_tables(
        self, request: skep.AwaitTablesRequest, caller: Caller
    ) -> skep.AwaitTablesResponse:
        acknowledgements = self._discovery.acknowledgements
        network_id = NetworkId(request.network_id)
        try:
            await run_unless(
                acknowledgements.wait_applied(network_id, request.revision), self._clock.sleep(WAIT_S)
            )
        except Preempted:
            pass
        smallest = acknowledgements.smallest(network_id)
        return skep.AwaitTablesResponse(applied=request.revision if smallest is None else smallest)


class _Acknowledged:
    """The last acknowledged revision of a network on another manager."""

    def __init__(self) -> None:
        self.applied = 0
        self.one_at_a_time = asyncio.Lock()
