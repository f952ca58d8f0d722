"""What ``skep ui`` listens with: the dashboard's own page is served, and nothing else that reaches the loopback."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web

from skep.api.client.raw import RawClient
from skep.dashboard.passing import BrowserLimits, is_allowed
from skep.dashboard.relay import Relay

SECRETS = ("token", "key", "cookie", "namename")


class Api:
    """A node's API that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[web.Request] = []
        self.bodies: list[bytes] = []
        self.may_end = asyncio.Event()
        self.now = 0.0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request)
        self.bodies.append(await request.read())
        if request.path == "/services/nothing":
            return web.json_response({"message": "service nothing not found"}, status=404)
        if request.path == "/skep/tasks/nothing/target":
            return web.json_response({"message": "no such task"}, status=404)
        if request.path == "/skep/view/stream":
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(b"id: 1-1\nevent: snapshot\ndata: {}\n\n")
            await self.may_end.wait()
            return response
        return web.json_response({"path": request.path_qs}, headers={"ETag": '"e"', "Set-Cookie": "a=b"})


class Browser:
    """Sends requests to the relay with the headers that a browser gives them."""

    def __init__(self, session: aiohttp.ClientSession, address: str) -> None:
        self.session = session
        self.address = address
        self.origin = address.partition("/login/")[0]
        self.base = f"{self.origin}/key"
        self.cookie = {"Cookie": "skep-ui-namename=cookie"}

    async def status(self, path: str, headers: Mapping[str, str] | None = None, method: str = "GET") -> int:
        sent = self.cookie if headers is None else headers
        async with self.session.request(method, f"{self.base}{path}", headers=sent) as response:
            return response.status


@asynccontextmanager
async def a_dashboard(directory: Path, **limits: float) -> AsyncIterator[tuple[Browser, Api]]:
    api, words = Api(), iter(SECRETS)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    path = directory / "s"
    await web.UnixSite(runner, str(path)).start()
    try:
        async with RawClient(f"unix://{path}") as client:
            given = msgspec.convert(limits, BrowserLimits)
            relay = Relay(client, lambda: next(words), lambda: api.now, given)
            jar = aiohttp.DummyCookieJar()
            async with relay.listening(0) as address, aiohttp.ClientSession(cookie_jar=jar) as session:
                yield Browser(session, address), api
    finally:
        api.may_end.set()
        await runner.cleanup()


async def test_the_address_works_once_and_gives_a_cookie_for_the_page_alone(tmp_path: Path) -> None:
    async with a_dashboard(tmp_path) as (browser, _):
        assert browser.address.endswith("/login/token")
        async with browser.session.get(f"{browser.origin}/login/wrong") as response:
            assert response.status == 401
        async with browser.session.get(browser.address) as response:
            assert response.status == 200
            (cookie,) = response.headers.getall("Set-Cookie")
            assert {"HttpOnly", "Path=/key/", "SameSite=Strict"} <= set(cookie.split("; "))
            assert "skep-ui-namename=cookie" in cookie
            assert "url=/key/ui/" in await response.text()
        async with browser.session.get(browser.address) as response:
            assert response.status == 401
            assert "used" in (await response.json())["message"]
        assert await browser.status("/ui/") == 200


