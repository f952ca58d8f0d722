"""Raw connections under aiohttp: when the first output is sent."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import docker
import pytest
from aiohttp import web

from skep.api.http.responses import Hijacked
from skep.api.http.server import OutputStream, Routes, application, frame, runner
from skep.engine.api.streams.hijack import hijack


class Server:
    """Responds to every POST with ``hello`` on a raw connection, without a pause between the head and the output."""

    def __init__(self) -> None:
        self.sending = asyncio.Event()

    def routes(self) -> Routes:
        table = Routes()

        @table.post("/exec/{id}/start")
        async def start(request: web.Request) -> web.StreamResponse:
            await request.read()
            async with hijack(request, tty=False) as client:
                self.sending.set()
                await client.send(OutputStream.STDOUT, b"hello")
            return Hijacked()

        return table


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
async def path(tmp_path: Path, server: Server) -> AsyncIterator[Path]:
    serving = runner(application(server.routes()))
    await serving.setup()
    await web.UnixSite(serving, str(tmp_path / "api")).start()
    yield tmp_path / "api"
    await serving.cleanup()


async def test_output_is_sent_when_the_client_has_read_the_head(server: Server, path: Path):
    reader, writer = await asyncio.open_unix_connection(path)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(b"POST /exec/1/start HTTP/1.1\r\nHost: node\r\n\r\n")
    await server.sending.wait()
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert (await reader.read(1 << 16)).endswith(b"\r\n\r\n")
    assert await reader.read(-1) == frame(OutputStream.STDOUT, b"hello")
    writer.close()


async def test_docker_py_gets_the_whole_output(path: Path):
    """It reads the head through a buffer and the output from beneath it: what came with the head would be lost."""
    client = docker.APIClient(f"unix://{path}", version="1.41")
    outputs = await asyncio.to_thread(lambda: [client.exec_start("1") for _ in range(50)])
    assert set(outputs) == {b"hello"}
    client.close()
