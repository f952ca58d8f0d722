"""Gathering the lines of a node's tasks."""

from collections.abc import AsyncGenerator, Sequence
from typing import cast

from skep.agent.task_logs import TaskLogs
from skep.aio.clock import SystemClock
from skep.engine.container import Container, ContainerConfig, LogEntry, LogFilter, Stream
from skep.engine.engine import Engine
from skep.engine.events import Events
from skep.errors import NotFound
from skep.model.ids import ContainerId, TaskId
from skep.model.labels import LABEL_TASK_ID
from skep.model.logs import LogQuery


class SomeUnreadable:
    """Containers of two tasks, one of which is removed, or has lost its log, while it is read."""

    def __init__(self, error: Exception) -> None:
        self.events = Events(SystemClock())
        self._error = error

    def list(self) -> Sequence[Container]:
        config = ContainerConfig(path="/bin/true")
        return [
            Container(
                id=ContainerId(id),
                name=id,
                image="i",
                image_id="i",
                config=config,
                labels={LABEL_TASK_ID: id},
            )
            for id in ("gone", "there")
        ]

    async def log_batches(self, word: str, _wish: LogFilter) -> AsyncGenerator[Sequence[LogEntry], None]:
        if word == "gone":
            raise self._error
        for number in range(3):
            yield [LogEntry(stream=Stream.STDOUT, timestamp_ns=number, data=b"%d" % number)]


async def test_a_container_with_unreadable_logs_does_not_end_those_of_others() -> None:
    query = LogQuery(tasks=(TaskId("gone"), TaskId("there")))
    for error in (NotFound("No such container: gone"), FileNotFoundError("log")):
        logs = TaskLogs(cast("Engine", SomeUnreadable(error)))
        assert [line.data async for lines in logs.read(query) for line in lines] == [b"0", b"1", b"2"]
