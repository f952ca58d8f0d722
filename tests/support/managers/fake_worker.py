"""A worker without containers, for tests of a node's session."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import cast

from skep.agent.session.reports import Reports
from skep.agent.session.session_state import SessionState
from skep.aio.clock import SystemClock
from skep.model.assignment import AssignmentSet
from skep.model.logs import LogLine, LogQuery
from skep.model.task import AssignedTask, TaskState, TaskStatus
from skep.model.task_end import TaskEnd
from skep.model.values.ids import TaskId
from skep.model.values.times import SECOND_NS, timestamp
from skep.wire.client import ManagerChannel


def a_session() -> SessionState:
    """Return the state of a node with a session, in which a manager may replace its tasks."""
    state = SessionState(SystemClock())
    state.begin(cast("ManagerChannel", None))  # no call is made
    return state


class FakeWorker:
    """Records its assignments, and sends prepared reports.  Serves as sink and as log source."""

    def __init__(self) -> None:
        self.reports = Reports()
        self.sets: list[AssignmentSet] = []
        self.tasks: dict[TaskId, AssignedTask] = {}
        self.known: dict[TaskId, TaskStatus] = {}
        self.lines: list[LogLine] = []
        self.queries: list[LogQuery] = []
        self.more_lines = asyncio.Event()
        self.closed_logs = 0
        self.ends_its_past = False
        """Whether followers get an empty batch after the existing lines.  Nodes of earlier versions do not send
        one.
        """

    async def assign(self, change: AssignmentSet) -> None:
        self.sets.append(change)
        if change.complete:
            self.tasks.clear()
        self.tasks.update((task.task.id, task) for task in change.tasks)
        for id in change.removed_tasks:
            self.tasks.pop(id, None)
            self.known.pop(id, None)

    def statuses(self) -> Mapping[TaskId, TaskStatus]:
        return dict(self.known)

    def report(self, id: TaskId, state: TaskState, message: str = "", end: TaskEnd | None = None) -> None:
        status = TaskStatus(
            timestamp=timestamp(1_700_000_000 * SECOND_NS), state=state, message=message, end=end
        )
        self.known[id] = status
        self.reports.report(id, status)

    async def read_lines(self, query: LogQuery) -> AsyncIterator[list[LogLine]]:
        self.queries.append(query)
        sent, is_past = 0, self.ends_its_past
        try:
            while True:
                while sent < len(self.lines):
                    sent += 1
                    yield [self.lines[sent - 1]]
                if not query.follow:
                    return
                if is_past:
                    is_past = False
                    yield []
                self.more_lines.clear()
                await self.more_lines.wait()
        finally:
            self.closed_logs += 1