async def test_the_address_is_too_old_after_ten_minutes(tmp_path: Path) -> None:
    async with a_dashboard(tmp_path) as (browser, api):
        api.now = 601
        async with browser.session.get(browser.address) as response:
            assert response.status == 401


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 401),
        ({"Cookie": "skep-ui-namename=other"}, 401),
        ({"Cookie": "skep-ui=cookie"}, 401),
        ({"Cookie": 'skep-ui-namename="cook'}, 401),
        ({"Cookie": "skep-ui-namename=cookie; a=b"}, 200),
        ({"Cookie": "skep-ui-namename=cookie", "Host": "attacker.example"}, 403),
        ({"Cookie": "skep-ui-namename=cookie", "Host": "127.0.0.1"}, 403),
        ({"Cookie": "skep-ui-namename=cookie", "Host": "127.0.0.1:1"}, 403),
        ({"Cookie": "skep-ui-namename=cookie", "Origin": "http://attacker.example"}, 403),
        ({"Cookie": "skep-ui-namename=cookie", "Origin": "null"}, 403),
        ({"Cookie": "skep-ui-namename=cookie", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Cookie": "skep-ui-namename=cookie", "Sec-Fetch-Site": "same-site"}, 403),
        ({"Cookie": "skep-ui-namename=cookie", "Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
async def test_other_pages_and_programs_read_nothing(
    tmp_path: Path, headers: dict[str, str], expected: int
) -> None:
    async with a_dashboard(tmp_path) as (browser, api):
        assert await browser.status("/skep/view", headers) == expected
        assert bool(api.asked) is (expected == 200)


@pytest.mark.parametrize(
    "origin", [None, "null", "http://127.0.0.1:1", "http://attacker.example", "https://OWN"]
)
async def test_a_change_has_to_come_from_the_page_itself(tmp_path: Path, origin: str | None) -> None:
    async with a_dashboard(tmp_path) as (browser, api):
        own = browser.origin.removeprefix("http://")
        headers = dict(browser.cookie)
        if origin is not None:
            headers["Origin"] = origin.replace("OWN", own)
        assert await browser.status("/services/web/update?version=1", headers, "POST") == 403
        headers = {**browser.cookie, "Origin": browser.origin, "Content-Type": "text/plain"}
        async with browser.session.post(
            f"{browser.base}/services/web/update?version=1", headers=headers, data=b"{}"
        ) as response:
            assert response.status == 400
        assert api.asked == []
        headers["Content-Type"] = "application/json"
        async with browser.session.post(
            f"{browser.base}/services/web/update?version=1", headers=headers, data=b'{"Name": "web"}'
        ) as response:
            assert response.status == 200
            assert await response.json() == {"path": "/services/web/update?version=1"}
        assert api.bodies == [b'{"Name": "web"}']


async def test_localhost_is_the_same_host_with_its_own_origin(tmp_path: Path) -> None:
    async with a_dashboard(tmp_path) as (browser, _):
        local = browser.origin.replace("127.0.0.1", "localhost")
        host = {"Host": local.removeprefix("http://")}
        headers = {**browser.cookie, **host, "Origin": local}
        assert await browser.status("/services/web/update?version=1", headers, "POST") == 200
        headers["Origin"] = browser.origin
        assert await browser.status("/services/web/update?version=1", headers, "POST") == 403


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/ui/"),
        ("GET", "/ui/app.js"),
        ("GET", "/skep/view/stream?after=1-2"),
        ("GET", "/v1.43/services/web/logs?follow=1"),
        ("GET", "/tasks?filters=%7B%22service%22%3A%5B%22web%22%5D%7D"),
        ("GET", "/skep/services/web/explain"),
        ("GET", "/skep/door"),
        ("POST", "/nodes/n1/update?version=3"),
        ("POST", "/skep/services/web/update/pause"),
    ],
)
def test_what_the_pages_need_is_allowed(method: str, path: str) -> None:
    assert is_allowed(method, path)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/swarm"),
        ("GET", "/swarm/unlockkey"),
        ("GET", "/v1.43/swarm"),
        ("POST", "/services/create"),
        ("DELETE", "/services/web"),
        ("POST", "/containers/create"),
        ("GET", "/containers/x/archive"),
        ("POST", "/skep/backup"),
        ("POST", "/skep/cluster/rotate-keys"),
        ("POST", "/skep/tasks/t1/container/exec"),
        ("GET", "/skep/tasks/t1/container/archive"),
        ("GET", "/ui/../swarm"),
        ("GET", "/services/../swarm"),
        ("GET", "/services/.."),
        ("POST", "/services/web/update/../../../swarm/leave"),
        ("GET", "//swarm"),
        ("GET", "/services#/swarm"),
        ("HEAD", "/services"),
        ("POST", "/swarm/leave"),
    ],
)
def test_whatever_else_the_api_has_is_refused(method: str, path: str) -> None:
    assert not is_allowed(method, path)


async def test_a_refusal_of_the_api_and_of_the_relay_are_json_for_no_other_page(tmp_path: Path) -> None:
    async with a_dashboard(tmp_path) as (browser, api):
        async with browser.session.get(
            f"{browser.base}/services/nothing", headers=browser.cookie
        ) as response:
            assert response.status == 404
            assert await response.json() == {"message": "service nothing not found"}
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
        async with browser.session.get(f"{browser.base}/swarm", headers=browser.cookie) as response:
            assert response.status == 403
            assert await response.json() == {"message": "the dashboard may not send GET /swarm"}
        sent = {**browser.cookie, "If-None-Match": '"e"', "Last-Event-ID": "hello", "X-Registry-Auth": "x"}
        async with browser.session.get(f"{browser.base}/ui/", headers=sent) as response:
            assert response.headers["ETag"] == '"e"'
            assert "Set-Cookie" not in response.headers
        passed = api.asked[-1].headers
        assert passed["X-Skep-UI"] == "1"
        assert passed["If-None-Match"] == '"e"'
        assert not {"Cookie", "Last-Event-ID", "X-Registry-Auth", "User-Agent"} & set(passed)


