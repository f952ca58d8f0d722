"""What the agent hands to the node, and what it takes back: assignments, statuses, log lines.

The agent implements ``StatusReports`` and calls an ``AssignmentSink`` (the worker) and a ``LogSource`` (the
executor's logs).  Nothing here knows of connections, protobuf or containers.
"""

from collections.abc import AsyncIterator, Mapping
from enum import Enum
from typing import Protocol

import msgspec

from skep.model.ids import ConfigId, NodeId, SecretId, ServiceId, TaskId
from skep.model.meta import Driver
from skep.model.task import AssignedTask, TaskStatus


class SecretFile(msgspec.Struct, frozen=True, kw_only=True):
    """A secret with its data, for the tasks that refer to it.  Never written to a disk."""

    id: SecretId
    name: str = ""
    data: bytes = b""
    templating: Driver | None = None

    def __repr__(self) -> str:
        return f"SecretFile(id={self.id!r}, name={self.name!r}, {len(self.data)} bytes)"


class ConfigFile(msgspec.Struct, frozen=True, kw_only=True):
    """A config with its data, for the tasks that refer to it."""

    id: ConfigId
    name: str = ""
    data: bytes = b""
    templating: Driver | None = None


class AssignmentSet(msgspec.Struct, frozen=True, kw_only=True):
    """One message of assignments.

    ``complete``: this is everything; what is not named here is no longer assigned (the ``removed_*`` are
    empty then).  Otherwise it is a difference to what was assigned before: named objects are new or replace
    those with the same id.  What a task refers to comes in the same set as the task, or came before.
    """

    complete: bool
    revision: int = 0
    """Revision of the manager's store that this set shows; 0 from managers that do not say (Docker's).  The
    agent never hands over a set whose revision lies before that of an earlier one."""
    tasks: tuple[AssignedTask, ...] = ()
    removed_tasks: tuple[TaskId, ...] = ()
    secrets: tuple[SecretFile, ...] = ()
    removed_secrets: tuple[SecretId, ...] = ()
    configs: tuple[ConfigFile, ...] = ()
    removed_configs: tuple[ConfigId, ...] = ()
    registry_auths: Mapping[TaskId, str] = {}
    """Registry credentials (``X-Registry-Auth``: base64 of JSON) of tasks in ``tasks`` that have some."""


class AssignmentSink(Protocol):
    """Takes assignments and acts on them (``node/worker.py``)."""

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


class LogStream(Enum):
    """Where a line came from; the values are SwarmKit's."""

    STDOUT = 1
    STDERR = 2


class LogQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which lines are wanted.

    A task is meant when it is named by any of ``services``, ``tasks`` and ``nodes``.
    """

    services: tuple[ServiceId, ...] = ()
    tasks: tuple[TaskId, ...] = ()
    nodes: tuple[NodeId, ...] = ()
    follow: bool = False
    """Go on with new lines (and new tasks) until the reader stops."""
    tail: int | None = None
    """Start with the last ``tail`` lines of each task; None: with the first line."""
    since_ns: int = 0
    """Leave out lines before this point (Unix time)."""
    streams: tuple[LogStream, ...] = ()
    """Empty: both."""


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a task's output.  ``data`` keeps its newline."""

    task_id: TaskId
    service_id: ServiceId = ServiceId("")
    node_id: NodeId = NodeId("")
    stream: LogStream = LogStream.STDOUT
    timestamp_ns: int = 0
    data: bytes = b""
    attrs: Mapping[str, str] = {}
    """What the container's log driver was told to add (``--log-opt labels=...``)."""


class LogSource(Protocol):
    """Reads the logs of this node's tasks."""

    def read(self, query: LogQuery) -> AsyncIterator[LogLine]:
        """Lines of all tasks of this node that ``query`` means, each task's in their order.

        Ends when everything is read, or with ``follow`` only when the iterator is closed.
        """
