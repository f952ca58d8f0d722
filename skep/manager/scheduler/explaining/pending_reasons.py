"""Writes the statuses of pending tasks, which say why these have no node.

The text of a refusal counts nodes, so a change of one node alters the text of every pending task.  Texts are therefore
not written with the decisions, but a few at a time after the assignments of each pass, with the counts of that moment.
"""

import asyncio
from collections import deque

from skep.aio.clock import Clock
from skep.aio.time_slices import TimeSlices, result_in_slices
from skep.manager.control_loops.failures import ERROR_CHARACTERS_MAX, Failures
from skep.manager.scheduler.decision_writer import TOGETHER, is_already_shown, is_pending, write_decisions
from skep.manager.scheduler.group_queue import GroupQueue
from skep.manager.scheduler.groups import Group, Groups
from skep.manager.scheduler.nodes.accounting import Accounting
from skep.manager.scheduler.nodes.requirements import Requirements
from skep.manager.scheduler.placement import PlacementRefused, reasoning
from skep.model.task import Task
from skep.model.values.ids import TaskId
from skep.model.values.times import timestamp
from skep.store.interface import LoopStore

RESTS = 4
"""Length of the rest after some texts, in times of the time that they took, while decisions are made."""
REST_S_MAX = 0.25
"""Longest of these rests in seconds."""


class Why:
    """Reasons why one decision refused one or more groups."""

    def __init__(self, text: str = "", requirements: Requirements | None = None) -> None:
        """Set the reason.  If ``requirements`` are passed, no node meets them, and the text with its counts is computed
        when it is written.
        """
        self.text = text
        self.requirements = requirements
        self.words: dict[TaskId, str] = {}
        """Text to append for individual tasks."""


class Texts:
    """Texts of all refused groups, and the tasks that may show outdated ones."""

    def __init__(
        self, term: LoopStore, clock: Clock, groups: Groups, accounting: Accounting, failures: Failures
    ) -> None:
        self._term = term
        self._clock = clock
        self._groups = groups
        self._accounting = accounting
        self._failures = failures
        self._why: dict[Group, Why] = {}
        self._new: deque[TaskId] = deque()
        """Tasks of groups that were not refused before.  They come first, because an update may wait for their
        refusal.
        """
        self._outdated: deque[TaskId] = deque()
        """All other tasks, longest waiting first, so that each gets its turn, however many decisions are made."""
        self._is_outdated: set[TaskId] = set()
        self._turn = asyncio.Event()
        self._passes = 0
        """Number of passes of decisions that have begun."""

    def set(self, group: Group, why: Why) -> None:
        """Record that the group was refused."""
        if not self._groups.count(group):
            return
        waiting = self._outdated if group in self._why else self._new
        self._why[group] = why
        ids = [id for id in self._groups.ids(group) if id not in self._is_outdated]
        waiting.extend(ids)
        self._is_outdated.update(ids)

    def forget(self, group: Group) -> None:
        """Forget a group without pending tasks."""
        self._why.pop(group, None)

    def hold(self) -> None:
        """Stop writing while decisions are made."""
        self._passes += 1
        self._turn.clear()

    def release(self) -> None:
        """Write some texts now that the decisions are written, and all others until ``hold``."""
        self._turn.set()

    async def run(self, queue: GroupQueue) -> None:
        """Write until cancelled.  Groups whose texts cannot be written are decided again through ``queue``.

        While decisions are made, the texts take about a fifth of the time.
        """
        while True:
            await self._turn.wait()
            if not self._is_outdated:
                self._turn.clear()
                continue
            began, passes = self._clock.monotonic(), self._passes
            refusals = await self.take(TOGETHER)
            results = await write_decisions(self._term, refusals, timestamp(self._clock.now_ns()))
            groups = [self._groups.of.get(one.task.id) for one in refusals]
            outcomes = [(group, result) for group, result in zip(groups, results, strict=True) if group]
            self._failures.requeue_failed(queue, "texts", outcomes)
            took_s = self._clock.monotonic() - began if self._passes != passes else 0.0
            await self._clock.sleep(min(RESTS * took_s, REST_S_MAX))

    async def take(self, limit: int) -> list[PlacementRefused]:
        """Remove up to ``limit`` tasks that show an outdated text.  Returns them with their new texts."""
        found: dict[TaskId, PlacementRefused] = {}
        slices = TimeSlices(self._clock)
        while self._is_outdated and len(found) < limit:
            id = (self._new or self._outdated).popleft()
            self._is_outdated.discard(id)
            why = self._why.get(self._groups.of.get(id, ""))
            if why is None:
                continue
            if why.requirements is not None:
                await self._explain(why, why.requirements)
            task = self._term.view().lookup(Task, id)
            if task is not None and is_pending(task):
                refusal = PlacementRefused(task, (why.text + why.words.get(id, ""))[:ERROR_CHARACTERS_MAX])
                found.pop(
                    id, None
                )  # the task was refused again during a pause, perhaps for the reason that it shows
                if not is_already_shown(refusal):
                    found[id] = refusal
            await slices.yield_if_due()
        return list(found.values())

    async def _explain(self, why: Why, requirements: Requirements) -> None:
        key = f"explanation for {requirements.service_id}/{requirements.version}"
        with self._failures.caught(key):
            why.text = await result_in_slices(reasoning(requirements, self._accounting), self._clock)
        if (failure := self._failures.of(key)) is not None:
            why.text = f"scheduling failed: {failure.error}"
        why.requirements = None
