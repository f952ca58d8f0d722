"""The dialect every application speaks: versions, headers, errors."""

import asyncio
from io import BytesIO

import pytest
from aiohttp import ClientPayloadError, ClientSession, UnixConnector, web
from aiohttp.test_utils import TestClient, TestServer
from yarl import URL

from skep.api.http.server import (
    ApiVersion,
    Routes,
    api_version,
    application,
    json_list_response,
    json_response,
    read_json,
    runner,
)
from skep.api.http.versions import NEWEST
from skep.errors import AlreadyExists, FailedPrecondition, NotFound, OutOfSequence, Unavailable
from skep.model.service import ServiceSpec

ERRORS = {
    "missing": (NotFound("service web not found"), 404),
    "taken": (AlreadyExists("taken"), 409),
    "stale": (OutOfSequence(), 500),
    "unfit": (FailedPrecondition("no"), 400),
    "away": (Unavailable("later"), 503),
}


@pytest.fixture
async def client():
    table = Routes()

    @table.get("/errors/{name}")
    async def fail(request: web.Request) -> web.StreamResponse:
        if request.match_info["name"] not in ERRORS:
            raise RuntimeError("a bug")
        raise ERRORS[request.match_info["name"]][0]

    @table.post("/services/create")
    async def create(request: web.Request) -> web.StreamResponse:
        return json_response({"ID": (await read_json(request, ServiceSpec)).name}, 201)

    @table.get("/numbers/{count}")
    async def numbers(request: web.Request) -> web.StreamResponse:
        return json_list_response(list(range(int(request.match_info["count"]))))

    @table.get("/broken/{name}")
    async def break_off(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"the beginning\n")
        return await fail(request)

    @table.get("/paths/{name}")
    @table.post("/paths/{name}")
    async def show_path(request: web.Request) -> web.StreamResponse:
        return json_response({"path": request.path, "a": request.query["a"]})

    app = application(table, newest=ApiVersion("1.47"), server="Skep/test (linux)")
    async with TestClient(TestServer(app)) as client:
        yield client


async def test_answers_carry_the_engines_headers_and_end_in_a_newline(client):
    response = await client.post("/v1.41/services/create", data=b'{"Name": "web"}')
    assert response.status == 201
    assert await response.text() == '{"ID":"web"}\n'
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Api-Version"] == "1.47"
    assert response.headers["Ostype"] == "linux"
    assert response.headers["Docker-Experimental"] == "false"
    assert response.headers["Server"] == "Skep/test (linux)"


@pytest.mark.parametrize("name", ["missing", "nosuch"])
async def test_an_answer_that_breaks_off_is_seen_to_be_cut_short(client, name):
    response = await client.get(f"/broken/{name}")
    assert await response.content.readline() == b"the beginning\n"
    with pytest.raises(ClientPayloadError):
        await asyncio.wait_for(response.read(), 5)


@pytest.mark.parametrize("path", ["/nosuch", "/v1.41/nosuch", "/", "/v1.41/numbers/1/2"])
async def test_an_unknown_path_is_a_page_not_found_without_our_headers(client, path):
    response = await client.get(path)
    assert (response.status, await response.json()) == (404, {"message": "page not found"})
    assert "Api-Version" not in response.headers
    assert "Server" not in response.headers


async def test_another_method_of_a_known_path_is_a_page_not_found(client):
    for method in ("HEAD", "DELETE"):
        assert (await client.request(method, "/v1.41/numbers/1")).status == 404


@pytest.mark.parametrize("version", ["1.24", "1.41", "1.47"])
async def test_every_version_from_1_24_to_1_47_is_served(client, version):
    assert await (await client.get(f"/v{version}/numbers/2")).json() == [0, 1]


async def test_every_version_up_to_the_newest_is_served_and_the_next_one_refused():
    """A client without a version gets the newest one, and every response names it."""
    table = Routes()

    @table.get("/version-of-this-request")
    async def show(request: web.Request) -> web.StreamResponse:
        return json_response(str(api_version(request)))

    newest = NEWEST.numbers[1]
    async with TestClient(TestServer(application(table))) as client:
        for minor in range(24, newest + 1):
            response = await client.get(f"/v1.{minor}/version-of-this-request")
            assert (response.status, await response.json()) == (200, f"1.{minor}")
            assert response.headers["Api-Version"] == str(NEWEST)
        assert await (await client.get("/version-of-this-request")).json() == str(NEWEST)
        assert (await client.get(f"/v1.{newest + 1}/version-of-this-request")).status == 400


