"""Archives of containers' files on their way to clients."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web

from skep.engine.api import files


async def test_a_client_that_takes_nothing_of_an_archive_is_given_up(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1 << 18)

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await files.send_archive(request, endless(), {}, taken_s=0.2)
        finally:
            ended.set()

    app = web.Application()
    app.router.add_get("/", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "api")).start()
    _, writer = await asyncio.open_unix_connection(str(tmp_path / "api"), limit=1 << 10)
    try:
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(60):
            await ended.wait()
    finally:
        writer.close()
        await runner.cleanup()
