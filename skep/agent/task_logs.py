"""The logs of this node's tasks, for ``docker service logs``.

The container's labels give the task of each line, so tasks that have ended still have their lines.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import structlog

from skep.aio.groups import errors_as_they_are
from skep.engine.container import Container, LogFilter, Stream
from skep.engine.engine import Engine
from skep.errors import SkepError, Unimplemented
from skep.model.ids import NodeId, ServiceId, TaskId
from skep.model.labels import LABEL_NODE_ID, LABEL_SERVICE_ID, LABEL_TASK_ID
from skep.model.logs import LogLine, LogQuery, LogStream

log = structlog.get_logger(__name__)

_LINES_AHEAD_MAX = 1000
"""Read and not yet taken; a slow reader then holds the reading of all its tasks."""
_STREAMS = {LogStream.STDOUT: Stream.STDOUT, LogStream.STDERR: Stream.STDERR}
_BACK = {stream: name for name, stream in _STREAMS.items()}


class TaskLogs:
    """``LogSource`` of the ``oci`` executor."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def read(self, query: LogQuery) -> AsyncIterator[LogLine]:
        """Lines of all tasks of this node that ``query`` means, each task's in their order.

        With ``follow`` this ends only when the iterator is closed, and includes tasks that start later.
        """
        lines: asyncio.Queue[LogLine | None] = asyncio.Queue(_LINES_AHEAD_MAX)
        async with errors_as_they_are(), asyncio.TaskGroup() as group:
            reading = group.create_task(self._read_all(query, lines))
            try:
                while (line := await lines.get()) is not None:
                    yield line
            finally:
                reading.cancel()

    async def _read_all(self, query: LogQuery, lines: "asyncio.Queue[LogLine | None]") -> None:
        with self._engine.events.subscribed() as events:  # before the first look: no start falls between
            async with asyncio.TaskGroup() as group:
                seen = set()
                for container in self._engine.list():
                    if is_meant(container, query):
                        seen.add(container.id)
                        group.create_task(self._read_one(container, query, query.tail, lines))
                if query.follow:
                    async for event in events:
                        if event.action != "start" or event.container_id in seen:
                            continue
                        try:
                            container = self._engine.get(event.container_id)
                        except SkepError:
                            continue  # gone again
                        if is_meant(container, query):
                            seen.add(container.id)
                            group.create_task(self._read_one(container, query, None, lines))
        await lines.put(None)

    async def _read_one(
        self, container: Container, query: LogQuery, tail: int | None, lines: "asyncio.Queue[LogLine | None]"
    ) -> None:
        """One container's lines.  One that is removed meanwhile, or cannot be read, does not end the others' lines."""
        try:
            await self._read_container(container, query, tail, lines)
        except (SkepError, OSError) as error:
            log.info("log of a container ended", container=container.id, reason=str(error))

    async def _read_container(
        self, container: Container, query: LogQuery, tail: int | None, lines: "asyncio.Queue[LogLine | None]"
    ) -> None:
        filter = LogFilter(
            streams=frozenset(_STREAMS[stream] for stream in query.streams or tuple(LogStream)),
            follow=query.follow,
            tail=tail,
            since_ns=query.since_ns,
        )
        attributes = attributes_of(container)
        async with aclosing(self._engine.logs(container.id, filter)) as entries:
            async for entry in entries:
                await lines.put(
                    LogLine(
                        task_id=TaskId(container.labels[LABEL_TASK_ID]),
                        service_id=ServiceId(container.labels.get(LABEL_SERVICE_ID, "")),
                        node_id=NodeId(container.labels.get(LABEL_NODE_ID, "")),
                        stream=_BACK[entry.stream],
                        timestamp_ns=entry.timestamp_ns,
                        data=entry.data,
                        attrs=attributes,
                    )
                )


class NoLogs:
    """``LogSource`` of the ``process`` executor: a task's output is a file on its node."""

    def read(self, query: LogQuery) -> AsyncIterator[LogLine]:
        """Raises: Unimplemented."""
        raise Unimplemented(
            "tasks of the process executor have no logs: their output is a file on their node"
        )


def is_meant(container: Container, query: LogQuery) -> bool:
    """Whether the query names this container's task by any of its three ways."""
    labels = container.labels
    if LABEL_TASK_ID not in labels:
        return False
    return (
        labels[LABEL_TASK_ID] in query.tasks
        or labels.get(LABEL_SERVICE_ID) in query.services
        or labels.get(LABEL_NODE_ID) in query.nodes
    )


def attributes_of(container: Container) -> dict[str, str]:
    """What the log options ``labels`` and ``env`` add to each line: values by name, of those there are.

    Source: moby, daemon/logger/loginfo.go (ExtraAttributes).
    """
    options = container.config.log.options
    found = {}
    for name in options.get("labels", "").split(","):
        if name in container.labels:
            found[name] = container.labels[name]
    environment = dict(entry.partition("=")[::2] for entry in container.config.env)
    for name in options.get("env", "").split(","):
        if name in environment:
            found[name] = environment[name]
    return found
