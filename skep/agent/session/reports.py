"""Task statuses to be sent to a manager.

Only the latest status of each task is kept, however long the connection is lost.
"""

import asyncio
from collections.abc import Mapping

from skep.model.task import TaskStatus
from skep.model.values.ids import TaskId

BATCH_MAX = 200
"""Statuses per call: below 1 MiB even if each has the maximum size."""


class Reports:
    """Queue of statuses, with at most one per task.  The worker adds statuses and the session takes them."""

    def __init__(self) -> None:
        self._pending: dict[TaskId, TaskStatus] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        """Return how many statuses wait."""
        return len(self._pending)

    def report(self, task_id: TaskId, status: TaskStatus) -> None:
        """Send ``status`` as soon as there is a session.  It replaces an unsent status of the same task."""
        self._pending.pop(task_id, None)  # a task that reports often is queued behind the others
        self._pending[task_id] = status
        self._changed.set()

    def forget(self, task_id: TaskId) -> None:
        """Drop the status of a removed task."""
        self._pending.pop(task_id, None)

    def report_again(self, statuses: Mapping[TaskId, TaskStatus]) -> None:
        """Queue ``statuses`` again at the start of a new session.  Tasks with a newer queued status are skipped."""
        for task_id, status in statuses.items():
            self._pending.setdefault(task_id, status)
        if self._pending:
            self._changed.set()

    async def take(self) -> dict[TaskId, TaskStatus]:
        """Wait for statuses, and return up to ``BATCH_MAX`` of them, oldest first."""
        while not self._pending:
            self._changed.clear()
            await self._changed.wait()
        batch = dict(list(self._pending.items())[:BATCH_MAX])
        for task_id in batch:
            del self._pending[task_id]
        return batch

    def put_back(self, batch: Mapping[TaskId, TaskStatus]) -> None:
        """Queue an undelivered ``batch`` again."""
        self.report_again(batch)
