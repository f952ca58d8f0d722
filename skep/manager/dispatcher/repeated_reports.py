"""Reports that repeat a task's state with other details, written at a limited rate per node.

A state only moves forward, so the number of writes that change it is bounded.  Its details are not: the latest report
of each task is kept here, and a few are written at a time.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence

import structlog

from skep.aio.clock import Clock, tick
from skep.aio.token_bucket import TokenBucket
from skep.errors import SkepError
from skep.manager.dispatcher.node_sessions.sessions import LiveSession
from skep.manager.dispatcher.statuses import StatusReport, record_status
from skep.model.task import Task
from skep.model.values.ids import NodeId, SessionId, TaskId
from skep.store.interface import Store, View

log = structlog.get_logger(__name__)

AT_ONCE = 50
"""Reports of one node that are written without delay."""
PER_S = 1.0
"""Rate of more reports, per second."""
CHECK_S = 1.0
"""Seconds between writes of delayed reports."""


class _Delayed:
    """The delayed reports of one session."""

    def __init__(self, node_id: NodeId, now: float) -> None:
        self.node_id = node_id
        self.allowance = TokenBucket(AT_ONCE, PER_S, now)
        self.reports: dict[TaskId, StatusReport] = {}


class RepeatedReports:
    """Delays reports of this manager's sessions that repeat a state too often."""

    def __init__(self, store: Store, live: Callable[[NodeId], LiveSession | None], clock: Clock) -> None:
        self._store = store
        self._live = live
        self._clock = clock
        self.delayed: dict[SessionId, _Delayed] = {}
        self._has_delayed = asyncio.Event()

    def due(self, reports: Iterable[StatusReport]) -> list[StatusReport]:
        """Return the reports of one session to write now.  The others are kept, and acknowledged."""
        view, now = self._store.view(), self._clock.monotonic()
        due: list[StatusReport] = []
        for report in reports:
            delayed = self.delayed.get(report.session_id)
            if not is_repeated(view, report):
                due.append(report)
                if delayed is not None:
                    delayed.reports.pop(report.task_id, None)
                continue
            if delayed is None:
                delayed = self.delayed[report.session_id] = _Delayed(report.node_id, now)
                self._has_delayed.set()
            if delayed.allowance.take(now):
                delayed.reports.pop(report.task_id, None)
                due.append(report)
            else:
                delayed.reports[report.task_id] = report
        return due

    async def run(self) -> None:
        """Write delayed reports at the allowed rate, until cancelled."""
        while True:
            if not self.delayed:
                self._has_delayed.clear()
            await self._has_delayed.wait()
            await tick(self._clock, CHECK_S)
            due = self._allowed(self._clock.monotonic())
            results = await self._store.update_each(record_status, due) if due else ()
            failed = [result for result in results if isinstance(result, SkepError)]
            if failed:
                log.debug("repeated reports not written", reports=len(failed), reason=str(failed[0]))

    def _allowed(self, now: float) -> Sequence[StatusReport]:
        """Return the reports that may be written at ``now``, and drop sessions that have ended."""
        due: list[StatusReport] = []
        for session_id, delayed in list(self.delayed.items()):
            session = self._live(delayed.node_id)
            if session is None or session.id != session_id:
                del self.delayed[session_id]
                continue
            while delayed.reports and delayed.allowance.take(now):
                due.append(delayed.reports.pop(next(iter(delayed.reports))))
        return due


def is_repeated(view: View, report: StatusReport) -> bool:
    """Whether the task, which must be the node's, is already in this state."""
    task = view.lookup(Task, report.task_id)
    if task is None or task.node_id != report.node_id or task.status == report.status:
        return False
    return task.status.state is report.status.state and not task.status.state.is_terminal
