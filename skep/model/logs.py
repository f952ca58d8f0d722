"""Lines of tasks' output, and the options of a request for them."""

from collections.abc import Mapping
from enum import Enum

import msgspec

from skep.model.values.ids import NodeId, ServiceId, TaskId


class LogStream(Enum):
    """The stream of a line.  The values are the same as in SwarmKit."""

    STDOUT = 1
    STDERR = 2


class LogQuery(msgspec.Struct, frozen=True, kw_only=True):
    """A request for lines of the tasks that are named by any of ``services``, ``tasks`` and ``nodes``."""

    services: tuple[ServiceId, ...] = ()
    tasks: tuple[TaskId, ...] = ()
    nodes: tuple[NodeId, ...] = ()
    follow: bool = False
    """Continue with new lines (and new tasks) until the reader stops."""
    tail: int | None = None
    """Begin with the last ``tail`` lines of each task, or with the first line if it is None."""
    since_ns: int = 0
    """Omit lines before this time (Unix time)."""
    streams: tuple[LogStream, ...] = ()
    """Requested streams, or empty for both."""


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a task's output.  ``data`` keeps its newline."""

    task_id: TaskId
    service_id: ServiceId = ServiceId("")
    node_id: NodeId = NodeId("")
    stream: LogStream = LogStream.STDOUT
    timestamp_ns: int = 0
    data: bytes = b""
    attrs: Mapping[str, str] = {}
    """Attributes that the log driver adds (``--log-opt labels=...``)."""
