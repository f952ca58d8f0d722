"""The dashboard's own listener: browsers with a user's token are served by TLS, and nothing else that reaches it."""

import asyncio
import io
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from skep.dashboard import server as server_module
from skep.dashboard import sessions as sessions_module
from skep.dashboard.passing import BrowserLimits
from tests.support.clients.dashboard_rig import Clock, People, a_dashboard_server, user_of
from tests.support.security.api_authority import an_authority


class Rig:
    """A browser, with the headers that one gives its requests, and what the node's API was asked."""

    def __init__(self, session: aiohttp.ClientSession, port: int, people: People) -> None:
        self.session = session
        self.port = port
        self.people = people
        self.origin = f"https://localhost:{port}"
        self.asked: list[tuple[str, str, str]] = []
        """Method, path, user."""
        self.now = 0.0

    async def log_in(self, token: str, **more: Any) -> aiohttp.ClientResponse:
        headers = {"Origin": self.origin, "Sec-Fetch-Site": "same-origin"} | more.pop("headers", {})
        return await self.session.post(
            f"{self.origin}/login", data={"token": token}, headers=headers, allow_redirects=False, **more
        )

    async def page(self, token: str) -> "Page":
        async with await self.log_in(token) as response:
            assert response.status == 303, await response.text()
            (cookie,) = response.headers.getall("Set-Cookie")
            base = self.origin + response.headers["Location"].removesuffix("/ui/")
            return Page(self, base, {"Cookie": cookie.partition(";")[0]})


class Page:
    """One that is logged in."""

    def __init__(self, rig: Rig, base: str, cookie: dict[str, str]) -> None:
        self.rig, self.base, self.cookie = rig, base, cookie

    async def ask(
        self, path: str, headers: Mapping[str, str] | None = None, method: str = "GET", **more: Any
    ) -> tuple[int, str]:
        sent = self.cookie if headers is None else headers
        async with self.rig.session.request(method, f"{self.base}{path}", headers=sent, **more) as response:
            return response.status, await response.text()


@asynccontextmanager
async def a_rig(directory: Path, clock: Clock | None = None, **options: Any) -> AsyncIterator[Rig]:
    rig: Rig

    async def answer(request: web.Request) -> web.StreamResponse:
        rig.asked.append((request.method, request.path_qs, user_of(request)))
        if request.path == "/skep/view/stream":
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(b"id: 1-1\nevent: snapshot\ndata: {}\n\n")
            await asyncio.Event().wait()
        if request.method == "POST":
            return web.json_response({"message": "ann may not: the role operator is needed"}, status=403)
        return web.json_response({"path": request.path_qs})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    authority = an_authority(directory / "ca")
    trust = ssl.create_default_context(cafile=str(authority.root))
    jar, connector = aiohttp.DummyCookieJar(), aiohttp.TCPConnector(ssl=trust)
    async with (
        a_dashboard_server(app, authority, clock or Clock(), **options) as (port, people),
        aiohttp.ClientSession(cookie_jar=jar, connector=connector) as session,
    ):
        rig = Rig(session, port, people)
        yield rig


async def test_a_token_gives_a_cookie_for_one_path_and_the_user_its_own_rights(tmp_path: Path) -> None:
    async with a_rig(tmp_path) as rig:
        async with rig.session.get(f"{rig.origin}/") as response:
            assert response.status == 200
            assert '<form method="post" action="/login">' in await response.text()
            assert "form-action 'self'" in response.headers["Content-Security-Policy"]
            assert "script-src 'self'" in response.headers["Content-Security-Policy"]
        async with await rig.log_in("ann-token") as response:
            assert response.status == 303
            (cookie,) = response.headers.getall("Set-Cookie")
            path = response.headers["Location"].removesuffix("ui/")
            assert {"HttpOnly", "Secure", "SameSite=Strict", f"Path={path}"} <= set(cookie.split("; "))
            assert path == f"/{1:032}/"
        page = Page(rig, f"{rig.origin}{path.rstrip('/')}", {"Cookie": cookie.partition(";")[0]})
        assert (await page.ask("/ui/"))[1].startswith("<!doctype html>")
        assert await page.ask("/skep/ui/session") == (
            200,
            '{"user":"ann","roles":["viewer"],"by_login":true}',
        )
        assert (await page.ask("/skep/view?at=1"))[0] == 200
        own = {**page.cookie, "Origin": rig.origin, "Content-Type": "application/json"}
        status, text = await page.ask("/services/web/update?version=1", own, "POST", data=b"{}")
        assert (status, "the role operator is needed" in text) == (403, True)
        assert rig.asked == [
            ("GET", "/skep/view?at=1", "ann"),
            ("POST", "/services/web/update?version=1", "ann"),
        ]
        # What the pages do not use is nobody's, whatever the role.
        eve = await rig.page("eve-token")
        assert (await eve.ask("/swarm"))[0] == 403
        assert len(rig.asked) == 2


