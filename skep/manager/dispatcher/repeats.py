"""Reports that tell a task's present state once more in other words, written at the pace that a node is allowed.

A state only moves forward, so what a node may write by moving it is bounded.  What it says *about* a state is not: it
is kept here, per task the latest alone, and written a few at a time.
"""

from collections.abc import Callable, Iterable, Sequence

import structlog

from skep.aio.allowance import Allowance
from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.dispatcher.sessions import LiveSession
from skep.manager.dispatcher.statuses import Report, record_status
from skep.model.ids import NodeId, SessionId, TaskId
from skep.model.task import Task
from skep.store.interface import Store, View

log = structlog.get_logger(__name__)

AT_ONCE = 50
"""Reports of one node that are written at once, whatever they say."""
PER_S = 1.0
"""And then, a second."""
LOOK_S = 1.0


class _Kept:
    """What one session of a node has told too soon."""

    def __init__(self, node_id: NodeId, now: float) -> None:
        self.node_id = node_id
        self.allowance = Allowance(AT_ONCE, PER_S, now)
        self.reports: dict[TaskId, Report] = {}


class Repeats:
    """Keeps what sessions of this manager repeat too often."""

    def __init__(self, store: Store, live: Callable[[NodeId], LiveSession | None], clock: Clock) -> None:
        self._store = store
        self._live = live
        self._clock = clock
        self._kept: dict[SessionId, _Kept] = {}

    def due(self, reports: Iterable[Report]) -> list[Report]:
        """Those of one session that are to be written now; the others are kept, and count as told."""
        view, now = self._store.view(), self._clock.monotonic()
        due: list[Report] = []
        for report in reports:
            kept = self._kept.get(report.session_id)
            if not is_repeated(view, report):
                due.append(report)
                if kept is not None:
                    kept.reports.pop(report.task_id, None)
                continue
            if kept is None:
                kept = self._kept[report.session_id] = _Kept(report.node_id, now)
            if kept.allowance.take(now):
                kept.reports.pop(report.task_id, None)
                due.append(report)
            else:
                kept.reports[report.task_id] = report
        return due

    async def run(self) -> None:
        """Write what was kept, little by little, until cancelled."""
        while True:
            await self._clock.sleep(LOOK_S)
            due = self._taken(self._clock.monotonic())
            results = await self._store.update_each(record_status, due) if due else ()
            failed = [result for result in results if isinstance(result, SkepError)]
            if failed:
                log.debug("repeated reports not written", reports=len(failed), reason=str(failed[0]))

    def _taken(self, now: float) -> Sequence[Report]:
        """What may be written at ``now``; sessions that are over are forgotten."""
        due: list[Report] = []
        for session_id, kept in list(self._kept.items()):
            session = self._live(kept.node_id)
            if session is None or session.id != session_id:
                del self._kept[session_id]
                continue
            while kept.reports and kept.allowance.take(now):
                due.append(kept.reports.pop(next(iter(kept.reports))))
        return due


def is_repeated(view: View, report: Report) -> bool:
    """Whether the task, one of this node, is known to be in this state already."""
    task = view.lookup(Task, report.task_id)
    if task is None or task.node_id != report.node_id or task.status == report.status:
        return False
    return task.status.state is report.status.state and not task.status.state.is_terminal
