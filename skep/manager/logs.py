"""What a reader of logs asks for and gets, between the routes and whoever collects the lines."""

from collections.abc import Mapping
from typing import Literal

import msgspec

from skep.model.ids import NodeId, ServiceId, TaskId

StreamName = Literal["stdout", "stderr"]


class LogWish(msgspec.Struct, frozen=True, kw_only=True):
    """Which lines are wanted: those of any task named by ``services`` or ``tasks``."""

    services: tuple[ServiceId, ...] = ()
    tasks: tuple[TaskId, ...] = ()
    streams: tuple[StreamName, ...] = ("stdout", "stderr")
    follow: bool = False
    tail: int | None = None
    """Only the last ``tail`` lines of each task; None: all."""
    since_ns: int = 0
    """Unix nanoseconds; lines before are left out."""


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One line, newline included.  ``attrs``: what the node's log driver adds."""

    node_id: NodeId
    service_id: ServiceId
    task_id: TaskId
    stream: StreamName
    timestamp_ns: int
    data: bytes
    attrs: Mapping[str, str] = {}
