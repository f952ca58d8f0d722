"""``skep top`` on a real node: what it follows, what it changes, and the screen of the command itself."""

import asyncio
import os
import pty
import random
import re
import select
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from skep.aio.clock import SystemClock
from skep.api.client.client import ApiClient
from skep.top.actions import image_of, roll_back, scale, set_availability, update_image
from skep.top.snapshot import LinkStatus, Snapshot, states_of
from skep.top.watching import LiveCluster
from tests.support.machines.playground_rig import IDLE, IMAGE, SKEP, TestNode

pytestmark = pytest.mark.timeout(120)


class Seen:
    """The last snapshot, and waiting for one."""

    def __init__(self) -> None:
        self.last = Snapshot()
        self._news = asyncio.Event()

    def publish(self, snapshot: Snapshot) -> None:
        self.last = snapshot
        self._news.set()

    async def until(self, holds: Callable[[Snapshot], object], what: str) -> Snapshot:
        try:
            async with asyncio.timeout(30):
                while not holds(self.last):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            pytest.fail(f"not within 30 s: {what}; {self.last.connection}, {states_of(self.last, 0.0)}")
        return self.last


class Relay:
    """A unix socket before a node's, whose connections can be cut."""

    def __init__(self, path: Path, target: str) -> None:
        self.path, self._target = path, target.removeprefix("unix://")
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, str(self.path))

    async def cut(self) -> None:
        """No connection, and no new ones."""
        assert self._server is not None
        self._server.close()
        self.path.unlink(missing_ok=True)
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        their_reader, their_writer = await asyncio.open_unix_connection(self._target)
        self._writers |= {writer, their_writer}
        with suppress(asyncio.CancelledError):  # at the end of the loop: nobody waits for it
            await asyncio.gather(_copy(reader, their_writer), _copy(their_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
    except OSError:
        pass
    writer.close()


@asynccontextmanager
async def followed(host: str) -> AsyncIterator[tuple[LiveCluster, Seen]]:
    async with ApiClient.at(host) as client:
        cluster, seen = LiveCluster(client, host, SystemClock(), random.random), Seen()
        following = asyncio.create_task(cluster.run(seen.publish))
        try:
            yield cluster, seen
        finally:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following


def availabilities(snapshot: Snapshot) -> list[str]:
    return [one["Spec"]["Availability"] for one in snapshot.nodes.values()]


def running(snapshot: Snapshot, name: str) -> int:
    ids = {id for id, one in snapshot.services.items() if one["Spec"]["Name"] == name}
    return sum(
        task.service_id in ids and task.status.state == "running" and task.desired_state == "running"
        for task in snapshot.tasks.values()
    )


async def test_a_cluster_is_followed_and_changed_over_a_lost_connection(m1: TestNode, tmp_path: Path) -> None:
    relay = Relay(tmp_path / "relay.sock", m1.socket)
    await relay.open()
    async with followed(f"unix://{relay.path}") as (cluster, seen):
        await seen.until(lambda one: one.connection.link is LinkStatus.LIVE, "the lists are loaded")
        create = ("service", "create", "--detach", "--name")
        await asyncio.to_thread(m1.docker, *create, "web", IMAGE, "sh", "-c", "echo begun; exec sleep 600")
        loaded = await seen.until(lambda one: running(one, "web") == 1, "the task is seen running")
        (web,) = (one for one in loaded.services.values() if one["Spec"]["Name"] == "web")

        await cluster.perform(scale(web, "+1"))
        await seen.until(lambda one: running(one, "web") == 2, "both tasks are seen")
        logs = cluster.logs("service", web["ID"])
        line = await anext(logs)
        await logs.aclose()
        assert line.text == "begun"
        assert seen.last.tasks[line.task].service_id == web["ID"]

        await relay.cut()
        lost = await seen.until(lambda one: one.connection.link is LinkStatus.LOST, "the loss is said")
        assert lost.connection.retry_s > 0
        assert running(lost, "web") == 2
        crash = ("--restart-condition", "none", IMAGE, "sh", "-c", "echo broke; exit 3")
        await asyncio.to_thread(m1.docker, *create, "crash", *crash)
        await relay.open()
        await seen.until(lambda one: one.connection.link is LinkStatus.LIVE, "the connection is made again")
        found = await seen.until(
            lambda one: any("exit 3" in row.reason for row in states_of(one, 0.0)), "the reason is shown"
        )
        (crashed,) = (one["ID"] for one in found.services.values() if one["Spec"]["Name"] == "crash")
        details = await cluster.details("service", crashed, "crash")
        assert details[0].startswith("crash: ")
        actions = {(one["Type"], one["Action"]) for one in found.events}
        assert {("service", "create"), ("task", "start"), ("task", "die")} <= actions

        web = seen.last.services[web["ID"]]
        await cluster.perform(update_image(web, f"{IMAGE}.nowhere"))
        await seen.until(lambda one: "nowhere" in image_of(one.services[web["ID"]]), "the update is seen")
        await cluster.perform(roll_back(seen.last.services[web["ID"]]))
        (node,) = seen.last.nodes.values()
        await cluster.perform(set_availability(seen.last, node, "drain"))
        await seen.until(lambda one: availabilities(one) == ["drain"], "the drain is seen")
        assert running(seen.last, "web") == 2, "no other node can take them"
        (node,) = seen.last.nodes.values()
        await cluster.perform(set_availability(seen.last, node, "active"))
        await seen.until(lambda one: availabilities(one) == ["active"], "the node takes tasks again")
        assert running(seen.last, "web") == 2


def test_the_command_draws_itself_and_leaves_by_a_key(m1: TestNode) -> None:
    m1.docker("service", "create", "--detach", "--name", "drawn", IMAGE, *IDLE)
    mine, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "LINES": "24", "COLUMNS": "80"}
    command = [SKEP, "--host", m1.socket, "top"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown, deadline = b"", time.monotonic() + 60
        while not (b"drawn" in shown and b"healthy" in shown):
            assert time.monotonic() < deadline, shown
            if select.select([mine], [], [], 1)[0]:
                shown += os.read(mine, 65536)
        os.write(mine, b"q")
        while process.poll() is None:
            assert time.monotonic() < deadline, shown
            if select.select([mine], [], [], 0.1)[0]:
                try:
                    shown += os.read(mine, 65536)
                except OSError:
                    break
        assert process.wait(30) == 0
    os.close(mine)
    assert re.search(rb"\x1b\[\?1049l", shown), "the terminal is as it was"


def test_without_a_terminal_it_says_what_to_use_instead(m1: TestNode) -> None:
    command = [SKEP, "--host", m1.socket, "top"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stderr) == (
        1,
        "Error: skep top needs a terminal. Run skep status to print the state of the cluster once.\n",
    )
