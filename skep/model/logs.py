"""Lines of tasks' output, and the question for them."""

from collections.abc import Mapping
from enum import Enum

import msgspec

from skep.model.ids import NodeId, ServiceId, TaskId


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
