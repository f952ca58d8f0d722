"""The dashboard for browsers without ``skep ui``: a manager's own TLS listener, for users with a token.

Off unless the setting ``dashboard`` names an address.  Connections to a public address of this machine are closed
unless ``dashboard-public`` is set.  A token is exchanged for a session: a cookie that no script can read, ``Secure``,
``SameSite=Strict``, for one random path.  Requests are then the same as the relay's (``dashboard.passing``),
sent as the token's user.  If the user's roles do not allow one, the API refuses it with the reason.
"""

import asyncio
import html
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import parse_qs

import msgspec
import structlog
from aiohttp import web
from cryptography import x509

from skep.aio.clock import Clock
from skep.aio.connections.admission import Admission, Newcomers, admit_transport, peer_source
from skep.aio.connections.handshakes import Handshakes
from skep.api.access.permissions import may, rule_for
from skep.api.client.raw import RawClient
from skep.api.errors import status_of
from skep.api.http.connection import Connection
from skep.api.http.tls import server_context
from skep.dashboard.pages import SECURITY_HEADERS, page_response, pages
from skep.dashboard.passing import (
    LIMITS,
    SESSION,
    BrowserLimits,
    FirstRequests,
    body_of,
    json_response,
    refusal,
    require_own_page,
    respond_or_refuse,
    target_of,
)
from skep.dashboard.sessions import ATTEMPTS, Attempts, BrowserSession, BrowserSessions, CertificateNames
from skep.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    SkepError,
    Unauthenticated,
    Unavailable,
)
from skep.model.networks.addresses import is_public
from skep.model.permissions.access import TOKEN_BYTES_MAX, Credential, Identity

log = structlog.get_logger()

CONNECTIONS_MAX: Final = 1024
"""Maximum number of connections of logged-in browsers."""
STRANGERS_PER_ADDRESS_MAX: Final = 32
"""Maximum number of connections without a login from one address.

A browser opens six connections at a time for the login page.
"""
LOGOUT: Final = "/skep/ui/logout"
_BACKLOG = 256
"""Connections that the kernel queues until they are accepted.  Enough for forty browsers that open a page at once."""
_IDLE_S = 75.0
"""Seconds for which an idle connection is kept."""
_EXPIRED_CHECK_S = 10.0
"""Seconds between two checks for expired sessions."""
_OPEN = ("login.js", "style.css", "mark.svg")
"""Files of the login page, which everyone may read."""
_VIEW = rule_for("GET", "/skep/view")
_LOGIN_HEADERS = {
    **SECURITY_HEADERS,
    "Content-Security-Policy": SECURITY_HEADERS["Content-Security-Policy"].replace(
        "form-action 'none'", "form-action 'self'"
    ),
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send a form's origin as null
    "Cache-Control": "no-store",
}
_AGAIN = "log in again"


class TokenUsers(Protocol):
    """Identifies users by their tokens."""

    def identify(self, credential: Credential) -> Identity:
        """Return the identity of a credential.

        Raises:
            Unauthenticated: The credential is invalid.
            Unavailable: Users are not known now.
        """

    def remember(self, transport: asyncio.Transport, credential: Credential, identity: Identity) -> None:
        """End the connection when ``credential`` no longer has ``identity``."""


class Tls(msgspec.Struct, frozen=True):
    """TLS settings.  ``names`` are the names in the certificate."""

    context: ssl.SSLContext
    names: CertificateNames

    @classmethod
    def of(cls, certificate: Path, key: Path) -> "Tls":
        """Load a certificate and its key.  Raises: FailedPrecondition: a file is invalid."""
        context = server_context(certificate, key)
        context.set_alpn_protocols(["http/1.1"])
        try:
            names = _names_in(x509.load_pem_x509_certificate(certificate.read_bytes()))
        except (OSError, ValueError) as error:
            raise FailedPrecondition(f"the names in {certificate} cannot be read: {error}") from error
        return cls(context, names)


def _names_in(certificate: x509.Certificate) -> CertificateNames:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return CertificateNames(frozenset(), frozenset())
    dns = frozenset(name.lower() for name in found.get_values_for_type(x509.DNSName))
    return CertificateNames(dns, frozenset(map(str, found.get_values_for_type(x509.IPAddress))))