@pytest.mark.parametrize(
    ("token", "status", "reason"),
    [
        ("wrong", 401, "unknown or was revoked"),
        ("", 400, "a token is needed"),
        ("x" * 600, 400, "a token is needed"),
        ("bob-token", 403, "bob may not open the dashboard: the role viewer of the whole cluster is needed"),
    ],
)
async def test_who_has_no_right_to_it_is_not_logged_in_and_sees_why(
    tmp_path: Path, token: str, status: int, reason: str
) -> None:
    async with a_rig(tmp_path) as rig, await rig.log_in(token) as response:
        assert response.status == status
        assert "Set-Cookie" not in response.headers
        assert reason in await response.text()


async def test_without_the_users_nobody_is_logged_in(tmp_path: Path) -> None:
    async with a_rig(tmp_path) as rig:
        page = await rig.page("ann-token")
        rig.people.are_known = False
        async with await rig.log_in("ann-token") as response:
            assert response.status == 503
        assert (await page.ask("/skep/view"))[0] == 503


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "null"},
        {"Origin": "https://attacker.example"},
        {"Origin": "http://localhost"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "attacker.example"},
        {"Host": "localhost.attacker.example"},
        {"Host": "10.9.9.9"},
    ],
)
async def test_other_pages_log_nobody_in_and_other_names_are_not_served(
    tmp_path: Path, headers: dict[str, str]
) -> None:
    async with a_rig(tmp_path) as rig, await rig.log_in("ann-token", headers=headers) as response:
        assert response.status == 403
        assert "Set-Cookie" not in response.headers


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 401),
        ({"Cookie": "NAME=other"}, 401),
        ({"Cookie": "skep=VALUE"}, 401),
        ({"Cookie": "NAME=VALUE", "Host": "attacker.example"}, 403),
        ({"Cookie": "NAME=VALUE", "Origin": "https://attacker.example"}, 403),
        ({"Cookie": "NAME=VALUE", "Origin": "null"}, 403),
        ({"Cookie": "NAME=VALUE", "Sec-Fetch-Site": "same-site"}, 403),
        ({"Cookie": "NAME=VALUE", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Cookie": "NAME=VALUE"}, 200),
    ],
)
async def test_only_the_page_itself_reads(tmp_path: Path, headers: dict[str, str], expected: int) -> None:
    async with a_rig(tmp_path) as rig:
        page = await rig.page("ann-token")
        name, _, value = page.cookie["Cookie"].partition("=")
        sent = {key: word.replace("NAME", name).replace("VALUE", value) for key, word in headers.items()}
        assert (await page.ask("/skep/view", sent))[0] == expected
        assert bool(rig.asked) is (expected == 200)


@pytest.mark.parametrize("origin", [None, "null", "https://attacker.example", "http://localhost:PORT"])
async def test_a_change_has_to_come_from_the_page_itself(tmp_path: Path, origin: str | None) -> None:
    async with a_rig(tmp_path) as rig:
        page = await rig.page("eve-token")
        headers = {**page.cookie, "Content-Type": "application/json"}
        if origin is not None:
            headers["Origin"] = origin.replace("PORT", str(rig.port))
        for path in ("/services/web/update?version=1", "/skep/ui/logout"):
            assert (await page.ask(path, headers, "POST"))[0] == 403
        assert rig.asked == []


async def test_a_session_ends_by_logout_by_time_and_with_its_token(tmp_path: Path) -> None:
    clock = Clock()
    async with a_rig(tmp_path, clock) as rig:
        first, second, third = [await rig.page(token) for token in ("ann-token", "ann-token", "eve-token")]
        stream = await rig.session.get(f"{first.base}/skep/view/stream", headers=first.cookie)
        assert await stream.content.readline() == b"id: 1-1\n"
        assert (await first.ask("/skep/ui/logout", {**first.cookie, "Origin": rig.origin}, "POST"))[0] == 200
        with pytest.raises(aiohttp.ClientError):
            await stream.read()
        status, text = await first.ask("/skep/view")
        assert (status, "log in again" in text) == (401, True)
        status, text = await first.ask("/ui/", {**first.cookie, "Accept": "text/html,*/*"})
        assert (status, 'action="/login"' in text) == (401, True)
        stream = await rig.session.get(f"{second.base}/skep/view/stream", headers=second.cookie)
        assert await stream.content.readline() == b"id: 1-1\n"
        rig.people.revoke("ann-token")
        with pytest.raises(aiohttp.ClientError):
            await stream.read()
        assert (await second.ask("/skep/view"))[0] == 401
        assert (await third.ask("/skep/view"))[0] == 200
        clock.ahead = sessions_module.LIFE_S
        assert (await third.ask("/skep/view"))[0] == 401


