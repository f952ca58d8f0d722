"""``skep ui`` on a real node: what a page sees, changes, and runs through it."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from tests.support.clients.dashboard_rig import skep_ui
from tests.support.machines.playground_rig import IDLE, IMAGE, TestNode

pytestmark = pytest.mark.timeout(120)


class Page:
    """What a browser does with the address that the command prints."""

    def __init__(self, session: aiohttp.ClientSession, base: str) -> None:
        self.session = session
        self.base = base
        self.origin = {"Origin": "/".join(base.split("/")[:3])}

    async def get(self, path: str) -> Any:
        async with self.session.get(f"{self.base}{path}") as response:
            assert response.status == 200, await response.text()
            return await response.json()

    async def post(self, path: str, body: Any) -> None:
        async with self.session.post(f"{self.base}{path}", json=body, headers=self.origin) as response:
            assert response.status == 200, await response.text()

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        """The names of server-sent events and their data."""
        name = ""
        async with self.session.get(f"{self.base}/skep/view/stream") as response:
            async for line in response.content:
                if line.startswith(b"event: "):
                    name = line[7:].decode().strip()
                elif line.startswith(b"data: "):
                    yield name, json.loads(line[6:])

    async def until_service(self, events: AsyncIterator[tuple[str, Any]], name: str, running: int) -> Any:
        async for kind, data in events:
            services = data["services"] if kind == "snapshot" else data["set"].get("services", [])
            for one in services:
                if one["name"] == name and one["running"] == running and one["state"] == "healthy":
                    return one
        raise AssertionError("the stream has ended")


@asynccontextmanager
async def a_page(node: TestNode) -> AsyncIterator[Page]:
    jar = aiohttp.CookieJar(unsafe=True)  # 127.0.0.1 is no name
    async with skep_ui(node.socket) as address, aiohttp.ClientSession(cookie_jar=jar) as session:
        async with session.get(address) as response:
            content = await response.text()
        path = content.partition("url=")[2].partition("/ui/")[0]
        yield Page(session, address.partition("/login/")[0] + path)


async def until(socket: aiohttp.ClientWebSocketResponse, expected: bytes) -> None:
    shown = b""
    while expected not in shown:
        message = await asyncio.wait_for(socket.receive(), 30)
        assert message.type is aiohttp.WSMsgType.BINARY, message
        shown += message.data


async def test_a_page_sees_a_service_scales_it_and_has_a_terminal_in_its_task(m1: TestNode) -> None:
    create = ("service", "create", "--detach", "--name", "seen", IMAGE, *IDLE)
    await asyncio.to_thread(m1.docker, *create)
    async with a_page(m1) as page:
        async with page.session.get(f"{page.base}/ui/") as response:
            assert response.content_type == "text/html"
        events = page.events()
        async with asyncio.timeout(60):
            row = await page.until_service(events, "seen", 1)
        service = await page.get(f"/services/{row['id']}")
        spec = {**service["Spec"], "Mode": {"Replicated": {"Replicas": 2}}}
        await page.post(f"/services/{row['id']}/update?version={row['version']}", spec)
        async with asyncio.timeout(60):
            assert (await page.until_service(events, "seen", 2))["desired"] == 2
        await events.aclose()  # type: ignore[attr-defined]

        tasks = [one for one in (await page.get("/skep/view"))["tasks"] if one["service"] == row["id"]]
        path = f"{page.base.replace('http:', 'ws:')}/skep/ui/exec?task={tasks[0]['id']}&rows=33&columns=101"
        async with page.session.ws_connect(path, headers=page.origin) as terminal:
            await terminal.send_bytes(b"stty size; echo $((6*7))\n")
            await until(terminal, b"33 101\r\n42\r\n")
            await terminal.send_str('{"resize": {"rows": 20, "columns": 60}}')
            await terminal.send_bytes(b"sleep 0.2; stty size\n")
            await until(terminal, b"20 60\r\n")
            await terminal.send_bytes(b"exit 3\n")
            while (message := await terminal.receive()).type is aiohttp.WSMsgType.BINARY:
                pass
            assert json.loads(message.data) == {"exit_code": 3}

        async with page.session.ws_connect(f"{path}&command=cat", headers=page.origin) as terminal:
            await terminal.send_bytes(b"hello\n")
            await until(terminal, b"hello")
        top = f"/tasks/{tasks[0]['id']}/container/top"
        async with asyncio.timeout(30):  # what ran in a terminal ends with it
            while "cat" in await processes(m1, top):  # noqa: ASYNC110 -- nothing announces it
                await asyncio.sleep(0.1)
        async with page.session.ws_connect(
            f"{page.base.replace('http:', 'ws:')}/skep/ui/exec?task=nothing", headers=page.origin
        ) as terminal:
            assert "error" in json.loads((await terminal.receive()).data)


async def processes(node: TestNode, top: str) -> str:
    """The processes in a task's container."""
    connector = aiohttp.UnixConnector(node.socket.removeprefix("unix://"))
    async with (
        aiohttp.ClientSession("http://node", connector=connector) as session,
        session.get(f"/skep{top}") as response,
    ):
        assert response.status == 200
        return await response.text()
