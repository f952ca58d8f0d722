"""Relay between a browser and the API of a cluster, with which ``skep ui`` listens on this machine's loopback.

The API has no defense against requests that a browser sends, and grants root's rights.  So the relay accepts only
requests of the dashboard's own page (``dashboard.passing``), and refuses all others of this machine:

* The printed address has a token, which works once and for some minutes.  It is exchanged for a cookie that no script
  can read and that is sent to one random path only, because a cookie is sent to every port of its host.
* ``Host`` names this listener, so that an attacker's name that resolves to 127.0.0.1 does not work (DNS rebinding).
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from aiohttp import web

from skep.api.client.raw import RawClient
from skep.dashboard.pages import SECURITY_HEADERS
from skep.dashboard.passing import (
    LIMITS,
    SESSION,
    BrowserLimits,
    FirstRequests,
    RequestForwarder,
    json_response,
    require_own_page,
    respond_or_refuse,
    same,
    target_of,
)
from skep.errors import NotFound, PermissionDenied, Unauthenticated

LOOPBACK: Final = "127.0.0.1"
TOKEN_S: Final = 600.0
"""Seconds for which the printed address works."""

_COOKIE = "skep-ui"
_AGAIN = "run `skep ui` again, and open the address that it prints"


class Relay:
    """Forwards the requests of one browser to the API behind ``client``.

    Args:
        new_secret: Returns a new random word of letters and digits.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self,
        client: RawClient,
        new_secret: Callable[[], str],
        clock: Callable[[], float],
        limits: BrowserLimits = LIMITS,
    ) -> None:
        self._client = client
        self._limits = limits
        self._clock = clock
        self._token: str | None = new_secret()
        self._token_until = clock() + TOKEN_S
        self._key = new_secret()
        self._cookie = new_secret()
        self._cookie_name = f"{_COOKIE}-{new_secret()[:8]}"
        """Random each time, because a page on another port of this host can set a cookie whose name it knows."""
        self._hosts: tuple[str, ...] = ()
        self._server = web.Server(
            self._handle, handler_cancellation=True, access_log=None, lingering_time=1.0
        )
        self._first = FirstRequests(limits.head_s)
        self._forwarder = RequestForwarder(limits)

    @asynccontextmanager
    async def listening(self, port: int) -> AsyncIterator[str]:
        """Serve while the context is open, and yield the address to open.  ``port`` 0 selects any free port.

        Raises:
            OSError: The port is taken.
        """
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._accepted, LOOPBACK, port, family=socket.AF_INET)
        own = server.sockets[0].getsockname()[1]
        self._hosts = (f"{LOOPBACK}:{own}", f"localhost:{own}")
        try:
            yield f"http://{self._hosts[0]}/login/{self._token}"
        finally:
            server.close()
            self._first.close()
            await self._server.shutdown(1.0)

    def _accepted(self) -> asyncio.BaseProtocol:
        if len(self._server.connections) >= self._limits.own_connections:
            return _Refused()
        protocol = self._server()
        self._first.expect(protocol)
        return protocol

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._first.arrived(request.protocol)
        return await respond_or_refuse(partial(self._respond, request))

    async def _respond(self, request: web.BaseRequest) -> web.StreamResponse:
        target = target_of(request)
        if request.headers.getall("Host", []) not in ([host] for host in self._hosts):
            raise PermissionDenied(f"the dashboard is served as http://{self._hosts[0]} only")
        if request.method == "GET" and target.startswith("/login/"):
            return self._log_in(target.removeprefix("/login/"))
        key, slash, rest = target[1:].partition("/")
        if not slash or not same(key, self._key):
            raise NotFound(f"no such page: {_AGAIN}")
        if not same(request.cookies.get(self._cookie_name, ""), self._cookie):
            raise Unauthenticated(f"this browser is not logged in: {_AGAIN}")
        require_own_page(request, "http")
        target = f"/{rest}"
        if request.method == "GET" and target == SESSION:
            return json_response({"user": "", "roles": [], "by_login": False})
        return await self._forwarder.respond(request, target, self._client)

    def _log_in(self, token: str) -> web.Response:
        """Exchange the token for the cookie.

        The response is a page that reloads itself.  For a browser that came through a link, a redirect would be a
        request from another site.
        """
        if self._token is None or self._clock() > self._token_until or not same(token, self._token):
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


class _Refused(asyncio.Protocol):
    """A connection beyond the limit."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Drop the connection."""
        assert isinstance(transport, asyncio.Transport)
        transport.abort()
