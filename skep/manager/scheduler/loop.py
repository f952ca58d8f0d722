"""The scheduler's loop: assigns pending tasks to nodes, higher priorities first.

Tasks of one service and version have the same requirements and are decided together as a *group*.  A global service's
task has its node already and is a group of its own.  So is a task that returns to the node with its slot's volumes,
while that node can run it or is worth waiting for.  A refused group is decided again when a change could help: a node
event, or the end of a task.  Its tasks show the reason a moment later (``pending_reasons``).  A group that waits for
another service (``dependencies``) is decided again when that service changes.  If the cluster allows it, tasks with a
lower priority are preempted for a refused group (``preemption``).
"""

import asyncio
from random import Random

from skep.aio.clock import Clock
from skep.aio.time_slices import TimeSlices
from skep.manager.control_loops.loop_driver import LoopDriver
from skep.manager.scheduler.decision_writer import write_decisions
from skep.manager.scheduler.groups import Group
from skep.manager.scheduler.state import BATCH, WRITTEN, SchedulerState
from skep.model.node import Node
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.values.ids import IdSource
from skep.model.values.times import timestamp
from skep.model.volume import Volume
from skep.store.interface import LoopStore

KINDS = (Service, Task, Node, Volume, Swarm)


class Scheduler:
    """Assigns every pending task to a node."""

    def __init__(self, term: LoopStore, clock: Clock, new_id: IdSource, random: Random) -> None:
        self._term = term
        self._clock = clock
        self.state = SchedulerState(term, clock, random)
        self._driver = LoopDriver(term, clock, self.state, KINDS, BATCH)

    async def run(self) -> None:
        """Assign until cancelled.  Runs on the leader only."""
        await self._driver.run(self._schedule, self._write_texts)

    async def _write_texts(self) -> None:
        await self.state.texts.run(self.state.queue)

    async def _schedule(self, due: list[Group]) -> None:
        """Decide the due groups, and write the decisions before each pause."""
        self.state.texts.hold()
        slices = TimeSlices(self._clock)
        for pause in self.state.decide(due):
            if pause is WRITTEN or slices.is_over:
                await self._write()
                await asyncio.sleep(0)
                slices = TimeSlices(self._clock)
        await self._write()
        self.state.texts.release()

    async def _write(self) -> None:
        """Write the decisions, many in one transaction."""
        if decisions := self.state.take_decisions():
            results = await write_decisions(self._term, decisions, timestamp(self._clock.now_ns()))
            self.state.on_results(decisions, results)
