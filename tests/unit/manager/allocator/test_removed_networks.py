"""A node's address on an ingress network that is removed before the address is written."""

from random import Random

from skep.aio.clock import SystemClock
from skep.manager.allocator.changes import apply, node_key
from skep.manager.allocator.loop import KINDS
from skep.manager.allocator.state import AllocatorState
from skep.model.network import Network
from skep.model.node import Node
from skep.model.service import PortConfig, Service
from skep.model.values.times import Timestamp
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, an_overlay

INGRESS = an_overlay("ingress", subnet="10.0.0.0/24", ingress=True)
NOW = Timestamp("2026-01-01T00:00:00Z")


async def test_it_is_given_back_so_that_the_next_one_can_have_the_subnet() -> None:
    store = MemoryStore(SystemClock())
    state = AllocatorState(store.view, SystemClock(), Random(1))
    web = a_service("web", ports=(PortConfig(target_port=80, published_port=8080),))
    await store.update(lambda tx: [tx.put(one) for one in (INGRESS, web, a_node("n1"))])
    async with store.watch(*KINDS) as watch:
        commits = aiter(watch)
        for _ in state.start(watch.snapshot):
            pass
        (decided,) = state.attachments(node_key("n1"), state.networks())
        assert decided is not None
        await store.update(lambda tx: tx.delete(Service, web.id))
        await store.update(lambda tx: tx.delete(Network, INGRESS.id))
        for _ in range(2):
            state.on_commit(await anext(commits))
        state.queue.take_due(100)
        await store.update(apply, decided, NOW)
        state.on_commit(await anext(commits))
    assert node_key("n1") in state.queue.take_due(100)
    (cleared,) = state.attachments(node_key("n1"), state.networks())
    assert cleared is not None
    await store.update(apply, cleared, NOW)
    assert store.view().get(Node, a_node("n1").id).attachments == ()
    assert not state.allocations.networks.has(INGRESS.id)
