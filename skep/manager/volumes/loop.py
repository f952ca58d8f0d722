"""The leader's loop for cluster volumes: one job per volume, which ends in calls of its driver.

A volume whose driver hangs or fails is retried with growing delays and does not delay other volumes: each is handled
separately, and a driver's calls are limited in number and time.

CSI allows several calls for one volume only if they request the same.  A leader neither repeats what an earlier leader
may be undoing, since an entry stays until it has been undone, nor undoes what that leader may be doing (``state``).
"""

import asyncio
from collections import deque
from random import Random

from skep.aio.clock import Clock
from skep.aio.failures import describe_error, log_error
from skep.aio.groups import first_alone
from skep.errors import FailedPrecondition, SkepError
from skep.manager.control_loops.failures import Reported
from skep.manager.control_loops.loop_driver import LoopDriver
from skep.manager.volumes.driver_calls import Confirm, DriverCalls, FindDriver
from skep.manager.volumes.records import mark_doubtful, note, settle
from skep.manager.volumes.state import VolumesState
from skep.manager.volumes.steps import Step, steps
from skep.model.node import Node
from skep.model.task import Task
from skep.model.values.ids import VolumeId
from skep.model.volume import Volume
from skep.store.interface import LoopStore, NotLeader

BATCH = 100
"""Volumes taken from the queue at once."""
LANES = 8
"""Concurrent steps of one volume, so that a step for a node that hangs does not delay those for others."""
MESSAGE_CHARACTERS_MAX = 500
"""Maximum length of a step's error on the volume."""


class VolumeManager:
    """Has drivers create, publish and delete cluster volumes as tasks need them.  Leader only."""

    def __init__(
        self, term: LoopStore, clock: Clock, random: Random, find_driver: FindDriver, confirm: Confirm
    ) -> None:
        self._term = term
        self._calls = DriverCalls(term, find_driver, confirm)
        self._handled: set[VolumeId] = set()
        self._requeued: set[VolumeId] = set()
        """Volumes that became due while they were handled."""
        self.state = VolumesState(term.view, clock, random)
        self._driver = LoopDriver(term, clock, self.state, (Volume, Task, Node), BATCH)

    async def run(self) -> None:
        """Handle volumes until cancelled."""
        await self._driver.run(self._start)

    async def _start(self, ids: list[VolumeId]) -> None:
        """Start to handle each volume, unless that is in progress."""
        for id in ids:
            if id in self._handled:
                self._requeued.add(id)
            else:
                self._handled.add(id)
                self._driver.spawn(self._handle(id), f"volume-{id}")

    async def _handle(self, id: VolumeId) -> None:
        """Handle a volume once.  Only errors that end the term are raised."""
        queue, failures = self.state.queue, self.state.failures
        try:
            await self._driver.catch_up()
            with failures.caught(id):
                await self._advance(id)
        finally:
            self._handled.discard(id)
        if (failure := failures.of(id)) is not None:
            queue.add_at(id, failure.retry_at)
        if id in self._requeued:
            self._requeued.discard(id)
            queue.add((id,))

    async def _advance(self, id: VolumeId) -> None:
        """Settle the volume and carry out its steps."""
        needed = self.state.needed_on(id)
        volume = await self._term.update(settle, id, needed)
        if volume is None:
            return
        left: deque[Step] = deque()
        for step in steps(volume, needed):
            if (wait := self.state.wait_of(step, volume)) is None:
                left.append(step)
            else:
                await self._term.update(note, id, step, wait.reason)
                self.state.queue.add_at(id, wait.until)
        with first_alone(NotLeader):
            async with asyncio.TaskGroup() as group:
                lanes = [
                    group.create_task(self._carry_out_each(left, volume))
                    for _ in range(min(LANES, len(left)))
                ]
        if not all(lane.result() for lane in lanes):
            raise Reported("steps failed")

    async def _carry_out_each(self, left: deque[Step], volume: Volume) -> bool:
        """Carry out steps until none is left.  Returns whether all of them succeeded."""
        is_done = True
        while left:
            step = left.popleft()
            try:
                await self._calls.carry_out(step, volume)
            except NotLeader:
                raise
            except Exception as error:
                words = (str(error) if isinstance(error, SkepError) else describe_error(error)) or "failed"
                if not isinstance(error, SkepError):
                    log_error(error, "step of a volume failed", volume=volume.id, step=type(step).__name__)
                # CSI's code for a volume that is on another node.  If the store has no such node, an earlier volume had
                # the same name.
                is_elsewhere = isinstance(error, FailedPrecondition) and volume.id not in self.state.doubted
                if is_elsewhere and await self._term.update(mark_doubtful, volume.id, step):
                    self.state.doubted.add(volume.id)
                await self._term.update(note, volume.id, step, words[:MESSAGE_CHARACTERS_MAX])
                is_done = False
        return is_done
