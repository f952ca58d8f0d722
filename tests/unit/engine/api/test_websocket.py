"""Which requests may open a WebSocket."""

import pytest
from aiohttp import WSServerHandshakeError, web
from aiohttp.test_utils import TestClient, TestServer

from skep.api.server import Routes, application
from skep.engine.api.websocket import check_handshake, opened


@pytest.fixture
async def client():
    """By TCP, as browsers connect."""
    table = Routes()

    @table.get("/ws")
    async def echo(request: web.Request) -> web.StreamResponse:
        check_handshake(request)
        async with opened(request) as (connection, response):
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


async def test_a_request_without_a_handshake_is_refused(client):
    for headers in ({}, {"Connection": "Upgrade", "Upgrade": "tcp"}):
        response = await client.get("/v1.47/ws", headers=headers)
        assert response.status == 400
        assert (await response.json())["message"].startswith("not websocket protocol")
