"""The logs of this node's tasks, for ``docker service logs``.

Lines are attributed to tasks by their container's labels, so the lines of ended tasks are found too.  Existing lines
are merged in the order of their times.  A follower then gets new lines as they are written.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from operator import attrgetter
from typing import TypeAlias

import structlog

from skep.aio.groups import errors_as_they_are
from skep.aio.merging import MergeQueue
from skep.engine.containers.container import Container, LogFilter, StandardStream
from skep.engine.engine import Engine
from skep.engine.log_drivers.facts import attributes_of
from skep.errors import SkepError, Unimplemented
from skep.model.logs import LogLine, LogQuery, LogStream
from skep.model.options.labels import LABEL_NODE_ID, LABEL_SERVICE_ID, LABEL_TASK_ID
from skep.model.values.ids import NodeId, ServiceId, TaskId

log = structlog.get_logger(__name__)

_AHEAD_MAX = 512
"""Limit for lines that were read but not taken.  When it is reached, reading pauses for all tasks of the query."""
_BATCH_LINES_MAX, _BATCH_BYTES_MAX = 512, 128 << 10
"""Limits for the lines and bytes of one message.  gRPC allows 4 MiB by default, and one line has up to 16 KiB."""
_STREAMS = {LogStream.STDOUT: StandardStream.STDOUT, LogStream.STDERR: StandardStream.STDERR}
_BACK = {stream: name for name, stream in _STREAMS.items()}


_Lines: TypeAlias = MergeQueue[LogLine]
_FIRST_LOOK = "the containers that there are"
"""Key of a placeholder stream that stays open until each existing container has a stream."""


class TaskLogs:
    """``LogSource`` of the ``oci`` executor."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def read_lines(self, query: LogQuery) -> AsyncIterator[Sequence[LogLine]]:
        """Yield batches of lines from all tasks of this node that match ``query``, in the order of their times.

        With ``follow`` this ends only when the iterator is closed, and includes tasks that start later.  An empty batch
        means that all existing lines were yielded.
        """
        lines: _Lines = MergeQueue(attrgetter("timestamp_ns"), _AHEAD_MAX)
        lines.open(_FIRST_LOOK)
        async with errors_as_they_are(), asyncio.TaskGroup() as group:
            reading = group.create_task(self._read_all(query, lines))
            reading.add_done_callback(lambda _: lines.wake())
            try:
                is_past = True
                while True:
                    while batch := lines.take(_BATCH_LINES_MAX):
                        for some in bounded(batch):
                            yield some
                    if is_past and not lines.is_waiting:
                        is_past = False
                        if query.follow:
                            yield ()
                    if not query.follow and reading.done():
                        break
                    await lines.wait_update()
            finally:
                reading.cancel()

    async def _read_all(self, query: LogQuery, lines: _Lines) -> None:
        with self._engine.events.subscribed() as events:
            # The subscription begins before the first look, so that no start is missed.
            async with asyncio.TaskGroup() as group:
                seen = set()
                for container in self._engine.list():
                    if is_meant(container, query):
                        seen.add(container.id)
                        lines.open(container.id)
                        group.create_task(self._read_one(container, query, query.tail, lines))
                lines.end(_FIRST_LOOK)
                if query.follow:
                    async for event in events:
                        if event.action == "destroy":
                            seen.discard(event.container_id)
                        if event.action != "start" or event.container_id in seen:
                            continue
                        try:
                            container = self._engine.get(event.container_id)
                        except SkepError:
                            continue  # removed again in the meantime
                        if is_meant(container, query):
                            seen.add(container.id)
                            group.create_task(self._read_one(container, query, None, lines))

    async def _read_one(
        self,
        container: Container,
        query: LogQuery,
        tail: int | None,
        lines: _Lines,
    ) -> None:
        """Read one container's lines.  An error about this container does not affect the others."""
        try:
            await self._read_container(container, query, tail, lines)
        except (SkepError, OSError) as error:
            log.info("log of a container ended", container=container.id, reason=str(error))
        finally:
            lines.end(container.id)

    async def _read_container(
        self,
        container: Container,
        query: LogQuery,
        tail: int | None,
        lines: _Lines,
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
                if not entries:
                    lines.end(container.id)
                    continue
                await lines.put(
                    container.id,
                    [
                        new_line(stream=_BACK[stream], timestamp_ns=timestamp_ns, data=data)
                        for timestamp_ns, stream, data in entries
                    ],
                )


def bounded(lines: Sequence[LogLine]) -> Iterator[Sequence[LogLine]]:
    """Yield ``lines`` in parts that fit into a message."""
    start = size = 0
    for index, line in enumerate(lines):
        if index > start and size + len(line.data) > _BATCH_BYTES_MAX:
            yield lines[start:index]
            start, size = index, 0
        size += len(line.data)
    if start < len(lines):
        yield lines[start:]


class NoLogs:
    """``LogSource`` of the ``process`` executor: a task's output is a file on its node."""

    def read_lines(self, query: LogQuery) -> AsyncIterator[Sequence[LogLine]]:
        """Refuse to read.  Raises: Unimplemented."""
        raise Unimplemented(
            "tasks of the process executor have no logs: their output is a file on their node"
        )


def is_meant(container: Container, query: LogQuery) -> bool:
    """Return whether the query names this container's task by task, service or node."""
    labels = container.labels
    if LABEL_TASK_ID not in labels:
        return False
    return (
        labels[LABEL_TASK_ID] in query.tasks
        or labels.get(LABEL_SERVICE_ID) in query.services
        or labels.get(LABEL_NODE_ID) in query.nodes
    )
