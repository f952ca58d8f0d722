"""A manager that gets processor time rarely marks no node down sooner because its checks are rarer."""

import asyncio
from random import Random

import pytest

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer
from skep.model.values.ids import NodeId, new_id
from skep.store.memory import MemoryStore


class StarvedClock(VirtualClock):
    """Every sleep ends a second late."""

    async def sleep(self, seconds: float) -> None:
        await super().sleep(seconds + 1.0)


def test_time_without_a_processor_is_not_a_silence_of_nodes() -> None:
    """With heartbeats every 5 s, as in a cluster of Docker Engines."""
    loop = VirtualLoop()
    clock = StarvedClock(loop)
    store = MemoryStore(clock)
    dispatcher = Dispatcher(store, ManagerPeer(node_id=NodeId("m1"), addr=""), clock, new_id, Random(1))
    running = loop.create_task(dispatcher.run())
    loop.run_until_complete(asyncio.wait([running], timeout=30))
    assert dispatcher.deadlines.now <= 15
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(running)
    loop.close()
