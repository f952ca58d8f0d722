"""The reaper's loop: deletes the objects that ``history`` no longer needs."""

from functools import partial
from random import Random

from skep.aio.clock import Clock
from skep.manager.control_loops.loop_driver import LoopDriver
from skep.manager.orchestrator.reaper.removals import write
from skep.manager.orchestrator.reaper.state import Key, ReaperState
from skep.model.node import Node
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.values.ids import IdSource
from skep.model.values.times import timestamp
from skep.store.interface import LoopStore
from skep.store.kinds import SpecVersion

KINDS = (Service, Task, Node, Swarm, SpecVersion)
BATCH = 500
"""Slots and services decided before their changes are committed together."""


class Reaper:
    """Keeps task history within its limit, and deletes objects that users have removed."""

    def __init__(self, term: LoopStore, clock: Clock, new_id: IdSource, random: Random) -> None:
        self._clock = clock
        self.state = ReaperState(term.view, clock, random)
        self._driver = LoopDriver(term, clock, self.state, KINDS, BATCH)

    async def run(self) -> None:
        """Delete until cancelled.  Runs on the leader only."""
        await self._driver.run(self._remove)

    async def _remove(self, keys: list[Key]) -> None:
        removals = await self._driver.decide(keys, self.state.decide)
        await self._driver.write("removals", partial(write, now=timestamp(self._clock.now_ns())), removals)
