"""A manager that loses contact with the others holds no session, and none begins there."""

import asyncio
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from sim.world.time import VirtualClock, VirtualLoop
from skep.errors import Unavailable
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer
from skep.model.node import Node, NodeRole
from skep.model.values.ids import ClusterId, NodeId, new_id
from skep.security.identity import NodeIdentity
from skep.store.memory import MemoryStore
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from tests.support.builders import a_node

N1 = NodeId("n1")
LATE_S = 5.0


class LaggingStore(MemoryStore):
    """While it lags, writes are committed, their results are late, and no barrier is passed."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(clock)
        self.lags = False
        self._own_clock = clock

    async def update(self, body: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        result = await super().update(body, *args, **kwargs)
        if self.lags:
            await self._own_clock.sleep(LATE_S)
        return result

    async def barrier(self) -> None:
        if self.lags:
            raise Unavailable("no quorum")


class Part:
    """A manager's dispatcher on a store that may lag, and a node that registers on it."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self._clock = VirtualClock(self.loop)
        self.store = LaggingStore(self._clock)
        peer = ManagerPeer(node_id=NodeId("m1"), addr="")
        self.dispatcher = Dispatcher(self.store, peer, self._clock, new_id, Random(1))
        self.loop.run_until_complete(self.store.update(lambda tx: tx.put(a_node(N1))))
        self._running = self.loop.create_task(self.dispatcher.run())
        self.pass_time(1)

    def register(self) -> None:
        identity = NodeIdentity(node_id=N1, cluster_id=ClusterId("c"), role=NodeRole.WORKER)
        caller = Caller(identity=identity, address="127.0.0.1", disconnect=lambda: None)
        self.loop.run_until_complete(self.dispatcher.registrar.register(pb.SessionRequest(), caller))

    def pass_time(self, seconds: float) -> None:
        self.loop.run_until_complete(self._clock.sleep(seconds))

    def end(self) -> None:
        self._running.cancel()
        with pytest.raises(asyncio.CancelledError):
            self.loop.run_until_complete(self._running)
        self.loop.close()


@pytest.fixture
def part() -> Iterator[Part]:
    made = Part()
    yield made
    made.end()


def test_no_session_begins_at_a_manager_that_lost_contact_while_it_was_written(part: Part) -> None:
    part.store.lags = True
    with pytest.raises(Unavailable, match="lost contact"):
        part.register()
    assert part.store.view().get(Node, N1).session is not None, "the case that is to be tested"
    assert not part.dispatcher.is_current()
    assert part.dispatcher.session_count() == 0
    part.store.lags = False
    part.pass_time(1)
    part.register()
    assert part.dispatcher.session_count() == 1


def test_a_session_survives_a_change_of_the_stores_leader_and_ends_without_a_quorum(part: Part) -> None:
    """etcd refuses the reads that wait during an election at once.  Nodes would be given 12 s to find managers."""
    part.register()
    part.store.lags = True
    part.pass_time(1.5)
    part.store.lags = False
    part.pass_time(0.6)
    assert part.dispatcher.session_count() == 1
    part.store.lags = True
    part.pass_time(3)
    assert part.dispatcher.session_count() == 0
