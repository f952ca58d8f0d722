"""Uploads of docker 20.10, which come in a request beside the build's: a pair meets, and nobody waits for ever."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from skep.api.http.server import application
from skep.engine.buildkit import routes
from skep.engine.buildkit.uploads import UPLOADS_MAX, Uploads
from skep.errors import AlreadyExists, InvalidArgument, ResourceExhausted, Unavailable


async def two_pieces() -> AsyncIterator[bytes]:
    yield b"one"
    yield b"two"


async def read(offers: Uploads, id: str) -> bytes:
    async with offers.take(id) as pieces:
        return b"".join([piece async for piece in pieces])


@pytest.mark.parametrize("is_build_first", [True, False])
async def test_an_upload_and_its_build_meet(is_build_first: bool) -> None:
    offers = Uploads()
    work = [read(offers, "a"), offers.offer("a", two_pieces())]
    async with asyncio.timeout(30):
        found = await asyncio.gather(*(work if is_build_first else reversed(work)))
    assert set(found) == {None, b"onetwo"}
    assert offers.meetings == {}


async def test_one_without_the_other_ends() -> None:
    offers = Uploads(wait_s=0.05)
    with pytest.raises(InvalidArgument, match="the context of build a was not uploaded"):
        await read(offers, "a")
    with pytest.raises(Unavailable, match="no build takes the context of a"):
        await offers.offer("a", two_pieces())
    assert offers.meetings == {}


async def test_an_upload_ends_with_its_build() -> None:
    """A build that fails before it reads the context."""
    offers = Uploads()
    offering = asyncio.create_task(offers.offer("a", two_pieces()))
    await asyncio.sleep(0)
    with pytest.raises(AlreadyExists):
        await offers.offer("a", two_pieces())
    offers.end("a")
    async with asyncio.timeout(30):
        await offering


async def test_uploads_are_bounded() -> None:
    offers = Uploads()
    waiting = [asyncio.create_task(offers.offer(f"{number}", two_pieces())) for number in range(UPLOADS_MAX)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted):
        await offers.offer("more", two_pieces())
    for one in waiting:
        one.cancel()
    await asyncio.wait(waiting)
    assert offers.meetings == {}


async def test_an_upload_that_breaks_off_is_an_error_of_the_build(tmp_path: Path) -> None:
    kit: Any = SimpleNamespace(uploads=Uploads())
    app = application([web.post("/build", routes.handlers(kit)["/build"])])
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "api")).start()
    taken = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield b"half of it"
        await taken.wait()
        raise OSError("the client fails")

    async def upload() -> None:
        connector = aiohttp.UnixConnector(str(tmp_path / "api"))
        url = "http://d/v1.41/build?version=2&buildid=upload-request:a"
        with suppress(aiohttp.ClientError, OSError):
            async with aiohttp.ClientSession(connector=connector) as session, session.post(url, data=half()):
                pass

    uploading = asyncio.create_task(upload())

    async def build() -> None:
        async with asyncio.timeout(30), kit.uploads.take("a") as pieces:
            async for piece in pieces:
                assert piece == b"half of it"
                taken.set()

    with pytest.raises(Unavailable, match="ended the upload of the build context early"):
        await build()
    await uploading
    await runner.cleanup()
