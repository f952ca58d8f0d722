"""Which requests may open a WebSocket."""

import asyncio
import socket

import pytest
from aiohttp import WSServerHandshakeError, web
from aiohttp.test_utils import TestClient, TestServer

from skep.api.http.server import Routes, application
from skep.engine.api.streams.websocket import check_handshake, open_websocket
from skep.errors import PermissionDenied


@pytest.fixture
async def client():
    """By TCP, as browsers connect."""
    table = Routes()

    @table.get("/ws")
    async def echo(request: web.Request) -> web.StreamResponse:
        check_handshake(request)
        async with open_websocket(request) as (connection, response):
            await connection.send(1, await connection.read())
        return response

    async with TestClient(TestServer(application(table))) as client:
        yield client


async def test_a_page_of_another_host_may_not(client):
    own = f"http://{client.host}:{client.port}"
    for headers in ({}, {"Origin": own}):
        async with client.ws_connect("/v1.47/ws", headers=headers) as web_socket:
            await web_socket.send_str("hello")
            assert (await web_socket.receive()).data == b"hello"
    for origin in ("https://evil.example", "null", f"{own}0"):
        with pytest.raises(WSServerHandshakeError) as raised:
            await client.ws_connect("/v1.47/ws", headers={"Origin": origin})
        assert raised.value.status == 403


@pytest.mark.parametrize(
    ("origin", "answer"),
    [
        ("https://evil.example", "refused"),
        ("http://localhost:8000", "refused"),
        ("http://node:2376", "allowed"),
        ("http://localhost", "allowed"),  # clients of Unix sockets, as those of moby's tests
        ("", "allowed"),
    ],
)
async def test_the_origin_counts_on_sockets_of_the_machine(origin: str, answer: str) -> None:
    """A front passes the connections of TCP clients on by such sockets, and clients forward the API's socket."""

    async def handshake(request: web.Request) -> web.StreamResponse:
        try:
            check_handshake(request)
        except PermissionDenied:
            return web.Response(text="refused")
        return web.Response(text="allowed")

    served = web.Application()
    served.router.add_get("/ws", handshake)
    runner = web.AppRunner(served)
    await runner.setup()
    assert runner.server is not None
    ours, theirs = socket.socketpair()
    await asyncio.get_running_loop().connect_accepted_socket(runner.server, theirs)
    reader, writer = await asyncio.open_connection(sock=ours)
    given = f"Origin: {origin}\r\n" if origin else ""
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    writer.write(f"GET /ws HTTP/1.1\r\nHost: node:2376\r\n{given}{upgrade}{key}\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    assert (await reader.readexactly(7)).decode() == answer
    writer.close()
    await runner.cleanup()


async def test_a_request_without_a_handshake_is_refused(client):
    for headers in ({}, {"Connection": "Upgrade", "Upgrade": "tcp"}):
        response = await client.get("/v1.47/ws", headers=headers)
        assert response.status == 400
        assert (await response.json())["message"].startswith("not websocket protocol")