class DashboardServer:
    """The listener.

    Args:
        serve: Serves one end of a new connection to the node's API as a client's connection.
        new_secret: Returns a new random word of letters and digits.
    """

    def __init__(
        self,
        tls: Tls,
        users: TokenUsers,
        serve: Callable[[socket.socket, Identity], None],
        *,
        allows_public: bool,
        clock: Clock,
        new_secret: Callable[[], str],
        limits: BrowserLimits = LIMITS,
    ) -> None:
        self._tls = tls
        self._limits = limits
        self._users = users
        self._serve = serve
        self._allows_public = allows_public
        self._clock = clock
        self._sessions = BrowserSessions(new_secret, limits)
        self._attempts = Attempts()
        self._open = Admission("dashboard", CONNECTIONS_MAX, limits.per_address)
        """Connections of browsers that are logged in."""
        self._strangers: Newcomers[asyncio.Transport] = Newcomers(
            "dashboard connections without a login",
            limits.strangers,
            STRANGERS_PER_ADDRESS_MAX,
            lambda one: one.abort(),
        )
        self._first = FirstRequests(limits.head_s)
        self._streams: dict[BrowserSession, set[asyncio.Transport]] = {}
        """Connections with an active request of a session."""
        self._has_refused_public = False
        self._server = web.Server(
            self._handle,
            handler_cancellation=True,
            access_log=None,
            lingering_time=1.0,
            keepalive_timeout=_IDLE_S,
        )

    @asynccontextmanager
    async def listening(self, address: str, port: int) -> AsyncIterator[Sequence[int]]:
        """Serve while the context is open, and yield the ports.  An empty ``address`` means every address.

        Raises:
            FailedPrecondition: It cannot listen on the address.
        """
        async with AsyncExitStack() as stack:
            listeners = [stack.enter_context(one) for one in _listeners(address, port)]
            async with asyncio.TaskGroup() as group:
                new_connection = partial(Connection, self._accepted)
                for listener in listeners:
                    accepting = Handshakes(new_connection, self._tls.context).accept(listener, group)
                    stack.callback(group.create_task(accepting, name="accept browsers").cancel)
                stack.callback(group.create_task(self._end_expired(), name="sessions").cancel)
                stack.push_async_callback(self._server.shutdown, 1.0)
                stack.callback(self._first.close)
                try:
                    log.info("dashboard served", address=address or "*", port=port)
                    yield [listener.getsockname()[1] for listener in listeners]
                finally:
                    await stack.aclose()

    def _accepted(self, client: Connection) -> None:
        transport = client.transport
        local = str(transport.get_extra_info("sockname")[0])
        if is_public(local) and not self._allows_public:
            if not self._has_refused_public:
                log.warning("dashboard not served on a public address: set dashboard-public", address=local)
            self._has_refused_public = True
            client.abort()
            return
        if not admit_transport(self._strangers, transport):
            client.abort()
            return
        handler = self._server()
        self._first.expect(handler)
        client.give_to(handler)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._first.arrived(request.protocol)
        return await respond_or_refuse(partial(self._respond, request))

    async def _respond(self, request: web.BaseRequest) -> web.StreamResponse:
        target = target_of(request)
        self._require_own_name(request)
        key, slash, rest = target[1:].partition("/")
        if slash:
            return await self._respond_in_session(request, key, f"/{rest}")
        response = await self._respond_to_anyone(request, key.partition("?")[0])
        response.force_close()  # only connections of logged-in users are kept open
        return response

    def _require_own_name(self, request: web.BaseRequest) -> None:
        """Check the host name.  Raises: PermissionDenied: a page of another name reaches this address (DNS
        rebinding).
        """
        hosts = request.headers.getall("Host", [])
        local = str(_transport_of(request).get_extra_info("sockname")[0])
        if len(hosts) != 1 or not self._tls.names.has(hosts[0], local):
            named = hosts[0][:200] if hosts else ""
            raise PermissionDenied(
                f"the dashboard is not served as {named!r}: its certificate is for {self._tls.names}"
            )

    # --- for everyone -----------------------------------------------------------------------------------------

    async def _respond_to_anyone(self, request: web.BaseRequest, name: str) -> web.StreamResponse:
        if request.method == "POST" and name == "login":
            require_own_page(request, "https")
            try:
                return await self._log_in(request)
            except ResourceExhausted as error:
                return _login_page(str(error), 429)
            except SkepError as error:
                return _login_page(str(error), status_of(error))
        if request.method == "GET" and name in ("", "login"):
            return _login_page("", 200)
        if request.method == "GET" and name in _OPEN:
            return page_response(pages()[name], request.headers.get("If-None-Match", ""))
        raise NotFound("page not found")

    async def _log_in(self, request: web.BaseRequest) -> web.Response:
        """Exchange a token for a session.  Raises: SkepError."""
        source = peer_source(_transport_of(request))
        if not self._attempts.admit(source, self._clock.monotonic()):
            raise ResourceExhausted(f"more than {ATTEMPTS} logins a minute from this address: wait a minute")
        token = _token_in(await body_of(request))
        credential = Credential.of_token(token, is_login=True)
        try:
            identity = self._users.identify(credential)
            if why := may(identity, _VIEW):
                raise PermissionDenied(f"{identity.name} may not open the dashboard: {why}")
        except SkepError as error:
            log.warning("dashboard login refused", source=source, reason=str(error))
            raise
        session, ended = self._sessions.open(credential, self._clock.monotonic())
        self._end_streams(ended)
        log.info("dashboard login", user=identity.name, source=source)
        path = f"/{session.key}/"
        headers = {**_LOGIN_HEADERS, "Location": f"{path}ui/"}
        response = web.Response(status=303, headers=headers)
        response.set_cookie(
            session.cookie_name, session.cookie, path=path, httponly=True, samesite="Strict", secure=True
        )
        return response

    # --- for who is logged in ---------------------------------------------------------------------------------

    async def _respond_in_session(
        self, request: web.BaseRequest, key: str, target: str
    ) -> web.StreamResponse:
        cookies = request.cookies
        session = self._sessions.find(key, lambda name: cookies.get(name, ""), self._clock.monotonic())
        if session is None:
            return _not_logged_in(request, f"this browser is not logged in, or no longer: {_AGAIN}")
        require_own_page(request, "https")
        try:
            identity = self._users.identify(session.credential)
        except Unauthenticated as error:
            self._end((session,))
            return _not_logged_in(request, f"{error}: {_AGAIN}")
        transport = _transport_of(request)
        if transport in self._strangers:
            self._strangers.forget(transport)
            if not self._open.admit(transport):
                admit_transport(self._strangers, transport)  # its next request is counted again
                raise Unavailable(
                    f"this address has {self._limits.per_address} connections open, or all have many: try again later"
                )
        self._users.remember(transport, session.credential, identity)
        under_way = self._streams.setdefault(session, set())
        under_way.add(transport)
        try:
            return await self._pass_on(request, target, session, identity)
        finally:
            under_way.discard(transport)
            if not under_way and self._streams.get(session) is under_way:
                del self._streams[session]

    async def _pass_on(
        self, request: web.BaseRequest, target: str, session: BrowserSession, identity: Identity
    ) -> web.StreamResponse:
        path = target.partition("?")[0]
        if request.method == "GET" and path == SESSION:
            roles = [str(one) for one in identity.bindings]
            return json_response({"user": identity.name, "roles": roles, "by_login": True})
        if request.method == "POST" and path == LOGOUT:
            self._sessions.end(session)
            self._end_streams((session,), but=_transport_of(request))
            log.info("dashboard logout", user=identity.name)
            return json_response({})
        if request.method == "GET" and path.startswith("/ui/"):
            found = pages().get(path.removeprefix("/ui/"))
            if found is None:
                raise NotFound("page not found")
            return page_response(found, request.headers.get("If-None-Match", ""))
        client = RawClient.over("this node", partial(self._connect_to_api, identity))
        return await session.forwarder.respond(request, target, client)

    async def _connect_to_api(self, identity: Identity) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a new connection to the node's API with ``identity``."""
        ours, theirs = socket.socketpair()
        try:
            theirs.setblocking(False)
            self._serve(theirs, identity)
            return await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise

    async def _end_expired(self) -> None:
        while True:
            await self._clock.sleep(_EXPIRED_CHECK_S)
            self._end_streams(self._sessions.end_expired(self._clock.monotonic()))

    def _end(self, sessions: Sequence[BrowserSession]) -> None:
        for session in sessions:
            self._sessions.end(session)
        self._end_streams(sessions)

    def _end_streams(self, sessions: Sequence[BrowserSession], but: asyncio.Transport | None = None) -> None:
        for session in sessions:
            for transport in self._streams.pop(session, set()) - {but}:
                transport.abort()


