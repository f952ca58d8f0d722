"""``docker search`` against an index of our own."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from skep.api.http.server import application, runner
from skep.engine.api.images import image_routes
from skep.engine.images.registry import searching
from skep.engine.images.registry.endpoints import RegistryPolicy
from skep.engine.images.store import ImageStore
from tests.conftest import SEARCHED
from tests.support.machines.playground_rig import CLIS

RESULTS = [
    {
        "name": f"team/app{number}",
        "description": f"number {number}",
        "star_count": number,
        "is_official": number == 2,
        "is_automated": False,
    }
    for number in range(3)
]


class Index:
    """Responds to searches; a test may give another response."""

    def __init__(self) -> None:
        self.requests: list[web.Request] = []
        self.respond: Callable[[web.Request], Awaitable[web.StreamResponse]] = self._results
        self.address = ""

    async def _results(self, request: web.Request) -> web.StreamResponse:
        if request.path != "/v1/search":
            return web.Response(status=404)
        return web.json_response({"query": request.query["q"], "num_results": 3, "results": RESULTS})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        return await self.respond(request)


@pytest.fixture
async def index() -> AsyncIterator[Index]:
    made = Index()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.answer)
    async with TestServer(app, host="127.0.0.1") as server:
        made.address = f"127.0.0.1:{server.port}"
        yield made


@pytest.fixture
async def client(images: ImageStore) -> AsyncIterator[TestClient]:
    async with TestClient(TestServer(application(image_routes(images, lambda: ())))) as made:
        yield made


async def searched(client: TestClient, **query: str) -> tuple[int, object]:
    async with client.get("/v1.41/images/search", params=query) as response:
        body = await response.json()
        return response.status, body if response.status == 200 else body["message"]


async def test_an_index_is_searched_by_term_limit_and_filters(client: TestClient, index: Index):
    assert await searched(client, term=f"{index.address}/team app") == (200, RESULTS)
    asked = index.requests[-1]
    assert (asked.path, dict(asked.query)) == ("/v1/search", {"q": "team app", "n": "25"})
    assert await searched(client, term=f"{index.address}/app", limit="2") == (200, RESULTS[:2])
    for filters, expected in (
        ({"is-official": ["true"]}, RESULTS[2:]),
        ({"is-official": ["false"]}, RESULTS[:2]),
        ({"is-automated": ["true"]}, []),
        ({"stars": ["1"]}, RESULTS[1:]),
    ):
        found = await searched(client, term=f"{index.address}/app", filters=json.dumps(filters))
        assert found == (200, expected), filters


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ({"limit": "0"}, "limit 0 is outside the range of [1, 100]"),
        ({"limit": "101"}, "limit 101 is outside the range of [1, 100]"),
        ({"limit": "x"}, 'strconv.Atoi: parsing "x": invalid syntax'),
        ({"filters": '{"color": ["red"]}'}, "Invalid filter 'color'"),
        ({"filters": '{"stars": ["many"]}'}, "Invalid filter 'stars=[many]'"),
        ({"filters": '{"is-official": ["maybe"]}'}, "Invalid filter 'is-official=[maybe]'"),
    ],
)
async def test_a_request_that_cannot_be_met_is_refused(
    client: TestClient, index: Index, query: dict[str, str], error: str
):
    assert await searched(client, term=f"{index.address}/app", **query) == (400, error)
    assert index.requests == []


async def test_an_index_that_refuses_is_an_error(client: TestClient, index: Index):
    async def refuse(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    index.respond = refuse
    assert await searched(client, term=f"{index.address}/app") == (500, "Unexpected status code 503")


async def test_an_index_that_sends_no_results_is_an_error(client: TestClient, index: Index):
    async def page(_request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>")

    index.respond = page
    status, message = await searched(client, term=f"{index.address}/app")
    assert (status, str(message).partition(":")[0]) == (500, "error decoding registry search results")


async def test_an_index_that_never_ends_is_an_error(client: TestClient, index: Index):
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b" " * (1 << 16))
        except ConnectionError:
            return response

    index.respond = endless
    status, message = await searched(client, term=f"{index.address}/app")
    assert status == 500
    assert "larger than 4194304 bytes" in str(message)


async def test_an_index_that_is_not_there_is_named_as_docker_names_it(
    client: TestClient, images: ImageStore, monkeypatch: pytest.MonkeyPatch
):
    """Docker Hub's, by a name that does not resolve."""
    monkeypatch.setattr(searching, "_INDEX", "https://index.invalid")
    images.policy = RegistryPolicy(mirrors=("http://127.0.0.1:1",))  # a mirror is no index
    status, message = await searched(client, term="library/nothing")
    assert status == 500
    assert str(message).startswith('Get "https://index.invalid/v1/search?q=nothing&n=25": dial tcp')


@pytest.mark.parametrize("cli", CLIS)
async def test_docker_searches(images: ImageStore, index: Index, cli: str, tmp_path: Path):
    server = runner(application(image_routes(images, lambda: ())))
    await server.setup()
    try:
        await web.UnixSite(server, tmp_path / "api.sock").start()
        process = await asyncio.create_subprocess_exec(
            *(
                cli,
                "--host",
                f"unix://{tmp_path / 'api.sock'}",
                "search",
                "--format",
                "{{.Name}} {{.StarCount}}",
            ),
            *("--filter", "stars=1", f"{index.address}/app"),
            env={"DOCKER_API_VERSION": "1.41", "HOME": "/nonexistent", "PATH": SEARCHED},
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await asyncio.wait_for(process.communicate(), 60)
    finally:
        await server.cleanup()
    assert sorted(output.decode().splitlines()) == ["team/app1 1", "team/app2 2"]