async def test_a_stream_is_passed_on_as_it_comes_and_ends_with_its_reader(tmp_path: Path) -> None:
    async with a_dashboard(tmp_path) as (browser, api):
        async with browser.session.get(
            f"{browser.base}/skep/view/stream", headers=browser.cookie
        ) as response:
            assert response.content_type == "text/event-stream"
            assert await response.content.readline() == b"id: 1-1\n"
        transport = api.asked[0].transport
        async with asyncio.timeout(10):
            while transport is not None and not transport.is_closing():  # noqa: ASYNC110 -- nothing announces it
                await asyncio.sleep(0.01)


async def raw(origin: str, data: bytes) -> bytes:
    host, _, port = origin.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    async with asyncio.timeout(20):
        answer = await reader.read()
    writer.close()
    return answer


async def test_requests_that_are_too_large_or_no_http_are_refused(tmp_path: Path) -> None:
    async with a_dashboard(tmp_path) as (browser, api):
        own = browser.origin.removeprefix("http://").encode()
        start = b"POST /key/services/web/update?version=1 HTTP/1.1\r\nHost: " + own
        start += (
            b"\r\nOrigin: http://" + own + b"\r\nCookie: skep-ui-namename=cookie\r\nConnection: close\r\n"
        )
        start += b"Content-Type: application/json\r\n"
        large = start + b"Content-Length: 9000000\r\n\r\n" + b" " * 2_000_000
        assert b" 413 " in (await raw(browser.origin, large)).partition(b"\r\n")[0]
        twice = start + b"Host: attacker.example\r\nContent-Length: 0\r\n\r\n"
        assert b" 40" in (await raw(browser.origin, twice)).partition(b"\r\n")[0]
        long = b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: " + own + b"\r\n\r\n"
        assert b" 400 " in (await raw(browser.origin, long)).partition(b"\r\n")[0]
        assert await raw(browser.origin, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n")
        assert api.asked == []


async def test_connections_that_say_nothing_are_dropped_and_counted(tmp_path: Path) -> None:
    async with a_dashboard(tmp_path, head_s=0.3, own_connections=5) as (browser, _):
        silent = [raw(browser.origin, b"GET /key/") for _ in range(8)]
        for answer in await asyncio.gather(*silent, return_exceptions=True):
            assert answer == b"" or isinstance(answer, ConnectionResetError)
        assert await browser.status("/ui/") == 200


async def test_a_flood_of_streams_is_bounded(tmp_path: Path) -> None:
    async with a_dashboard(tmp_path, requests=3) as (browser, _):
        streams = [
            await browser.session.get(f"{browser.base}/skep/view/stream", headers=browser.cookie)
            for _ in range(3)
        ]
        assert await browser.status("/skep/view") == 503
        for one in streams:
            one.close()
        async with asyncio.timeout(10):
            while await browser.status("/skep/view") != 200:  # noqa: ASYNC110 -- nothing announces it
                await asyncio.sleep(0.01)


async def test_a_terminal_is_for_the_page_itself_and_says_why_there_is_none(tmp_path: Path) -> None:
    async with a_dashboard(tmp_path) as (browser, api):
        url, own = f"{browser.base}/skep/ui/exec", {**browser.cookie, "Origin": browser.origin}
        for headers in ({}, browser.cookie, {**browser.cookie, "Origin": "http://127.0.0.1:1"}):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await browser.session.ws_connect(f"{url}?task=nothing", headers=headers)
            assert refused.value.status in (401, 403)
        for query in (
            "",
            "task=a/b",
            "task=a&rows=0",
            "task=a&columns=99999",
            "task=a&rows=x",
            "task=a&command=x" * 70,
        ):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await browser.session.ws_connect(f"{url}?{query}", headers=own)
            assert refused.value.status == 400, query
        assert await browser.status("/skep/ui/exec?task=a") == 400, "it is no websocket"
        assert api.asked == []
        async with browser.session.ws_connect(f"{url}?task=nothing", headers=own) as terminal:
            assert await terminal.receive_json() == {"error": "no such task"}


async def test_terminals_are_bounded(tmp_path: Path) -> None:
    async with a_dashboard(tmp_path, terminals=0) as (browser, _):
        own = {**browser.cookie, "Origin": browser.origin}
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await browser.session.ws_connect(f"{browser.base}/skep/ui/exec?task=a", headers=own)
        assert refused.value.status == 503
