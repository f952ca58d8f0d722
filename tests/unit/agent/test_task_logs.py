"""Gathering the lines of a node's tasks."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import cast

from msgspec.structs import replace

from skep.agent.tasks.task_logs import TaskLogs
from skep.aio.clock import SystemClock
from skep.engine.containers.container import Container, ContainerConfig, LogEntry, LogFilter, StandardStream
from skep.engine.engine import Engine
from skep.engine.events import Events
from skep.errors import NotFound
from skep.model.logs import LogQuery
from skep.model.options.labels import LABEL_TASK_ID
from skep.model.values.ids import ContainerId, TaskId


def a_container(id: str) -> Container:
    return Container(
        id=ContainerId(id),
        name=id,
        image="i",
        image_id="i",
        config=ContainerConfig(path="/bin/true"),
        labels={LABEL_TASK_ID: id},
    )


class SomeUnreadable:
    """Containers of two tasks, one of which is removed, or has lost its log, while it is read."""

    def __init__(self, error: Exception) -> None:
        self.events = Events(SystemClock())
        self._error = error

    def list(self) -> Sequence[Container]:
        return [a_container(id) for id in ("gone", "there")]

    async def log_batches(self, word: str, _filter: LogFilter) -> AsyncGenerator[Sequence[LogEntry], None]:
        if word == "gone":
            raise self._error
        for number in range(3):
            yield [LogEntry(stream=StandardStream.STDOUT, timestamp_ns=number, data=b"%d" % number)]


async def test_a_container_with_unreadable_logs_does_not_end_those_of_others() -> None:
    query = LogQuery(tasks=(TaskId("gone"), TaskId("there")))
    for error in (NotFound("No such container: gone"), FileNotFoundError("log")):
        logs = TaskLogs(cast("Engine", SomeUnreadable(error)))
        assert [line.data async for lines in logs.read_lines(query) for line in lines] == [b"0", b"1", b"2"]


class Written:
    """Containers of tasks, each with a log that was written a while ago."""

    def __init__(self, logs: Mapping[str, Sequence[int]]) -> None:
        self.events = Events(SystemClock())
        self._logs = logs
        self.more = asyncio.Event()

    def list(self) -> Sequence[Container]:
        return [a_container(id) for id in self._logs]

    async def log_batches(self, word: str, filter: LogFilter) -> AsyncGenerator[Sequence[LogEntry], None]:
        for stamp in self._logs[word]:
            yield [LogEntry(stream=StandardStream.STDOUT, timestamp_ns=stamp, data=b"%d" % stamp)]
            await asyncio.sleep(0)
        if filter.follow:
            yield []
            await self.more.wait()
            yield [LogEntry(stream=StandardStream.STDOUT, timestamp_ns=1000, data=word.encode())]


async def test_the_lines_of_a_nodes_tasks_come_in_the_order_of_their_times() -> None:
    engine = Written({"a": range(0, 300, 3), "empty": (), "b": range(1, 300, 3), "c": range(2, 300, 3)})
    query = LogQuery(tasks=tuple(TaskId(id) for id in ("a", "b", "c", "empty")))
    lines = [line async for batch in TaskLogs(cast("Engine", engine)).read_lines(query) for line in batch]
    assert [line.timestamp_ns for line in lines] == list(range(300))
    follow = TaskLogs(cast("Engine", engine)).read_lines(replace(query, follow=True))
    past = list[int]()
    async with asyncio.timeout(10):
        while batch := await anext(follow):
            past += [line.timestamp_ns for line in batch]
        assert past == list(range(300)), "an empty batch says that what there was has come"
        engine.more.set()
        now = set[bytes]()
        while len(now) < 4:
            now |= {line.data for line in await anext(follow)}
    await follow.aclose()  # type: ignore[attr-defined]


class Starting(Written):
    """Containers that are started, and removed, while their service is followed."""

    def list(self) -> Sequence[Container]:
        return []

    def get(self, word: str) -> Container:
        return a_container(word)


async def test_a_follower_keeps_nothing_of_containers_that_were_removed() -> None:
    """Seen from outside: one that started again after its removal is new, and one that started twice is not."""
    engine = Starting({"a": (1,)})
    query = LogQuery(tasks=(TaskId("a"),), follow=True)
    follow = TaskLogs(cast("Engine", engine)).read_lines(query)
    lines = list[bytes]()
    async with asyncio.timeout(10):
        assert await anext(follow) == ()
        for actions in (("start", "start"), ("destroy", "start"), ("start",)):
            for action in actions:
                engine.events.publish(action, a_container("a"))
            for _ in range(50):
                await asyncio.sleep(0)
        engine.more.set()
        while lines.count(b"a") < 2:
            lines += [line.data for line in await anext(follow)]
    assert lines == [b"1", b"1", b"a", b"a"]
    await follow.aclose()  # type: ignore[attr-defined]
