"""A node that falls silent while other managers miss heartbeats, too, is not taken for a single failure."""

import asyncio
from random import Random

import pytest

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer
from skep.manager.nodes.heartbeats import DEFAULT_PERIOD_S, GRACE_PERIODS
from skep.manager.peer_reports import REPORT_VALID_S, PeerReport, PeerReports
from skep.model.node import Node, NodeRole, NodeState
from skep.model.values.ids import ClusterId, NodeId, new_id
from skep.security.identity import NodeIdentity
from skep.store.memory import MemoryStore
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from tests.support.builders import a_node

M1, M2, N1 = NodeId("m1"), NodeId("m2"), NodeId("n1")
GRACE_S = GRACE_PERIODS * DEFAULT_PERIOD_S


@pytest.mark.parametrize(("missed", "is_together"), [(0, False), (1, True)])
def test_what_other_managers_miss_counts_for_the_only_silent_node_of_a_manager(
    missed: int, is_together: bool
) -> None:
    """Nodes that fail at once are spread over the managers, each of which may have one of them."""
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    store, reports = MemoryStore(clock), PeerReports()
    dispatcher = Dispatcher(
        store, ManagerPeer(node_id=M1, addr=""), clock, new_id, Random(1), reports=reports
    )
    identity = NodeIdentity(node_id=N1, cluster_id=ClusterId("c"), role=NodeRole.WORKER)
    caller = Caller(identity=identity, address="127.0.0.1", disconnect=lambda: None)

    async def report() -> None:
        while True:
            reports.record(M2, PeerReport(missed=missed), clock.monotonic())
            await clock.sleep(REPORT_VALID_S / 4)

    async def live() -> Node:
        await store.update(lambda tx: tx.put(a_node(N1)))
        running = [asyncio.create_task(dispatcher.run()), asyncio.create_task(report())]
        await clock.sleep(1)
        await dispatcher.registrar.register(pb.SessionRequest(), caller)
        await clock.sleep(GRACE_S + 1)
        for one in running:
            one.cancel()
        await asyncio.wait(running)
        return store.view().get(Node, N1)

    node = loop.run_until_complete(live())
    loop.close()
    assert (node.status.state, node.silent_together) == (NodeState.DOWN, is_together)
