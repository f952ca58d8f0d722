"""Logs that `skep top` follows over a lost connection."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

from skep.aio.clock import SystemClock
from skep.api.client.client import ApiClient
from skep.api.http.responses import OutputStream
from skep.top.logs import follow_logs
from tests.support.harness.clocks import on_virtual_time

Line = tuple[str, int, str]
"""Task, seconds of its node's clock, and text."""


class Stream:
    """The lines of one connection, which then ends."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self._lines = lines

    async def frames(self) -> AsyncIterator[tuple[OutputStream, bytes]]:
        for task, second, text in self._lines:
            details = f"com.docker.swarm.task.id={task}"
            stamp = f"2026-01-31T12:00:{second:02}.000000000Z"
            yield OutputStream.STDOUT, f"{stamp} {details} {text}\n".encode()


class Nodes:
    """Two nodes, of which w1's clock is ahead.  Each connection gets the lines since its time, as a manager sends."""

    def __init__(self, *connections: Sequence[Line]) -> None:
        self._connections = list(connections)
        self._written: list[Line] = []
        self.asked: list[str] = []

    async def get(self, path: str) -> Mapping[str, Any]:
        return {"Spec": {"TaskTemplate": {"ContainerSpec": {}}}}

    @asynccontextmanager
    async def stream(self, path: str, *, since: str, **_: str) -> AsyncIterator[Stream]:
        self.asked.append(since)
        self._written += self._connections.pop(0)
        seconds, _, nanoseconds = since.partition(".")
        begin = (int(seconds or 0) % 60, int(nanoseconds or 0))
        yield Stream([one for one in self._written if (one[1], 0) >= begin])


@on_virtual_time
async def test_no_line_of_a_node_whose_clock_is_behind_is_lost_or_repeated() -> None:
    nodes = Nodes(
        [("w2", 10, "a"), ("w1", 30, "b"), ("w2", 12, "c")],
        [("w2", 14, "d"), ("w1", 31, "e"), ("w3", 15, "f")],
        [],
    )
    texts: list[str] = []
    lines = follow_logs(cast("ApiClient", nodes), "service", "web", SystemClock(), lambda: 0.0)
    async with aclosing(lines):
        async for line in lines:
            if line.task:
                texts.append(line.text)
            if len(nodes.asked) == 3:
                break
    assert texts == ["a", "b", "c", "d", "e", "f"]
