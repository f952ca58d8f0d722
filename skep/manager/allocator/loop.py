"""The allocator's loop: allocates subnets of networks and endpoints of services, then sets tasks to PENDING."""

from collections.abc import Callable, Sequence
from functools import partial
from random import Random

from skep.aio.clock import Clock
from skep.aio.time_slices import run_in_slices
from skep.manager.allocator.changes import NETWORK, NODE, Change, apply
from skep.manager.allocator.state import CLAIMS, ENDPOINTS, TASKS, AllocatorState
from skep.manager.control_loops.loop_driver import Decision, LoopDriver
from skep.model.network import Network
from skep.model.node import Node
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.values.ids import IdSource
from skep.model.values.times import timestamp
from skep.store.interface import LoopStore

KINDS = (Service, Task, Network, Node, Swarm)
BATCH = 500
"""Objects and new tasks decided before their changes are committed together."""


class Allocator:
    """Allocates what networks, services, nodes and tasks need before tasks can be assigned."""

    def __init__(self, term: LoopStore, clock: Clock, new_id: IdSource, random: Random) -> None:
        self._clock = clock
        self.state = AllocatorState(term.view, clock, random)
        self._driver = LoopDriver(term, clock, self.state, KINDS, BATCH)

    async def run(self) -> None:
        """Allocate until cancelled.  Runs on the leader only."""
        await self._driver.run(self._allocate, has_rest=self.state.is_checking)

    async def _allocate(self, keys: list[str]) -> None:
        networks = [key for key in keys if key.startswith(NETWORK)]
        nodes = [key for key in keys if key.startswith(NODE)]
        services = [key for key in keys if "/" not in key]
        # In this order, since each step reads the results of the one before from the store.
        await self._step(CLAIMS, networks, self.state.claims)
        await self._step("subnets", networks, self.state.subnets)
        known = self.state.networks()
        await self._step(ENDPOINTS, services, partial(self.state.endpoint, networks=known))
        await self._step("node attachments", nodes, partial(self.state.attachments, networks=known))
        self.state.begin_checking(services)
        turns = self.state.turns(BATCH)
        share = max(1, BATCH // max(1, len(turns)))
        await self._step(TASKS, turns, partial(self.state.releases, networks=known, limit=share))

    async def _step(self, what: str, keys: Sequence[str], decide: Callable[[str], Decision[Change]]) -> None:
        """Decide one thing about ``keys``, and write the changes."""
        if not keys:
            return
        changes: list[tuple[str, Change]] = await self._driver.decide(keys, decide, what)
        if not changes:
            return
        await self._driver.write(what, partial(apply, now=timestamp(self._clock.now_ns())), changes)
        await run_in_slices(self.state.resync(change for _, change in changes), self._clock)
