"""A manager that loses contact with the others holds no session, and none begins there."""

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from sim.time import VirtualClock, VirtualLoop
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


def test_no_session_begins_at_a_manager_that_lost_contact_while_it_was_written() -> None:
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    store = LaggingStore(clock)
    dispatcher = Dispatcher(store, ManagerPeer(node_id=NodeId("m1"), addr=""), clock, new_id, Random(1))
    identity = NodeIdentity(node_id=N1, cluster_id=ClusterId("c"), role=NodeRole.WORKER)
    caller = Caller(identity=identity, address="127.0.0.1", disconnect=lambda: None)

    async def register() -> None:
        await dispatcher._register(pb.SessionRequest(), caller)

    loop.run_until_complete(store.update(lambda tx: tx.put(a_node(N1))))
    running = loop.create_task(dispatcher.run())
    loop.run_until_complete(clock.sleep(1))
    store.lags = True
    with pytest.raises(Unavailable, match="lost contact"):
        loop.run_until_complete(register())
    assert store.view().get(Node, N1).session is not None, "the case that is to be tested"
    assert not dispatcher.is_current()
    assert dispatcher.session_count() == 0
    store.lags = False
    loop.run_until_complete(clock.sleep(1))
    loop.run_until_complete(register())
    assert dispatcher.session_count() == 1
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(running)
    loop.close()
