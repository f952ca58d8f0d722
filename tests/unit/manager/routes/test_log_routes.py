"""Streams of logs: frames, details, timestamps, and what went wrong."""

import pytest
from aiohttp.test_utils import TestClient, TestServer

from skep.api.http.responses import OutputStream, frame
from skep.errors import SkepError
from skep.manager.routes import application
from skep.model.logs import LogLine, LogStream
from skep.model.values.ids import NodeId, ServiceId, TaskId
from tests.conformance.manager import CannedLogs, a_manager_api
from tests.conformance.script import service

LINE = LogLine(
    node_id=NodeId("n1"),
    service_id=ServiceId("s1"),
    task_id=TaskId("t1"),
    stream=LogStream.STDERR,
    timestamp_ns=1_700_000_000_500_000_000,
    data=b"hello\n",
    attrs={"a b": "c,d", "com.docker.swarm.task.id": "forged"},
)
CONTEXT = b"a+b=c%2Cd,com.docker.swarm.node.id=n1,com.docker.swarm.service.id=s1,com.docker.swarm.task.id=t1 "


class FailingLogs(CannedLogs):
    async def subscribe(self, query):
        async for line in super().subscribe(query):
            yield line
        raise SkepError("node n2 is not available")


async def read(logs: CannedLogs, query: str, *, version: str = "1.41", tty: bool = False):
    async with a_manager_api(logs) as api, TestClient(TestServer(application(api))) as client:
        spec = service("web", container={"TTY": tty})
        assert (await client.post("/services/create", json=spec)).status == 201
        response = await client.get(f"/v{version}/services/web/logs?{query}")
        return response.headers.get("Content-Type"), await response.read()


async def test_lines_come_in_frames_without_a_content_type():
    type_, body = await read(CannedLogs(LINE), "stdout=1&stderr=1")
    assert body == frame(OutputStream.STDERR, b"hello\n")
    assert type_ in {None, "application/octet-stream"}


@pytest.mark.parametrize(
    ("tty", "expected"),
    [(False, "application/vnd.docker.multiplexed-stream"), (True, "application/vnd.docker.raw-stream")],
)
async def test_since_1_42_the_content_type_says_which_format(tty, expected):
    type_, body = await read(CannedLogs(LINE), "stderr=1", version="1.42", tty=tty)
    assert type_ == expected
    assert body.endswith(b"hello\n")


async def test_a_terminals_output_is_not_framed():
    assert (await read(CannedLogs(LINE), "stderr=1", tty=True))[1] == b"hello\n"


async def test_details_name_where_a_line_comes_from():
    _, body = await read(CannedLogs(LINE), "stderr=1&details=1", tty=True)
    assert body == CONTEXT + b"hello\n"


async def test_timestamps_stand_first_and_are_of_one_width():
    _, body = await read(CannedLogs(LINE), "stderr=1&details=1&timestamps=1", tty=True)
    assert body == b"2023-11-14T22:13:20.500000000Z " + CONTEXT + b"hello\n"


async def test_what_is_asked_for_reaches_the_source():
    logs = CannedLogs()
    await read(logs, "stderr=1&follow=1&tail=5&since=1.5")
    (query,) = logs.asked
    assert (query.streams, query.follow, query.tail) == ((LogStream.STDERR,), True, 5)
    assert query.since_ns == 1_500_000_000
    assert len(query.services) == 1


async def test_what_is_missing_is_said_at_the_end():
    _, body = await read(FailingLogs(LINE), "stderr=1")
    end = frame(OutputStream.SYSTEM, b"Error grabbing logs: node n2 is not available\n")
    assert body == frame(OutputStream.STDERR, b"hello\n") + end
