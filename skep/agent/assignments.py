"""What the agent hands to the node, and what it takes back: assignments, statuses, log lines.

The agent implements ``StatusReports`` and calls an ``AssignmentSink`` (the worker) and a ``LogSource`` (the
executor's logs).  Independent of connections, protobuf and containers.
"""

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from skep.model.assignment import AssignmentSet, ConfigFile, SecretFile
from skep.model.ids import TaskId
from skep.model.logs import LogLine, LogQuery, LogStream
from skep.model.task import TaskStatus

__all__ = [
    "AssignmentSet",
    "AssignmentSink",
    "ConfigFile",
    "LogLine",
    "LogQuery",
    "LogSource",
    "LogStream",
    "SecretFile",
    "StatusReports",
]


class AssignmentSink(Protocol):
    """Takes assignments and acts on them (``agent/worker.py``)."""

    async def assign(self, change: AssignmentSet) -> None:
        """Take over ``change``; return when it is accepted, not when its tasks run.  Called one at a time."""

    def statuses(self) -> Mapping[TaskId, TaskStatus]:
        """The present status of every task known here; the agent reports all of them in each new session."""


class StatusReports(Protocol):
    """Takes observed statuses (implemented by the agent, handed to the worker)."""

    def report(self, task_id: TaskId, status: TaskStatus) -> None:
        """Report ``status`` as soon as the line is free.

        Returns at once and may be called without a connection: per task only the latest status is kept.
        """


class LogSource(Protocol):
    """Reads the logs of this node's tasks."""

    def read(self, query: LogQuery) -> AsyncIterator[LogLine]:
        """Lines of all tasks of this node that ``query`` means, each task's in their order.

        Ends when everything is read, or with ``follow`` only when the iterator is closed.
        """
