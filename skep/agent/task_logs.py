"""The logs of this node's tasks, for ``docker service logs``.

The container's labels give the task of each line, so tasks that have ended still have their lines.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from functools import partial

import structlog

from skep.aio.groups import errors_as_they_are
from skep.engine.container import Container, LogEntry, LogFilter, Stream
from skep.engine.engine import Engine
from skep.engine.log_drivers.facts import attributes_of
from skep.errors import SkepError, Unimplemented
from skep.model.ids import NodeId, ServiceId, TaskId
from skep.model.labels import LABEL_NODE_ID, LABEL_SERVICE_ID, LABEL_TASK_ID
from skep.model.logs import LogLine, LogQuery, LogStream

log = structlog.get_logger(__name__)

_BATCHES_AHEAD_MAX = 4
"""Read and not yet taken; a slow reader then holds the reading of all its tasks."""
_BATCH_LINES_MAX, _BATCH_BYTES_MAX = 512, 128 << 10
_STREAMS = {LogStream.STDOUT: Stream.STDOUT, LogStream.STDERR: Stream.STDERR}
_BACK = {stream: name for name, stream in _STREAMS.items()}


class TaskLogs:
    """``LogSource`` of the ``oci`` executor."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def read(self, query: LogQuery) -> AsyncIterator[Sequence[LogLine]]:
        """Lines of all tasks of this node that ``query`` means, some at a time, each task's in their order.

        With ``follow`` this ends only when the iterator is closed, and includes tasks that start later.
        """
        lines: asyncio.Queue[Sequence[LogLine] | None] = asyncio.Queue(_BATCHES_AHEAD_MAX)
        async with errors_as_they_are(), asyncio.TaskGroup() as group:
            reading = group.create_task(self._read_all(query, lines))
            try:
                while (batch := await lines.get()) is not None:
                    yield batch
            finally:
                reading.cancel()

    async def _read_all(self, query: LogQuery, lines: "asyncio.Queue[Sequence[LogLine] | None]") -> None:
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
        self,
        container: Container,
        query: LogQuery,
        tail: int | None,
        lines: "asyncio.Queue[Sequence[LogLine] | None]",
    ) -> None:
        """One container's lines.  One that is removed meanwhile, or cannot be read, does not end the others' lines."""
        try:
            await self._read_container(container, query, tail, lines)
        except (SkepError, OSError) as error:
            log.info("log of a container ended", container=container.id, reason=str(error))

    async def _read_container(
        self,
        container: Container,
        query: LogQuery,
        tail: int | None,
        lines: "asyncio.Queue[Sequence[LogLine] | None]",
    ) -> None:
        filter = LogFilter(
            streams=frozenset(_STREAMS[stream] for stream in query.streams or tuple(LogStream)),
            follow=query.follow,
            tail=tail,
            since_ns=query.since_ns,
        )
        new_line = partial(
            LogLine,
            task_id=TaskId(container.labels[LABEL_TASK_ID]),
            service_id=ServiceId(container.labels.get(LABEL_SERVICE_ID, "")),
            node_id=NodeId(container.labels.get(LABEL_NODE_ID, "")),
            attrs=attributes_of(container),
        )
        async with aclosing(self._engine.log_batches(container.id, filter)) as batches:
            async for entries in batches:
                for some in bounded(entries):
                    await lines.put(
                        [
                            new_line(stream=_BACK[stream], timestamp_ns=timestamp_ns, data=data)
                            for timestamp_ns, stream, data in some
                        ]
                    )


def bounded(entries: Sequence[LogEntry]) -> Iterator[Sequence[LogEntry]]:
    """``entries`` in parts that a message may have."""
    start = size = 0
    for index, entry in enumerate(entries):
        if index > start and (index - start >= _BATCH_LINES_MAX or size + len(entry.data) > _BATCH_BYTES_MAX):
            yield entries[start:index]
            start, size = index, 0
        size += len(entry.data)
    if start < len(entries):
        yield entries[start:]


class NoLogs:
    """``LogSource`` of the ``process`` executor: a task's output is a file on its node."""

    def read(self, query: LogQuery) -> AsyncIterator[Sequence[LogLine]]:
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
