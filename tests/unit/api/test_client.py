"""The client gets back what the server meant."""

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from skep.api.client import Client
from skep.api.server import (
    ApiVersion,
    JsonLines,
    OutputFrames,
    OutputStream,
    Routes,
    application,
    json_answer,
    read_body,
)
from skep.errors import AlreadyExists, InvalidArgument, NotFound, OutOfSequence, SkepError, Unavailable

ERRORS = [NotFound("a"), AlreadyExists("b"), InvalidArgument("c"), Unavailable("d"), OutOfSequence()]


@pytest.fixture
async def client():
    table = Routes()

    @table.get("/_ping")
    async def ping(request: web.Request) -> web.StreamResponse:
        return web.Response(text="OK")

    @table.post("/echo")
    async def echo(request: web.Request) -> web.StreamResponse:
        return json_answer([request.path_qs, (await read_body(request)).decode()], 201)

    @table.get("/errors/{index}")
    async def fail(request: web.Request) -> web.StreamResponse:
        raise ERRORS[int(request.match_info["index"])]

    @table.get("/lines")
    async def lines(request: web.Request) -> web.StreamResponse:
        async with JsonLines(request) as answer:
            for number in range(3):
                await answer.send({"n": number})
        return answer.response

    @table.get("/output")
    async def output(request: web.Request) -> web.StreamResponse:
        async with OutputFrames(request, tty=False, content_type=None) as frames:
            await frames.send(OutputStream.STDOUT, b"out\n")
            await frames.send(OutputStream.STDERR, b"")
        return frames.response

    async with (
        TestServer(application(table, newest=ApiVersion("1.43"))) as server,
        Client.at(f"tcp://{server.host}:{server.port}") as client,
    ):
        yield client


async def test_requests_carry_the_version_both_speak(client):
    assert await client.post("/echo", {"a": 1}, name="web") == ["/v1.43/echo?name=web", '{"a":1}']


@pytest.mark.parametrize("index", range(len(ERRORS)))
async def test_errors_come_back_as_they_were_raised(client, index):
    with pytest.raises(SkepError) as caught:
        await client.get(f"/errors/{index}")
    assert type(caught.value) is type(ERRORS[index])
    assert str(caught.value) == str(ERRORS[index])


async def test_a_stream_of_objects_is_read_one_by_one(client):
    async with client.stream("/lines") as stream:
        assert [line async for line in stream.objects()] == [{"n": 0}, {"n": 1}, {"n": 2}]


async def test_output_is_read_frame_by_frame(client):
    async with client.stream("/output") as stream:
        frames = [frame async for frame in stream.frames()]
    assert frames == [(OutputStream.STDOUT, b"out\n"), (OutputStream.STDERR, b"")]


async def test_nobody_there_is_unavailable(tmp_path):
    async with Client.at(f"unix://{tmp_path}/nobody.sock") as client:
        with pytest.raises(Unavailable, match="does not answer"):
            await client.get("/services")


@pytest.mark.parametrize("host", ["", "nosuch", "ftp://x", "unix://"])
def test_a_strange_address_is_refused(host):
    with pytest.raises(InvalidArgument, match="unable to parse docker host"):
        Client.at(host)
