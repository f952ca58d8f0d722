"""A table of handlers is bound to what they work on."""

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from skep.api.http.server import application
from skep.api.http.tables import RouteTable

table = RouteTable[list[str]]()


@table.get("/words")
async def show(words: list[str], request: web.Request) -> web.StreamResponse:
    return web.json_response(words)


@table.head("/words/{word}")
@table.put("/words/{word}")
async def note(words: list[str], request: web.Request) -> web.StreamResponse:
    words.append(f"{request.method} {request.match_info['word']}")
    return web.Response(status=204)


async def test_handlers_get_what_their_table_was_bound_to() -> None:
    first, second = ["a"], ["b"]
    async with (
        TestClient(TestServer(application(table.bound(first)))) as one,
        TestClient(TestServer(application(table.bound(second)))) as other,
    ):
        assert await (await one.get("/words")).json() == ["a"]
        assert await (await other.get("/v1.41/words")).json() == ["b"]


async def test_one_handler_may_stand_for_several_methods() -> None:
    words: list[str] = []
    async with TestClient(TestServer(application(table.bound(words)))) as client:
        assert (await client.put("/words/x")).status == 204
        assert (await client.head("/words/y")).status == 204
        assert (await client.post("/words/z")).status in (404, 405)
    assert words == ["PUT x", "HEAD y"]
