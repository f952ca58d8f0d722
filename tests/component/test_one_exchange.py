"""A tunnel's connection to a node's containers is for one request, whatever is sent behind it."""

import asyncio
from contextlib import suppress
from typing import Any, cast

import pytest

from skep.aio.clock import SystemClock
from skep.api.http.connection import Connection
from skep.errors import NotFound
from skep.model.options.labels import LABEL_TASK_ID
from skep.node.container_access import TaskContainers
from skep.node.events import NodeEvents
from skep.wire import skep_pb2 as skep

OWN, OTHER = "a" * 64, "b" * 64


class OneContainer:
    """As much of an engine as a request for a container needs before it fails."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.execs = self
        self.id = OWN
        self.labels = {LABEL_TASK_ID: "t1"}

    def get(self, word: str) -> "OneContainer":
        if word != OWN:
            self.asked.append(word)
            raise NotFound(f"No such container: {word}")
        return self

    def create(self, word: str, _config: object, _console_size: object = None) -> str:
        self.asked.append(word)
        return "e1"


def create_exec(container: str) -> bytes:
    """A request that does not upgrade, though its head says so."""
    body = b'{"Cmd":["id"]}'
    return (
        f"POST /containers/{container}/exec HTTP/1.1\r\nHost: node\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


async def received(connection: Connection) -> bytes:
    """All until the node closes."""
    content = b""
    async with asyncio.timeout(10):
        while data := await connection.read():
            content += data
    return content


@pytest.mark.parametrize("is_ahead", [True, False])
async def test_a_second_request_is_not_answered(is_ahead):
    engine = OneContainer()
    access = TaskContainers(engine, NodeEvents(SystemClock()), cast("Any", None))
    async with access.serving():
        head, _, body = create_exec(OWN).partition(b"\r\n\r\n")
        connection = await access.connect(
            skep.TunnelRequest(task_id="t1", container_id=OWN, head=head + b"\r\n\r\n")
        )
        with suppress(ConnectionError):
            await connection.send(body + create_exec(OTHER) * is_ahead)
            if not is_ahead:
                await connection.wait_begun()
                await connection.send(create_exec(OTHER))
        content = await received(connection)
        connection.abort()
    assert content.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in content
    assert engine.asked == [OWN]