async def test_a_path_without_a_version_is_served(client):
    assert await (await client.get("/numbers/2")).json() == [0, 1]


async def test_a_newer_version_is_refused(client):
    response = await client.get("/v1.48/numbers/2")
    assert response.status == 400
    message = "client version 1.48 is too new. Maximum supported API version is 1.47"
    assert await response.json() == {"message": message}


async def test_a_version_from_before_json_errors_is_refused_in_plain_text(client):
    response = await client.get("/v1.11/numbers/2")
    assert response.status == 400
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert (await response.text()).startswith(
        "client version 1.11 is too old. Minimum supported API version is 1.24"
    )


@pytest.mark.parametrize("name", ERRORS)
async def test_an_error_becomes_its_status_and_message(client, name):
    error, status = ERRORS[name]
    response = await client.get(f"/errors/{name}")
    assert (response.status, await response.json()) == (status, {"message": str(error)})


async def test_a_bug_is_a_500_without_details(client):
    response = await client.get("/errors/bug")
    assert response.status == 500
    assert "RuntimeError" not in await response.text()
    assert "a bug" not in await response.text()


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 1000])
async def test_lists_of_any_length_are_whole(client, count):
    response = await client.get(f"/numbers/{count}")
    assert await response.json() == list(range(count))
    assert (await response.text()).endswith("]\n")


async def test_a_request_may_name_many_objects(tmp_path):
    """`docker service ps` with hundreds of services sends all their ids in one line."""
    table = Routes()

    @table.get("/length")
    async def length(request: web.Request) -> web.StreamResponse:
        return json_response(len(request.query["filters"]))

    socket = str(tmp_path / "api.sock")
    serves = runner(application(table))
    await serves.setup()
    await web.UnixSite(serves, socket).start()
    async with ClientSession("http://api", connector=UnixConnector(socket)) as session:
        response = await session.get("/length", params={"filters": "x" * 500_000})
        assert await response.json() == 500_000
    await serves.cleanup()


async def test_a_body_over_the_bound_is_refused(client):
    response = await client.post("/services/create", data=BytesIO(b'{"Name": "' + b"x" * 5_000_000 + b'"}'))
    assert response.status == 500
    assert (await response.json())["message"].endswith(
        "received message larger than max (5000012 vs. 4194304)"
    )


@pytest.mark.parametrize(
    "path",
    ["//paths/1", "/paths/1/", "//paths//1//", "/v1.41//paths/1", "/v1.41/paths/1/", "//v1.41/paths/1///"],
)
async def test_doubled_slashes_and_one_at_the_end_change_nothing(client, path):
    def url(path: str) -> URL:  # the client's own takes what follows two slashes for a host
        return URL(f"http://{client.host}:{client.port}{path}?a=//1/", encoded=True)

    for method in ("GET", "POST"):
        body = b"x" if method == "POST" else None
        response = await client.session.request(method, url(path), data=body)
        assert response.status == 200, await response.text()
        assert (await response.json())["path"] in ("/paths/1", "/v1.41/paths/1"), "handlers tell by its end"
        assert (await response.json())["a"] == "//1/"
        assert response.headers["Api-Version"] == "1.47"
    assert (await client.session.delete(url(path))).status == 404
    assert (await client.session.get(url(f"//v9.9/{path}"))).status in (400, 404)


async def test_a_name_is_never_empty(client):
    for path in ("/paths//", "/v1.41/paths//", "/paths"):
        assert (await client.get(path)).status == 404


async def test_options_of_any_path_are_answered_with_nothing(client):
    for path in ("/numbers/1", "/v1.41/nosuch"):
        response = await client.options(path)
        assert (response.status, await response.read()) == (200, b"")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/numbers/1", 200),
        ("/v1.41/numbers/1", 200),
        ("/v1.41/v1.41/numbers/1", 404),
        ("/v1.41numbers/1", 404),
        ("/v1.41/errors", 404),
    ],
)
async def test_a_version_stands_once_before_a_path(client, path: str, status: int):
    assert (await client.get(path)).status == status
    assert (await client.delete(path)).status == 404
