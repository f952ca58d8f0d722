"""Requests of classic builds: what a request that waits costs, and clients that send nothing."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from skep.aio.clock import SystemClock
from skep.aio.slots import Slots
from skep.api.server import application
from skep.engine.api import builds
from skep.engine.build.builder import Builder
from skep.engine.images.store import ImageStore
from tests.support.archives import a_file, a_tar
from tests.support.wire_rig import until

pytestmark = pytest.mark.needs("root")

CONTEXT = a_tar(a_file("Dockerfile", b"FROM scratch\nENV A=1\n"))


class Rig:
    """The routes of builds at a socket; no engine below, so that no step runs."""

    def __init__(self, socket: Path, builder: Builder) -> None:
        self.builder = builder
        self.scratch = builder.images.scratch
        self._socket = socket

    async def post(self, body: bytes | AsyncIterator[bytes]) -> tuple[int, str]:
        connector = aiohttp.UnixConnector(str(self._socket))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post("http://d/v1.41/build", data=body) as response,
        ):
            return response.status, await response.text()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    images = ImageStore(tmp_path / "images")
    await images.open()
    engine: Any = SimpleNamespace(images=images)
    builder = Builder(engine, tmp_path / "builds", SystemClock())
    builder.slots = Slots(1, 1, "builds are at work on this node")
    runner = web.AppRunner(application(builds.build_routes(builder)), handler_cancellation=True)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "api")).start()
    yield Rig(tmp_path / "api", builder)
    await runner.cleanup()


async def test_nothing_of_a_request_is_unpacked_before_its_build_has_a_slot(rig: Rig) -> None:
    async with rig.builder.slots.hold():
        waiting = asyncio.create_task(rig.post(CONTEXT))
        await until(lambda: rig.builder.slots.waiting)
        status, text = await rig.post(CONTEXT)
        assert (status, "1 builds are at work on this node and 1 wait" in text) == (500, True), text
        assert not list(rig.scratch.iterdir())
    status, text = await waiting
    assert (status, "Successfully built" in text) == (200, True), text
    assert not list(rig.scratch.iterdir())


async def test_a_client_that_stops_sending_gives_its_slot_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builds, "_SILENT_S", 0.2)
    ended = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield CONTEXT[:700]
        await ended.wait()

    silent = asyncio.create_task(rig.post(body()))
    await until(lambda: list(rig.scratch.iterdir()))
    status, text = await rig.post(CONTEXT)
    assert (status, "Successfully built" in text) == (200, True), text
    ended.set()
    await asyncio.wait([silent])
    assert not list(rig.scratch.iterdir())


async def test_what_an_interrupted_build_has_left_goes_with_the_next_start(tmp_path: Path) -> None:
    images = ImageStore(tmp_path / "images")
    await images.open()
    for directory in (images.scratch / "context-1", images.contexts / "0123"):
        directory.mkdir(parents=True)
        (directory / "file").write_text("of a client")
    again = ImageStore(tmp_path / "images")
    await again.open()
    await again.settle()
    assert not [path for path in (tmp_path / "images").rglob("*") if path.name == "file"]
