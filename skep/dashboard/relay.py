"""Between a browser and the API of a cluster: what ``skep ui`` listens with on this machine's loopback.

The API has no defence against a browser, and root's rights behind it.  So whatever any page, program or user of this
machine may send is refused unless it is the dashboard's own page:

* The address that is printed has a token, which works once and for some minutes; it is exchanged for a cookie that no
  script reads and that goes to one random path only (a cookie goes to every port of its host).
* ``Host`` names this listener, so that no name of an attacker's that resolves to 127.0.0.1 works (DNS rebinding).
* A request that changes something, or opens a terminal, has the ``Origin`` of this listener (CSRF).
* Only the requests of ``ALLOWED`` are passed on.
* Bodies, connections, requests, terminals and the time for a head are bounded.
"""

import asyncio
import hmac
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import msgspec
from aiohttp import web

from skep.api.errors import status_of
from skep.api.framing import path_of
from skep.api.raw import Exchange, RawClient
from skep.dashboard.pages import RELAY_HEADER, SECURITY_HEADERS
from skep.dashboard.terminal import join_terminal
from skep.errors import (
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    SkepError,
    Unauthenticated,
    Unavailable,
)

LOOPBACK: Final = "127.0.0.1"
TOKEN_S: Final = 600.0
"""For which the address that is printed works."""
HEAD_S: Final = 15.0
"""For the first request of a connection to arrive."""
BODY_S: Final = 30.0
TAKES_S: Final = 60.0
"""For the browser to take what is written."""
CONNECTIONS_MAX: Final = 256
REQUESTS_MAX: Final = 64
TERMINALS_MAX: Final = 16
TERMINAL: Final = "/skep/ui/exec"

_ID = r"[A-Za-z0-9_.%-]+"
ALLOWED: Final[tuple[tuple[str, re.Pattern[str]], ...]] = tuple(
    (method, re.compile(pattern.replace("ID", _ID)))
    for method, pattern in (
        ("GET", r"/ui/(?:ID)?"),
        ("GET", r"/skep/(?:view(?:/stream)?|events|history|state|quorum|doctor/network)"),
        ("GET", r"/skep/services/ID/(?:explain|runs)"),
        ("GET", r"/skep/tasks/ID/(?:explain|target)"),
        ("GET", r"/(?:services|tasks|nodes|networks|secrets|configs|volumes)(?:/ID)?"),
        ("GET", r"/(?:services|tasks)/ID/logs"),
        ("GET", r"/(?:info|version|events)"),  # not /swarm: it has the tokens of joining
        ("POST", r"/(?:services|nodes)/ID/update"),
        ("POST", r"/skep/services/ID/update/(?:pause|resume|abort)"),
        ("POST", r"/skep/services/placement"),
    )
)
"""What the pages ask for, without the version of the API."""

_COOKIE = "skep-ui"
_PASSED_BACK = ("content-type", "etag", "cache-control")
_CURSOR = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")
_ETAG = re.compile(r'[A-Za-z0-9"/, -]{1,200}')
_TARGET = re.compile(r"/[!-~]*")
_AGAIN = "run `skep ui` again, and open the address that it prints"


def is_allowed(method: str, target: str) -> bool:
    """Whether the pages may ask for ``target``, path and query as sent."""
    path = path_of(target)
    if ".." in path or "#" in target:
        return False
    return any(method == allowed and pattern.fullmatch(path) for allowed, pattern in ALLOWED)


