"""A node's taking part: what it does until its first session, and with it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from skep.aio.clock import SystemClock
from skep.model.ids import ClusterId, NodeId
from skep.model.node import NodeRole
from skep.node.local import LocalNode, Peer
from skep.node.participation import Participation
from skep.paths import Paths


class FakeAgent:
    """Has a session when the test says so."""

    managers: tuple[Peer, ...] = ()

    def __init__(self, role: NodeRole) -> None:
        self.role = role
        self.registered = asyncio.Event()
        self.tries = 0

    async def run(self) -> None:
        await asyncio.Event().wait()

    def try_now(self) -> None:
        self.tries += 1


class FakeProcess:
    """A manager process that never ends."""

    trouble = ""

    async def run(self) -> None:
        await asyncio.Event().wait()

    def dismiss(self) -> None:
        pass

    def reload(self) -> None:
        pass


class FakeParts:
    """Parts of which only agent and manager are real enough to be run."""

    def __init__(self, role: NodeRole) -> None:
        self.the_agent = FakeAgent(role)
        self.stands_by = True

    def manager(self) -> FakeProcess:
        return FakeProcess()

    async def manager_stands_by(self, wanted: bool) -> None:
        self.stands_by = wanted

    def agent(self, *_: object) -> FakeAgent:
        return self.the_agent

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(name)


@asynccontextmanager
async def taking_part(paths: Paths, role: NodeRole) -> AsyncIterator[FakeParts]:
    node = LocalNode(
        node_id=NodeId("n1"),
        cluster_id=ClusterId("c1"),
        is_manager=role is NodeRole.MANAGER,
        listen_addr="0.0.0.0:2377",
        advertise_addr="10.0.0.1:2377",
        local_addr="10.0.0.1",
    )
    parts = FakeParts(role)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        participation = Participation(node, parts, paths, SystemClock())
        running = group.create_task(participation.run())
        yield parts
        running.cancel()


async def until(holds: Callable[[], object]) -> None:
    while not holds():  # noqa: ASYNC110 - files announce nothing
        await asyncio.sleep(0.005)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(tmp_path / "data", tmp_path / "run")
    for directory in (found.data, found.run):
        directory.mkdir()
    return found


async def test_a_manager_that_begins_to_serve_is_asked_for_a_session_at_once(paths: Paths) -> None:
    """And another one in its place, too."""
    async with taking_part(paths, NodeRole.MANAGER) as parts:
        paths.manager_socket.touch()
        await until(lambda: parts.the_agent.tries == 1)
        beside = paths.run / "beside"
        beside.touch()
        beside.rename(paths.manager_socket)
        await until(lambda: parts.the_agent.tries == 2)
        parts.the_agent.registered.set()


async def test_a_worker_has_no_manager_standing_by_once_it_has_a_session(paths: Paths) -> None:
    async with taking_part(paths, NodeRole.WORKER) as parts:
        await asyncio.sleep(0)
        assert parts.stands_by
        parts.the_agent.registered.set()
        await until(lambda: not parts.stands_by)
