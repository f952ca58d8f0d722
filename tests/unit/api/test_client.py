"""The client gets back what the server meant."""

import asyncio
import json
import socket
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from skep.aio.clock import SystemClock
from skep.api.client.client import ApiClient
from skep.api.client.raw import RawClient
from skep.api.client.requests import PlainRequests
from skep.api.http.server import (
    ApiVersion,
    JsonLines,
    OutputFrames,
    OutputStream,
    Routes,
    application,
    json_response,
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
        return json_response([request.path_qs, (await read_body(request)).decode()], 201)

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
        ApiClient.at(f"tcp://{server.host}:{server.port}") as client,
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


async def test_a_missing_socket_is_unavailable(tmp_path):
    async with ApiClient.at(f"unix://{tmp_path}/nobody.sock") as client:
        with pytest.raises(Unavailable, match="does not answer"):
            await client.get("/services")


async def test_a_process_beside_this_one_without_a_socket_starts_or_does_not_run(tmp_path):
    async with ApiClient.local(tmp_path / "no.sock", "the manager of this node") as client:
        for request in (client.get("/x"), client.send("GET", "/x")):
            with pytest.raises(
                Unavailable,
                match="manager of this node does not answer: it is starting, or does not run",
            ):
                await request


async def test_a_daemon_that_hangs_is_named(tmp_path):
    path = tmp_path / "hangs.sock"
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(path))
        hanging.listen()
        async with PlainRequests(RawClient(f"unix://{path}")) as client:
            with pytest.raises(Unavailable, match=f"no response from unix://{path} within 0.05 s"):
                await client.request("GET", "/info", timeout_s=0.05)


@pytest.mark.parametrize("host", ["", "nosuch", "ftp://x", "unix://"])
def test_a_strange_address_is_refused(host):
    with pytest.raises(InvalidArgument, match="unable to parse docker host"):
        ApiClient.at(host)


@pytest.fixture
async def local(tmp_path: Path):
    """A client of a process beside this one, and what it serves."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/events":
            return web.Response(body=b'{"a": 1}\n{"b": 2}\n')
        if request.path == "/refused":
            return web.json_response({"message": "not here"}, status=404)
        return web.json_response({"path": request.path_qs, "body": (await request.read()).decode()})

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answer)
    path = tmp_path / "api.sock"
    async with ApiClient.local(path, "the other process") as client:
        assert not client.has_socket
        with pytest.raises(Unavailable, match="the other process does not answer"):
            await client.get("/info")
        async with asyncio.TaskGroup() as group:
            group.create_task(client.wait_listening(SystemClock(), lambda: 0.5, 10.0))
            runner = web.AppRunner(app)
            await runner.setup()
            await web.UnixSite(runner, str(path)).start()
        yield client
        await runner.cleanup()


async def test_requests_to_a_process_beside_this_one_carry_no_version(local):
    assert (await local.get("/info", x="y"))["path"] == "/info?x=y"
    async with local.lines("/events", {}) as lines:
        assert [line async for line in lines] == [b'{"a": 1}\n', b'{"b": 2}\n']


async def test_a_whole_response_is_given_whatever_its_status(local):
    async def pieces():
        yield b"one"
        yield b"two"

    sent = await local.send("POST", "/v1.30/any?x=y", pieces())
    assert (sent.status, sent.content_type) == (200, "application/json; charset=utf-8")
    assert json.loads(sent.body) == {"path": "/v1.30/any?x=y", "body": "onetwo"}
    refused = await local.send("GET", "/refused")
    assert refused.status == 404
    assert isinstance(refused.error(), NotFound)
    assert str(refused.error()) == "not here"


async def test_little_waits_for_a_reader_that_said_so(client):
    async with client.stream("/lines", buffer_bytes=1000) as response:
        assert response._response.content.get_read_buffer_limits() == (1000, 2000)
        assert [line async for line in response.objects()] == [{"n": 0}, {"n": 1}, {"n": 2}]
