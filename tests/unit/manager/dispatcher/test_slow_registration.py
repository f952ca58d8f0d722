"""A node that registers is alive, however long its manager, or another one, takes to write its session."""

import asyncio
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer
from skep.manager.nodes.heartbeats import DEFAULT_PERIOD_S, GRACE_PERIODS
from skep.manager.peer_reports import REPORT_VALID_S, PeerReports
from skep.model.node import Node, NodeRole, NodeState
from skep.model.values.ids import ClusterId, NodeId, new_id
from skep.model.values.times import SECOND_NS, unix_ns
from skep.security.identity import NodeIdentity
from skep.store.memory import MemoryCluster, MemoryStore
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from tests.support.builders import a_node

N1 = NodeId("n1")
GRACE_S = GRACE_PERIODS * DEFAULT_PERIOD_S


class SlowStore(MemoryStore):
    """Single writes wait for ``delay_s`` before they are committed, as behind a hundred thousand others."""

    def __init__(self, clock: VirtualClock, cluster: MemoryCluster | None = None) -> None:
        super().__init__(clock, cluster)
        self.delay_s = 0.0
        self._own_clock = clock

    async def update(self, body: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        await self._own_clock.sleep(self.delay_s)
        return await super().update(body, *args, **kwargs)


class Rig:
    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.clock = VirtualClock(loop)
        self.store = SlowStore(self.clock)
        own = ManagerPeer(node_id=NodeId("m1"), addr="")
        self.reports = PeerReports()
        self.dispatcher = Dispatcher(self.store, own, self.clock, new_id, Random(1), reports=self.reports)
        identity = NodeIdentity(node_id=N1, cluster_id=ClusterId("c"), role=NodeRole.WORKER)
        self.caller = Caller(identity=identity, address="127.0.0.1", disconnect=lambda: None)
        self.registered_ns = 0

    async def register(self) -> None:
        await self.dispatcher.registrar.register(pb.SessionRequest(), self.caller)

    def after(self, seconds: float) -> NodeState:
        """State of the node that many seconds later."""
        self.loop.run_until_complete(self.clock.sleep(seconds))
        return self.store.view().get(Node, N1).status.state


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A node with a session, which then loses its connection."""
    loop = VirtualLoop()
    rig = Rig(loop)
    loop.run_until_complete(rig.store.update(lambda tx: tx.put(a_node(N1))))
    running = loop.create_task(rig.dispatcher.run())
    rig.after(1)
    loop.run_until_complete(rig.register())
    rig.registered_ns = rig.clock.now_ns()
    yield rig
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(running)
    loop.close()


def test_a_node_is_not_down_while_its_session_is_written(rig: Rig) -> None:
    rig.store.delay_s = 3 * GRACE_S
    assert rig.after(GRACE_S / 2) is NodeState.READY
    registering = rig.loop.create_task(rig.register())
    for _ in range(5):
        assert rig.after(GRACE_S / 2) is NodeState.READY
    rig.loop.run_until_complete(registering)
    assert rig.dispatcher.session_count() == 1


def test_a_node_that_gives_up_has_its_grace_to_try_again(rig: Rig) -> None:
    rig.store.delay_s = 3 * GRACE_S
    assert rig.after(GRACE_S / 2) is NodeState.READY
    registering = rig.loop.create_task(rig.register())
    assert rig.after(GRACE_S) is NodeState.READY
    registering.cancel()
    assert rig.after(GRACE_S - 1) is NodeState.READY
    assert rig.after(2) is NodeState.DOWN


REPORTS_S = 0.5
"""Seconds between the reports that the two managers send each other."""


class Two:
    """The rig's manager m1, and another one, m2, in which the node may register."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.store = SlowStore(rig.clock, rig.store.cluster)
        self.reports = {NodeId("m1"): rig.reports, NodeId("m2"): PeerReports()}
        peer = ManagerPeer(node_id=NodeId("m2"), addr="")
        self.dispatcher = Dispatcher(
            self.store, peer, rig.clock, new_id, Random(2), reports=self.reports[NodeId("m2")]
        )

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.dispatcher.run())
            while True:
                await self._rig.clock.sleep(REPORTS_S)
                for sender, own in self.reports.items():
                    for receiver, others in self.reports.items():
                        if sender != receiver:
                            others.record(sender, own.own, self._rig.clock.monotonic())

    async def register(self) -> None:
        await self.dispatcher.registrar.register(pb.SessionRequest(), self._rig.caller)


@pytest.fixture
def two(rig: Rig) -> Iterator[Two]:
    two = Two(rig)
    running = rig.loop.create_task(two.run())
    rig.after(1)
    yield two
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        rig.loop.run_until_complete(running)


def test_a_node_is_not_down_while_another_manager_writes_its_session(rig: Rig, two: Two) -> None:
    two.store.delay_s = 3 * GRACE_S
    registering = rig.loop.create_task(two.register())
    for _ in range(5):
        assert rig.after(GRACE_S / 2) is NodeState.READY
    rig.loop.run_until_complete(registering)
    assert (rig.dispatcher.session_count(), two.dispatcher.session_count()) == (0, 1)


def test_a_node_that_gives_up_at_another_manager_has_its_grace_and_no_more(rig: Rig, two: Two) -> None:
    two.store.delay_s = 3 * GRACE_S
    registering = rig.loop.create_task(two.register())
    assert rig.after(1.5 * GRACE_S) is NodeState.READY
    registering.cancel()
    assert rig.after(GRACE_S - 1) is NodeState.READY
    assert rig.after(REPORT_VALID_S + 2) is NodeState.DOWN


def test_a_node_was_last_heard_at_its_heartbeat_and_not_while_it_registered_in_vain(
    rig: Rig, two: Two
) -> None:
    """It gets no new labels of services then.  The leader goes by that time (``disconnection.policy_on``)."""
    two.store.delay_s = 3 * GRACE_S
    heard_ns = rig.registered_ns
    registering = rig.loop.create_task(two.register())
    assert rig.after(1.5 * GRACE_S) is NodeState.READY
    registering.cancel()
    assert rig.after(GRACE_S + REPORT_VALID_S + 1) is NodeState.DOWN
    node = rig.store.view().get(Node, N1)
    assert node.silent_since is not None
    assert abs(unix_ns(node.silent_since) - heard_ns) < SECOND_NS