async def test_logins_of_one_address_are_limited(tmp_path: Path) -> None:
    clock = Clock()
    async with a_rig(tmp_path, clock) as rig:
        for _ in range(sessions_module.ATTEMPTS):
            async with await rig.log_in("guess") as response:
                assert response.status == 401
        async with await rig.log_in("ann-token") as response:
            assert (response.status, response.headers["Retry-After"]) == (429, "60")
            assert "wait a minute" in await response.text()
        clock.ahead = 60.0
        await rig.page("ann-token")


async def test_public_addresses_are_served_only_where_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "is_public", lambda address: address == "127.0.0.1")
    async with a_rig(tmp_path) as rig:
        with pytest.raises(aiohttp.ClientError):
            await rig.log_in("ann-token")
    (tmp_path / "second").mkdir()
    async with a_rig(tmp_path / "second", allows_public=True) as rig:
        await rig.page("ann-token")


async def test_plain_http_silence_and_floods_hold_nothing_up(tmp_path: Path) -> None:
    limits = BrowserLimits(head_s=0.3, requests=2, per_address=40)
    async with a_rig(tmp_path, limits=limits) as rig:
        page = await rig.page("ann-token")
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(20):
            assert b"HTTP" not in await reader.read()
        writer.close()
        trust = ssl.create_default_context(cafile=str(tmp_path / "ca" / "ca.crt"))
        silent = [
            await asyncio.open_connection("localhost", rig.port, ssl=trust, family=socket.AF_INET)
            for _ in range(8)
        ]
        for _, sending in silent:
            sending.write(b"GET /slow HT")
        async with asyncio.timeout(20):
            for receiving, sending in silent:
                assert await receiving.read() == b""
                sending.close()
        streams = [
            await rig.session.get(f"{page.base}/skep/view/stream", headers=page.cookie) for _ in range(2)
        ]
        assert (await page.ask("/skep/view"))[0] == 503
        for one in streams:
            one.close()
        large = io.BytesIO(b"token=" + b"x" * 2_000_000)
        headers = {"Origin": rig.origin, "Content-Type": "application/x-www-form-urlencoded"}
        async with rig.session.post(f"{rig.origin}/login", data=large, headers=headers) as response:
            assert response.status == 413


async def test_strangers_take_no_place_of_who_is_logged_in(tmp_path: Path) -> None:
    async with a_rig(tmp_path, limits=BrowserLimits(strangers=4, head_s=600.0)) as rig:
        page = await rig.page("ann-token")
        stream = await rig.session.get(f"{page.base}/skep/view/stream", headers=page.cookie)
        assert await stream.content.readline() == b"id: 1-1\n"
        trust = ssl.create_default_context(cafile=str(tmp_path / "ca" / "ca.crt"))
        silent = [
            await asyncio.open_connection("localhost", rig.port, ssl=trust, family=socket.AF_INET)
            for _ in range(6)
        ]
        async with asyncio.timeout(20):
            assert await silent[0][0].read() == b"", "the oldest stranger makes room"
        assert (await page.ask("/skep/view"))[0] == 200
        await rig.page("eve-token")
        assert not stream.content.at_eof(), "the connection of a login is not ended for strangers"
        stream.close()
        for _, writer in silent:
            writer.close()


async def test_nothing_is_read_from_the_file_system_by_a_path(tmp_path: Path) -> None:
    async with a_rig(tmp_path) as rig:
        page = await rig.page("eve-token")
        for path in (
            "/ui/..%2f..%2fetc%2fpasswd",
            "/ui/%2e%2e/pages.py",
            "/ui//etc/passwd",
            "/ui/nothing.js",
        ):
            status, text = await page.ask(path)
            assert (status, "root:" in text) in ((403, False), (404, False)), path
        for path in ("app.js", "..%2fpages.py", "style.css%00"):
            async with rig.session.get(f"{rig.origin}/{path}") as response:
                assert response.status in (400, 403, 404), path
        assert rig.asked == []
