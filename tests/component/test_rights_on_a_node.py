"""A node refuses what only administrators may do in a container, whatever a manager has forwarded."""

from contextlib import suppress
from typing import Any, cast

import msgspec
import pytest

from skep.aio.clock import SystemClock
from skep.engine.containers.container import Exec, ExecConfig
from skep.model.options.labels import LABEL_TASK_ID
from skep.node.container_access import TaskContainers
from skep.node.events import NodeEvents
from skep.wire import skep_pb2 as skep
from tests.component.test_one_exchange import OWN, received

EXEC = "e" * 64
REFUSED, CREATED, STARTED = b"HTTP/1.1 403 ", b"HTTP/1.1 201 ", b"HTTP/1.1 200 "


class Execs:
    """As much of an engine's execs as a request needs."""

    def __init__(self, **config: Any) -> None:
        self.created: list[ExecConfig] = []
        self.started: list[str] = []
        self._exec = Exec(id=EXEC, container_id=OWN, config=ExecConfig(command=("sh",), **config))

    def get(self, _id: str) -> Exec:
        return self._exec

    def create(self, _word: str, config: ExecConfig, _console_size: object = None) -> str:
        self.created.append(config)
        return EXEC

    async def start(self, id: str) -> "Execs":
        self.started.append(id)
        return self

    def close(self) -> None:
        pass


class Engine:
    """With one container, of the task t1."""

    def __init__(self, execs: Execs, labels: dict[str, str] | None = None) -> None:
        self.execs = execs
        self.id = OWN
        self.labels = {LABEL_TASK_ID: "t1", **(labels or {})}

    def get(self, _word: str) -> "Engine":
        return self


async def answer(engine: Engine, path: str, body: Any, *, is_admin: bool) -> bytes:
    """The response to a request that a manager has forwarded."""
    access = TaskContainers(cast("Any", engine), NodeEvents(SystemClock()), cast("Any", None))
    data = msgspec.json.encode(body)
    head = f"POST {path} HTTP/1.1\r\nHost: node\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    async with access.serving():
        connection = await access.connect(
            skep.TunnelRequest(task_id="t1", container_id=OWN, head=head, admin=is_admin)
        )
        with suppress(ConnectionError):
            await connection.send(data)
        content = await received(connection)
        connection.abort()
    return content


@pytest.mark.parametrize("version", ["", "/v1.41"])
@pytest.mark.parametrize(
    ("labels", "body", "is_users"),
    [
        ({}, {"Cmd": ["id"], "User": "0"}, True),
        ({}, {"Cmd": ["id"], "Privileged": True}, False),
        ({}, {"Cmd": ["id"], "pRIVILEGED": True}, False),
        ({"skep.exec": "user"}, {"Cmd": ["id"]}, True),
        ({"skep.exec": "user"}, {"Cmd": ["id"], "User": "0"}, False),
        ({"skep.exec": "none"}, {"Cmd": ["id"]}, False),
        ({"skep.exec": "a word of a newer version"}, {"Cmd": ["id"]}, False),
    ],
)
async def test_a_command_that_only_administrators_may_run(labels, body, is_users, version):
    for is_admin in (False, True):
        execs = Execs()
        path = f"{version}/containers/{OWN}/exec"
        content = await answer(Engine(execs, labels), path, body, is_admin=is_admin)
        may = is_admin or is_users
        assert content.startswith(CREATED if may else REFUSED), content
        assert len(execs.created) == may


@pytest.mark.parametrize(
    ("config", "labels", "is_users"),
    [
        ({}, {}, True),
        ({"privileged": True}, {}, False),
        ({"user": "0"}, {}, True),
        ({"user": "0"}, {"skep.exec": "user"}, False),
        ({}, {"skep.exec": "none"}, False),
    ],
)
async def test_a_user_starts_no_command_that_an_administrator_has_created(config, labels, is_users):
    for is_admin in (False, True):
        execs = Execs(**config)
        path = f"/exec/{EXEC}/start"
        content = await answer(Engine(execs, labels), path, {"Detach": True}, is_admin=is_admin)
        may = is_admin or is_users
        assert content.startswith(STARTED if may else REFUSED), content
        assert len(execs.started) == may
