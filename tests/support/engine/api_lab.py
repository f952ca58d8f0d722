"""The routes of one node's containers on a unix socket, used by real clients."""

import asyncio
import io
import json
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from skep.agent.executor.oci import OciExecutor
from skep.aio.clock import SystemClock
from skep.api.http.server import Routes, application, runner
from skep.engine.api.containers import create_routes
from skep.engine.api.routes import engine_routes
from tests.conftest import SEARCHED


class Api:
    """The routes of one node's containers on a unix socket."""

    def __init__(self, socket: Path, session: aiohttp.ClientSession) -> None:
        self.socket = socket
        self._session = session

    async def ask(self, method: str, path: str, body: Any = None, version: str = "1.41") -> tuple[int, Any]:
        async with self._session.request(method, f"http://node/v{version}{path}", json=body) as response:
            content = await response.read()
            is_json = response.content_type == "application/json" and content
            return response.status, json.loads(content) if is_json else content

    async def send(
        self, method: str, path: str, data: Any = None, version: str = "1.41"
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """Send a request with a body of bytes or of chunks.  Return status, body and headers."""
        # aiohttp warns about large bodies of plain bytes.
        body = io.BytesIO(data) if isinstance(data, bytes) else data
        async with self._session.request(method, f"http://node/v{version}{path}", data=body) as response:
            return response.status, await response.read(), dict(response.headers)

    async def hijack(self, path: str, body: Any = None, version: str = "1.41") -> "Raw":
        raw = Raw(*await asyncio.open_unix_connection(self.socket))
        content = json.dumps(body).encode() if body is not None else b""
        raw.writer.write(
            f"POST /v{version}{path} HTTP/1.1\r\nHost: node\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        raw.head = (await raw.reader.readuntil(b"\r\n\r\n")).decode()
        return raw

    def websocket(self, path: str) -> AbstractAsyncContextManager[aiohttp.ClientWebSocketResponse]:
        return self._session.ws_connect(f"http://node{path}")

    async def docker(self, *arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        """Run the docker command, and return its exit code, output and errors."""
        process = await asyncio.create_subprocess_exec(
            *("docker", "-H", f"unix://{self.socket}", *arguments),
            env={
                "DOCKER_API_VERSION": "1.41",
                "HOME": "/nonexistent",
                "PATH": SEARCHED,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        output, errors = await asyncio.wait_for(process.communicate(stdin), 20)
        return process.returncode or 0, output.decode(), errors.decode()


class Raw:
    """A hijacked connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.head = ""

    async def frames(self) -> list[tuple[int, bytes]]:
        """Return all frames until the end as (stream, data), with consecutive chunks of one stream joined."""
        found: list[tuple[int, bytes]] = []
        while head := await self.reader.read(1):
            head += await self.reader.readexactly(7)
            data = await self.reader.readexactly(int.from_bytes(head[4:], "big"))
            if found and found[-1][0] == head[0]:
                found[-1] = (head[0], found[-1][1] + data)
            else:
                found.append((head[0], data))
        return found


@asynccontextmanager
async def serving(directory: Path, executor: OciExecutor) -> AsyncIterator[Api]:
    """Serve the API of the executor's containers on a socket in ``directory``."""
    ping = Routes()

    @ping.head("/_ping")
    async def _(_: web.Request) -> web.StreamResponse:
        return web.Response()

    routes = engine_routes(executor.engine, SystemClock())
    server = runner(application(ping, routes, create_routes(executor.engine)))
    await server.setup()
    await web.UnixSite(server, directory / "api.sock").start()
    connector = aiohttp.UnixConnector(str(directory / "api.sock"))
    try:
        async with aiohttp.ClientSession(connector=connector) as session:
            yield Api(directory / "api.sock", session)
    finally:
        await server.cleanup()