def _transport_of(request: web.BaseRequest) -> asyncio.Transport:
    """Return the request's transport.  Raises: ConnectionResetError: the browser has disconnected."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the browser has gone")
    return transport


def _token_in(body: bytes) -> bytes:
    """Return the token in a login form.  Raises: InvalidArgument: it is missing."""
    try:
        fields = parse_qs(body.decode("ascii"), max_num_fields=4)
    except ValueError as error:
        raise InvalidArgument("the form is malformed") from error
    token = fields.get("token", [""])[0].strip().encode("utf-8", "surrogateescape")
    if not 0 < len(token) <= TOKEN_BYTES_MAX:
        raise InvalidArgument("a token is needed: `skep user token USER` on a manager prints one")
    return token


def _not_logged_in(request: web.BaseRequest, why: str) -> web.Response:
    """Return the login page to a person, or the reason to a script."""
    if request.method == "GET" and "text/html" in request.headers.get("Accept", ""):
        response = _login_page(why, 401)
        response.force_close()
        return response
    return refusal(Unauthenticated(why))


def _login_page(why: str, status: int) -> web.Response:
    text = pages()["login.html"].content.decode()
    hint = f'<p class="bad" role="alert">{html.escape(why)}</p>' if why else ""
    headers = dict(_LOGIN_HEADERS)
    if status == 429:
        headers["Retry-After"] = "60"
    return web.Response(
        text=text.replace("<!-- why -->", hint), status=status, content_type="text/html", headers=headers
    )


def _listeners(address: str, port: int) -> list[socket.socket]:
    """Open the listening sockets.  Raises: FailedPrecondition."""
    places = [(address, socket.AF_INET6 if ":" in address else socket.AF_INET)]
    if not address:
        # Use two sockets, because an IPv6 socket shows IPv4 clients with other addresses.
        places = [("0.0.0.0", socket.AF_INET), *([("::", socket.AF_INET6)] if socket.has_ipv6 else [])]
    found: list[socket.socket] = []
    for host, family in places:
        try:
            listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            if found and family is socket.AF_INET6:
                continue  # a machine without IPv6
            raise FailedPrecondition(
                f"the dashboard cannot be served on {host}:{port}: {error.strerror or error}"
            ) from error
        listener.setblocking(False)
        found.append(listener)
    return found
