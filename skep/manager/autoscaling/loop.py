"""Scales services with autoscaling labels by the usage of their tasks (``decision``).  Leader only."""

from collections.abc import Awaitable, Callable, Mapping

import structlog

from skep.aio.clock import Clock, tick
from skep.aio.time_slices import TimeSlices
from skep.errors import SkepError
from skep.manager.autoscaling.decision import PERIOD_S
from skep.manager.autoscaling.state import (
    UNKNOWN,
    AutoscalerState,
    AutoscalingCounts,
    IdleReports,
    Quota,
    Scaling,
    door_nodes,
    idle_times,
    write_replicas,
)
from skep.manager.control_loops.failures import isolated
from skep.manager.control_loops.informer import run_informer
from skep.model.options.autoscaling import TaskUsage
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import TaskId
from skep.store.interface import LoopStore, NotLeader, Transaction

log = structlog.get_logger(__name__)


Collect = Callable[[], Awaitable[Mapping[TaskId, TaskUsage]]]
"""Returns the known usage of tasks, from all managers, within seconds."""
CollectIdle = Callable[[], Awaitable[IdleReports]]
"""Returns the idle times that nodes report, from all managers, within seconds."""


class Autoscaler:
    """Decides about every autoscaled service once per period."""

    def __init__(
        self,
        term: LoopStore,
        clock: Clock,
        collect: Collect,
        collect_idle: CollectIdle,
        quota: Quota,
        counts: AutoscalingCounts,
    ) -> None:
        self._term = term
        self._clock = clock
        self._collect = collect
        self._collect_idle = collect_idle
        self._quota = quota
        self._counts = counts
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

    async def _work(self) -> None:
        while True:
            await tick(self._clock, PERIOD_S)
            self._counts.services = len(self.state.services)
            self._counts.unknown = 0
            if self.state.services:
                await self._scale_due()

    async def _scale_due(self) -> None:
        usages = await self._collect()
        idle = UNKNOWN
        if self.state.may_scale_to_zero():
            reports = await self._collect_idle()
            idle = idle_times(door_nodes(self._term.view()), reports)
        now, slices = self._clock.monotonic(), TimeSlices(self._clock)
        due: list[Scaling] = []
        for id in sorted(self.state.services):
            with isolated("autoscaling", id):
                if (scaling := self.state.decide(id, usages, now, idle)) is not None:
                    due.append(scaling)
            await slices.yield_if_due()
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