class Relay:
    """Passes the requests of one browser on to the API behind ``client``.

    Args:
        new_secret: gives another unguessable word of letters and digits with each call.
        clock: monotonic seconds.
    """

    def __init__(self, client: RawClient, new_secret: Callable[[], str], clock: Callable[[], float]) -> None:
        self._client = client
        self._clock = clock
        self._token: str | None = new_secret()
        self._token_until = clock() + TOKEN_S
        self._key = new_secret()
        self._cookie = new_secret()
        self._cookie_name = f"{_COOKIE}-{new_secret()[:8]}"
        """Another one each time: a page of another port of this host can set a cookie that it can name."""
        self._hosts: tuple[str, ...] = ()
        self._server = web.Server(
            self._handle, handler_cancellation=True, access_log=None, lingering_time=1.0
        )
        self._silent: dict[asyncio.BaseProtocol, asyncio.TimerHandle] = {}
        """Connections without a request until now."""
        self._requests = self._terminals = 0

    @asynccontextmanager
    async def listening(self, port: int) -> AsyncIterator[str]:
        """Serve while the context is open; gives the address to open.  ``port`` 0: any free one.

        Raises: OSError: it is taken.
        """
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._accepted, LOOPBACK, port, family=socket.AF_INET)
        own = server.sockets[0].getsockname()[1]
        self._hosts = (f"{LOOPBACK}:{own}", f"localhost:{own}")
        try:
            yield f"http://{self._hosts[0]}/login/{self._token}"
        finally:
            server.close()
            for timer in self._silent.values():
                timer.cancel()
            await self._server.shutdown(1.0)

    def _accepted(self) -> asyncio.BaseProtocol:
        if len(self._server.connections) >= CONNECTIONS_MAX:
            return _Refused()
        protocol = self._server()
        self._silent[protocol] = asyncio.get_running_loop().call_later(HEAD_S, self._drop_silent, protocol)
        return protocol

    def _drop_silent(self, protocol: web.RequestHandler) -> None:
        del self._silent[protocol]
        if protocol.transport is not None:
            protocol.transport.abort()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if (timer := self._silent.pop(request.protocol, None)) is not None:
            timer.cancel()
        try:
            return await self._respond(request)
        except SkepError as error:
            return _refusal(error)
        except web.HTTPRequestEntityTooLarge:
            return _refusal(ResourceExhausted("the request is too large"), status=413)

    async def _respond(self, request: web.BaseRequest) -> web.StreamResponse:
        target = request.raw_path
        if request.headers.getall("Host", []) not in ([host] for host in self._hosts):
            raise PermissionDenied(f"the dashboard is served as http://{self._hosts[0]} only")
        if not _TARGET.fullmatch(target):
            raise InvalidArgument("malformed request target")
        if request.method == "GET" and target.startswith("/login/"):
            return self._log_in(target.removeprefix("/login/"))
        key, slash, rest = target[1:].partition("/")
        if not slash or not _same(key, self._key):
            raise NotFound(f"no such page: {_AGAIN}")
        if not _same(request.cookies.get(self._cookie_name, ""), self._cookie):
            raise Unauthenticated(f"this browser is not logged in: {_AGAIN}")
        self._require_own_page(request)
        target = f"/{rest}"
        if request.method == "GET" and target.partition("?")[0] == TERMINAL:
            return await self._open_terminal(request)
        if not is_allowed(request.method, target):
            raise PermissionDenied(f"the dashboard may not ask for {request.method} {path_of(target)[:200]}")
        with self._counted_request():
            return await self._pass_on(request, target)

    def _log_in(self, token: str) -> web.Response:
        """Exchange the token for the cookie.  The page goes on by itself, as a redirect would be another site's
        request for a browser that came by a link."""
        if self._token is None or self._clock() > self._token_until or not _same(token, self._token):
            raise Unauthenticated(f"this address has been used, or is too old: {_AGAIN}")
        self._token = None
        text = (
            f'<!doctype html><title>Skep</title><meta http-equiv="refresh" content="0; url=/{self._key}/ui/">'
        )
        headers = {**SECURITY_HEADERS, "Cache-Control": "no-store"}
        response = web.Response(text=text, content_type="text/html", headers=headers)
        response.set_cookie(
            self._cookie_name, self._cookie, path=f"/{self._key}/", httponly=True, samesite="Strict"
        )
        return response

    def _require_own_page(self, request: web.BaseRequest) -> None:
        """Raises: PermissionDenied: another site's page has the browser send it."""
        host = request.headers["Host"]
        origins = request.headers.getall("Origin", [])
        changes = request.method != "GET" or "Upgrade" in request.headers
        if (changes or origins) and origins != [f"http://{host}"]:
            raise PermissionDenied("requests of other pages are refused")
        if request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise PermissionDenied("requests of other pages are refused")

    async def _pass_on(self, request: web.BaseRequest, target: str) -> web.StreamResponse:
        body = b""
        if request.method == "POST":
            if request.body_exists and request.content_type != "application/json":
                raise InvalidArgument("the body of a request has to be application/json")
            try:
                async with asyncio.timeout(BODY_S):
                    body = await request.read()
            except TimeoutError:
                raise Unavailable(f"the request did not arrive within {BODY_S:g} s") from None
        async with self._client.exchange(
            request.method, target, body, headers=_passed_headers(request)
        ) as there:
            return await _pass_back(request, there)

    @contextmanager
    def _counted_request(self) -> Iterator[None]:
        if self._requests >= REQUESTS_MAX:
            raise Unavailable(f"{REQUESTS_MAX} requests of this dashboard are under way already")
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    async def _open_terminal(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._terminals >= TERMINALS_MAX:
            raise Unavailable(f"{TERMINALS_MAX} terminals of this dashboard are open already: close some")
        self._terminals += 1
        try:
            return await join_terminal(request, self._client)
        finally:
            self._terminals -= 1


class _Refused(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Drop it."""
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "surrogateescape"), other.encode())


def _passed_headers(request: web.BaseRequest) -> Mapping[str, str]:
    """Nothing that the browser adds by itself: no cookie, no origin."""
    passed = {RELAY_HEADER: "1"}
    for name, pattern in (("Last-Event-ID", _CURSOR), ("If-None-Match", _ETAG)):
        if pattern.fullmatch(value := request.headers.get(name, "")):
            passed[name] = value
    return passed


async def _pass_back(request: web.BaseRequest, there: Exchange) -> web.StreamResponse:
    """Raises: ConnectionResetError: one side has ended in the middle, or the browser takes nothing."""
    passed = {name: there.headers[name] for name in _PASSED_BACK if name in there.headers}
    response = web.StreamResponse(status=there.status, headers={**passed, **SECURITY_HEADERS})
    await response.prepare(request)
    try:
        async for piece in there.pieces():
            async with asyncio.timeout(TAKES_S):
                await response.write(piece)
        await response.write_eof()
    except (SkepError, TimeoutError) as error:
        if request.transport is not None:
            request.transport.abort()  # the head was sent: only the end of the connection can say it
        raise ConnectionResetError("the response broke off") from error
    return response


def _refusal(error: SkepError, status: int = 0) -> web.Response:
    content = msgspec.json.encode({"message": str(error)})
    headers = {**SECURITY_HEADERS, "Cache-Control": "no-store"}
    response = web.Response(
        body=content, status=status or status_of(error), headers=headers, content_type="application/json"
    )
    response.force_close()
    return response
