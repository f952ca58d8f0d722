"""A manager's API on a store in memory, with a cluster of one node."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

from aiohttp import web

from skep.aio.clock import SystemClock
from skep.manager.control.names import names_from
from skep.manager.control.swarm import found_swarm
from skep.manager.events import ClusterEvents
from skep.manager.routes import ManagerApi, application
from skep.model.ids import ClusterId, NodeId, new_id
from skep.model.logs import LogLine, LogQuery
from skep.model.meta import TLSInfo
from skep.model.node import (
    ManagerStatus,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    Reachability,
)
from skep.model.swarm import DEFAULT_SWARM_SPEC, JoinTokens
from skep.store.memory import MemoryStore


class CannedLogs:
    """Gives the same lines to everybody, and remembers what was asked for."""

    def __init__(self, *lines: LogLine) -> None:
        self.lines = lines
        self.asked: list[LogQuery] = []

    async def subscribe(self, query: LogQuery) -> AsyncIterator[LogLine]:
        self.asked.append(query)
        for line in self.lines:
            yield line


@asynccontextmanager
async def a_manager_api(logs: CannedLogs | None = None) -> AsyncIterator[ManagerApi]:
    """What the routes need, on a founded cluster; events are followed."""
    clock = SystemClock()
    store = MemoryStore(clock)
    api = ManagerApi(
        store=store,
        logs=logs or CannedLogs(),
        events=ClusterEvents(store, clock),
        clock=clock,
        new_id=new_id,
        new_name=names_from(Random(1)),
    )
    await store.update(
        found_swarm,
        ClusterId(new_id()),
        DEFAULT_SWARM_SPEC,
        the_node(),
        tls_info=TLSInfo(
            trust_root="-----BEGIN CERTIFICATE-----\n", cert_issuer_subject=b"a", cert_issuer_public_key=b"b"
        ),
        join_tokens=JoinTokens(worker="SWMTKN-1-a-b", manager="SWMTKN-1-a-c"),
        new_id=new_id,
        now=api.now(),
    )
    async with asyncio.TaskGroup() as group:
        following = group.create_task(api.events.run())
        try:
            yield api
        finally:
            following.cancel()


@asynccontextmanager
async def a_manager(logs: CannedLogs | None = None) -> AsyncIterator[web.Application]:
    """The application of ``a_manager_api``."""
    async with a_manager_api(logs) as api:
        yield application(api)


def the_node() -> Node:
    """The only node: a manager that is up."""
    return Node(
        id=NodeId(new_id()),
        spec=NodeSpec(role=NodeRole.MANAGER),
        description=NodeDescription(hostname="m1"),
        status=NodeStatus(state=NodeState.READY, addr="10.77.0.1"),
        manager_status=ManagerStatus(leader=True, reachability=Reachability.REACHABLE, addr="10.77.0.1:2377"),
    )
