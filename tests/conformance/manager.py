"""A manager's API on a store in memory or on a real etcd, with a cluster of one node."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, cast

from aiohttp import web

from skep.aio.clock import SystemClock
from skep.manager.ca.external import ExternalAuthorities
from skep.manager.control.swarm import found_swarm
from skep.manager.routes import ManagerApi, application
from skep.manager.telemetry.events import ClusterEvents
from skep.model.logs import LogLine, LogQuery
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
from skep.model.swarm import DEFAULT_SWARM_SPEC, JoinTokens, Swarm
from skep.model.values.ids import ClusterId, NodeId, new_id
from skep.model.values.meta import TLSInfo
from skep.model.values.name_generator import names_from
from skep.model.values.times import timestamp
from skep.store.etcd.encryption.cipher import new_wrapping_key
from skep.store.etcd.initialize import initialize
from skep.store.etcd.store import open_store
from skep.store.interface import Store, Transaction
from skep.store.memory import MemoryStore
from tests.support.store.etcd_rig import a_member, member_settings


class CannedLogs:
    """A log source with fixed lines that records the queries."""

    def __init__(self, *lines: LogLine) -> None:
        self.lines = lines
        self.asked: list[LogQuery] = []

    async def subscribe(self, query: LogQuery) -> AsyncIterator[LogLine]:
        self.asked.append(query)
        for line in self.lines:
            yield line

    async def batches(self, query: LogQuery) -> AsyncIterator[list[LogLine]]:
        async for line in self.subscribe(query):
            yield [line]


@asynccontextmanager
async def a_manager_api(
    logs: CannedLogs | None = None, store: Store | None = None
) -> AsyncIterator[ManagerApi]:
    """What the routes need, on a founded cluster: one in memory, or that of ``store``."""
    clock = SystemClock()
    if store is None:
        store = MemoryStore(clock)
        await store.update(found)
    api = ManagerApi(
        store=store,
        logs=logs or CannedLogs(),
        backups=cast("Any", None),  # ours, not Docker's
        diagnostics=cast("Any", None),  # likewise
        external=ExternalAuthorities(lambda: cast("Any", None), clock, Random(1)),
        tunnels=cast("Any", None),  # ours, not Docker's
        events=ClusterEvents(store, clock),
        all_events=cast("Any", None),  # ours, not Docker's
        clock=clock,
        new_id=new_id,
        new_name=names_from(Random(1)),
    )
    async with asyncio.TaskGroup() as group:
        following = group.create_task(api.events.run())
        try:
            yield api
        finally:
            following.cancel()


@asynccontextmanager
async def a_store_on_etcd() -> AsyncIterator[Store]:
    """A real etcd with a founded cluster in it."""
    with TemporaryDirectory(prefix="skep-etcd-", dir="/tmp") as folder:
        settings = member_settings(Path(folder))
        key = new_wrapping_key()
        async with a_member(settings).running():
            await initialize(settings.socket, key, SystemClock(), found)
            async with open_store(settings.socket, NodeId("m1"), key, SystemClock()) as store:
                yield store


def found(tx: Transaction) -> None:
    """A cluster of one node."""
    swarm = Swarm(
        id=ClusterId(new_id()),
        created_at=timestamp(SystemClock().now_ns()),
        spec=DEFAULT_SWARM_SPEC,
        tls_info=TLSInfo(
            trust_root="-----BEGIN CERTIFICATE-----\n", cert_issuer_subject=b"a", cert_issuer_public_key=b"b"
        ),
        join_tokens=JoinTokens(worker="SWMTKN-1-a-b", manager="SWMTKN-1-a-c"),
    )
    found_swarm(tx, swarm, the_node(), new_id)


@asynccontextmanager
async def a_manager(store: Store | None = None) -> AsyncIterator[web.Application]:
    """The application of ``a_manager_api``."""
    async with a_manager_api(store=store) as api:
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
