"""Scales services with autoscaling labels by their measures (``decision``).  Leader only."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from random import Random

import msgspec
import structlog
from msgspec.structs import replace

from skep.aio.clock import Clock, tick
from skep.aio.time_slices import TimeSlices
from skep.errors import SkepError
from skep.manager.autoscaling.decision import PERIOD_S
from skep.manager.autoscaling.state import (
    AutoscalerState,
    AutoscalingCounts,
    Quota,
    Scaling,
    door_nodes,
    idle_times,
    without_used,
    write_problem,
    write_replicas,
)
from skep.manager.control_loops.failures import isolated
from skep.manager.control_loops.informer import run_informer
from skep.manager.queries.board import Ask, QueryBoard, ask_nothing
from skep.manager.queries.node_questions import AskDoors, ask_no_doors
from skep.model.measures.readings import QueryAnswer, ScalingMeasurements
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import ServiceId
from skep.store.interface import LoopStore, NotLeader, Transaction

log = structlog.get_logger(__name__)


Collect = Callable[[], Awaitable[ScalingMeasurements]]
"""Returns the measurements of autoscaled services, from all managers, within seconds."""
Publish = Callable[[Mapping[ServiceId, Mapping[str, QueryAnswer]]], None]
"""Shows answers to other managers."""


def skip_publishing(answers: Mapping[ServiceId, Mapping[str, QueryAnswer]]) -> None:
    """Show no answers, where no other managers are."""


class Queries(msgspec.Struct, frozen=True):
    """Asks queries and front doors, and publishes the answers to queries."""

    random: Random
    ask: Ask = ask_nothing
    publish: Publish = skip_publishing
    ask_doors: AskDoors = ask_no_doors


class Autoscaler:
    """Decides about every autoscaled service once per period."""

    def __init__(
        self,
        term: LoopStore,
        clock: Clock,
        collect: Collect,
        queries: Queries,
        quota: Quota,
        counts: AutoscalingCounts,
    ) -> None:
        self._term = term
        self._clock = clock
        self._collect = collect
        self._quota = quota
        self._counts = counts
        self._publish = queries.publish
        self._ask_doors = queries.ask_doors
        self._board = QueryBoard(clock, queries.random, queries.ask)
        self.state = AutoscalerState(term.view, clock, quota, counts)

    async def run(self) -> None:
        """Scale until cancelled."""
        try:
            await run_informer(
                self._term,
                (Service, Task),
                on_snapshot=self.state.start,
                on_commit=self.state.on_commit,
                work=self._work,
            )
        finally:
            self._counts.services = self._counts.unknown = 0
            self._publish({})

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._board.run(), name="queries of autoscaling")
            await self._decide()

    async def _decide(self) -> None:
        while True:
            self._board.want(self.state.wanted_queries())
            await tick(self._clock, PERIOD_S)
            self._counts.services = len(self.state.services)
            self._counts.unknown = 0
            if self.state.services or self.state.outdated_problems():
                await self._scale_due()
            self._publish(self._board.answers())

    async def _scale_due(self) -> None:
        found, slices = await self._collect(), TimeSlices(self._clock)
        found, now = replace(found, answers=self._board.answers()), self._clock.monotonic()
        doors = self.state.read_doors(found)
        due: list[Scaling] = []
        problems = self.state.outdated_problems()
        for id in sorted(self.state.services):
            with isolated("autoscaling", id):
                if (scaling := self.state.decide(id, found, now, doors)) is not None:
                    due.append(scaling)
                if (problem := self.state.due_problem(id, now)) is not None:
                    problems.append(problem)
            await slices.yield_if_due()
        for result in await self._term.update_each(write_problem, problems) if problems else ():
            if isinstance(result, NotLeader):
                raise result
        if any(not one.replicas for one in due):
            nodes = door_nodes(self._term.view(), self.state.doors)
            due = without_used(due, idle_times(nodes, await self._ask_doors(nodes)))
        if due:
            await self._write(due)

    async def _write(self, due: list[Scaling]) -> None:
        def scale(tx: Transaction, one: Scaling) -> bool:
            return write_replicas(tx, one, self._quota.check)

        for one, result in zip(due, await self._term.update_each(scale, due), strict=True):
            if isinstance(result, NotLeader):
                raise result
            if isinstance(result, SkepError):
                log.warning("service not scaled, will retry", service=one.service_id, reason=str(result))
            elif result:
                self.state.note_change(one)
                log.info(
                    "service scaled",
                    service=one.service_id,
                    before=one.present,
                    after=one.replicas,
                    reason=one.reason,
                )
