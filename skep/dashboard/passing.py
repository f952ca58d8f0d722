"""Forwards requests of a logged-in browser to the API.  Shared by ``skep ui`` and a manager's own listener.

* A request that changes something, or opens a terminal, has the ``Origin`` of the page (CSRF).
* Only the requests in ``ALLOWED`` are forwarded.
* The number of connections, requests and terminals, the size of bodies, and the time for a head are limited.
"""

import asyncio
import hmac
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import msgspec
from aiohttp import web

from skep.api.client.raw import Exchange, RawClient
from skep.api.errors import NotModified, status_of
from skep.api.http.framing import path_of, plain_path, raw_path_of
from skep.dashboard.pages import RELAY_HEADER, SECURITY_HEADERS
from skep.dashboard.terminal import join_terminal
from skep.errors import InvalidArgument, PermissionDenied, ResourceExhausted, SkepError, Unavailable

BODY_S: Final = 30.0
"""Seconds for a request's body to arrive."""
BROWSER_READ_S: Final = 60.0
"""Seconds for the browser to read written data."""
TERMINAL: Final = "/skep/ui/exec"
SESSION: Final = "/skep/ui/session"
"""Path of the logged-in user, as JSON."""

_ID = r"[A-Za-z0-9_.%-]+"
ALLOWED: Final[tuple[tuple[str, re.Pattern[str]], ...]] = tuple(
    (method, re.compile(pattern.replace("ID", _ID)))
    for method, pattern in (
        ("GET", r"/ui(?:/ID)?"),
        ("GET", r"/skep/(?:view(?:/stream)?|events|history|state|quorum|door|doctor/network)"),
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
"""The requests of the pages, without the API version."""

_PASSED_BACK = ("content-type", "etag", "cache-control")
_CURSOR = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")
_ETAG = re.compile(r'[A-Za-z0-9"/, -]{1,200}')
_TARGET = re.compile(r"/[!-~]*")


def is_allowed(method: str, target: str) -> bool:
    """Return whether the pages may request ``target``, which is path and query as sent."""
    sent, path = raw_path_of(target), path_of(target)
    # The check uses the decoded path, but the path is forwarded as sent.
    if ".." in path or "#" in target or (plain_path(sent) != sent and sent != "/ui/"):
        return False
    return any(method == allowed and pattern.fullmatch(path) for allowed, pattern in ALLOWED)


def target_of(request: web.BaseRequest) -> str:
    """Return path and query as sent.  Raises: InvalidArgument."""
    if not _TARGET.fullmatch(request.raw_path):
        raise InvalidArgument("malformed request target")
    return request.raw_path


def require_own_page(request: web.BaseRequest, scheme: str) -> None:
    """Check the request's origin.  ``Host`` was checked before.

    Raises:
        PermissionDenied: Another site's page made the browser send it.
    """
    origins = request.headers.getall("Origin", [])
    changes = request.method != "GET" or "Upgrade" in request.headers
    if (changes or origins) and origins != [f"{scheme}://{request.headers['Host']}"]:
        raise PermissionDenied("requests of other pages are refused")
    if request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
        raise PermissionDenied("requests of other pages are refused")


def same(one: str, other: str) -> bool:
    """Return whether two texts are equal, in constant time."""
    return hmac.compare_digest(one.encode("utf-8", "surrogateescape"), other.encode())


async def body_of(request: web.BaseRequest) -> bytes:
    """Return the request's body.  Raises: Unavailable: it does not arrive; HTTPRequestEntityTooLarge."""
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError:
        raise Unavailable(f"the request did not arrive within {BODY_S:g} s") from None


def json_response(content: object) -> web.Response:
    """Return a JSON response for the page only."""
    headers = {**SECURITY_HEADERS, "Cache-Control": "no-store"}
    return web.Response(body=msgspec.json.encode(content), headers=headers, content_type="application/json")


def refusal(error: SkepError, status: int = 0) -> web.Response:
    """Return the error as JSON, and close the connection afterwards."""
    response = json_response({"message": str(error)})
    response.set_status(status or status_of(error))
    response.force_close()
    return response


async def respond_or_refuse(responding: Callable[[], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    """Return the response, or an error response."""
    try:
        return await responding()
    except SkepError as error:
        return refusal(error)
    except web.HTTPRequestEntityTooLarge:
        return refusal(ResourceExhausted("the request is too large"), status=413)


class BrowserLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of the browsers of one dashboard."""

    head_s: float = 15.0
    """Seconds for the first request of a connection to arrive."""
    requests: int = 64
    """Simultaneous requests of one browser."""
    terminals: int = 16
    """Simultaneous terminals of one browser."""
    per_address: int = 64
    """Maximum number of connections of logged-in browsers from one address."""
    strangers: int = 256
    """Maximum number of connections without a login.  Counted separately, so that strangers cannot shut users out."""
    own_connections: int = 256
    """Simultaneous connections to ``skep ui``."""


LIMITS: Final = BrowserLimits()


class FirstRequests:
    """Drops connections whose first request does not arrive in time."""

    def __init__(self, head_s: float) -> None:
        self._head_s = head_s
        self._waiting: dict[asyncio.BaseProtocol, asyncio.TimerHandle] = {}

    def expect(self, protocol: web.RequestHandler) -> None:
        """Start the timer of an accepted connection."""
        self._waiting[protocol] = asyncio.get_running_loop().call_later(self._head_s, self._drop, protocol)

    def arrived(self, protocol: asyncio.BaseProtocol) -> None:
        """Stop the timer of a connection on which a request has arrived."""
        if (timer := self._waiting.pop(protocol, None)) is not None:
            timer.cancel()

    def close(self) -> None:
        """Stop all timers."""
        for timer in self._waiting.values():
            timer.cancel()

    def _drop(self, protocol: web.RequestHandler) -> None:
        del self._waiting[protocol]
        if protocol.transport is not None:
            protocol.transport.abort()


class RequestForwarder:
    """Active requests and terminals of one browser."""

    def __init__(self, limits: BrowserLimits) -> None:
        self._limits = limits
        self._requests = self._terminals = 0

    async def respond(self, request: web.BaseRequest, target: str, client: RawClient) -> web.StreamResponse:
        """Forward a request for ``target`` of the page itself.  Raises: SkepError; HTTPRequestEntityTooLarge."""
        if request.method == "GET" and target.partition("?")[0] == TERMINAL:
            return await self._open_terminal(request, client)
        if not is_allowed(request.method, target):
            raise PermissionDenied(f"the dashboard may not send {request.method} {path_of(target)[:200]}")
        with self._counted_request():
            return await _pass_on(request, target, client)

    @contextmanager
    def _counted_request(self) -> Iterator[None]:
        if self._requests >= self._limits.requests:
            raise Unavailable(f"{self._limits.requests} requests of this dashboard are under way already")
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    async def _open_terminal(self, request: web.BaseRequest, client: RawClient) -> web.StreamResponse:
        if self._terminals >= self._limits.terminals:
            raise Unavailable(
                f"{self._limits.terminals} terminals of this dashboard are open already: close some"
            )
        self._terminals += 1
        try:
            return await join_terminal(request, client)
        finally:
            self._terminals -= 1


async def _pass_on(request: web.BaseRequest, target: str, client: RawClient) -> web.StreamResponse:
    body = b""
    if request.method == "POST":
        if request.body_exists and request.content_type != "application/json":
            raise InvalidArgument("the body of a request has to be application/json")
        body = await body_of(request)
    try:
        async with client.exchange(
            request.method, target, body, headers=_forwarded_headers(request)
        ) as there:
            return await _pass_back(request, there)
    except NotModified:
        return web.Response(status=304, headers=SECURITY_HEADERS)


def _forwarded_headers(request: web.BaseRequest) -> Mapping[str, str]:
    """Return the headers to forward, without headers that the browser adds by itself, such as cookies or the origin."""
    passed = {RELAY_HEADER: "1"}
    for name, pattern in (("Last-Event-ID", _CURSOR), ("If-None-Match", _ETAG)):
        if pattern.fullmatch(value := request.headers.get(name, "")):
            passed[name] = value
    return passed


async def _pass_back(request: web.BaseRequest, there: Exchange) -> web.StreamResponse:
    """Forward a response.  Raises: ConnectionResetError: one side ended the connection, or the browser does
    not read.
    """
    passed = {name: there.headers[name] for name in _PASSED_BACK if name in there.headers}
    response = web.StreamResponse(status=there.status, headers={**passed, **SECURITY_HEADERS})
    await response.prepare(request)
    try:
        async for piece in there.pieces():
            async with asyncio.timeout(BROWSER_READ_S):
                await response.write(piece)
        await response.write_eof()
    except (SkepError, TimeoutError) as error:
        if request.transport is not None:
            request.transport.abort()  # the head was sent, so only closing the connection can report the error
        raise ConnectionResetError("the response broke off") from error
    return response
