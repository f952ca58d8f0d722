"""A simulated manager: the real dispatcher, log broker and control loops over a store in memory."""

import asyncio
from contextlib import AbstractAsyncContextManager
from random import Random

from skep.aio.clock import Clock
from skep.manager.dispatcher.adoption import Adoption
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.messages import ManagerPeer
from skep.manager.link.loop import ManagerLink
from skep.manager.logbroker.broker import LogBroker
from skep.manager.loops import loops
from skep.model.ids import ClusterId, IdSource, NodeId
from skep.model.node import NodeRole
from skep.security.identity import Identity
from skep.sim.faults import PoisonedState
from skep.sim.network import Network
from skep.store.interface import NotLeader, Term
from skep.store.memory import MemoryStore
from skep.wire.client import Channel


class SimulatedManager:
    """One manager process.  It has no API: a simulation's users write to the store."""

    def __init__(
        self,
        id: NodeId,
        addr: str,
        store: MemoryStore,
        network: Network,
        *,
        clock: Clock,
        new_id: IdSource,
        random: Random,
        poisoned: set[str],
    ) -> None:
        """``poisoned``: services whose decisions raise; may change at any time."""
        self._id = id
        self._addr = addr
        self._store = store
        self._network = network
        self._clock = clock
        self._new_id = new_id
        self._random = random
        self._poisoned = poisoned

    async def run(self) -> None:
        """Serve nodes, and lead when elected, until cancelled."""
        own = ManagerPeer(node_id=self._id, addr=self._addr)
        dispatcher = Dispatcher(self._store, own, self._clock, self._new_id, self._random)
        logs = LogBroker(self._store, self._new_id)
        link = ManagerLink(self._store, self._id, self._connect, self._clock, self._random)
        handlers = (*dispatcher.services(), *logs.services(), *link.services())
        async with self._network.listening(self._addr, handlers), asyncio.TaskGroup() as group:
            group.create_task(dispatcher.run(), name=f"{self._id} dispatcher")
            group.create_task(link.run(), name=f"{self._id} link")
            group.create_task(self._stand(link), name=f"{self._id} election")

    def _connect(self, addr: str) -> AbstractAsyncContextManager[Channel]:
        """A connection to another manager."""
        identity = Identity(node_id=self._id, cluster_id=ClusterId("sim"), role=NodeRole.MANAGER)
        # It has the calls of a real one.
        return self._network.connected(addr, identity)  # type: ignore[return-value]

    async def _stand(self, link: ManagerLink) -> None:
        async for term in self._store.terms(self._id, self._addr):
            try:
                await self._lead(term, link)
            except* NotLeader:
                pass  # the next term, if there is one

    async def _lead(self, term: Term, link: ManagerLink) -> None:
        state = PoisonedState(term, self._poisoned)
        adoption = Adoption(term, self._id, link.silent, self._clock, self._new_id)
        async with asyncio.TaskGroup() as group:
            running = [
                group.create_task(loop.run(), name=f"{self._id} {type(loop).__name__}")
                for loop in (*loops(state, self._clock, self._new_id, self._random), adoption)
            ]
            await term.wait_lost()
            for task in running:
                task.cancel()
