"""An aiohttp application with the Engine API's conventions.  Each package with routes builds one.

    table = Routes()

    @table.get("/services/{id}") async def inspect_service(request: web.Request) -> web.StreamResponse:
        return json_response(...)

    app = application(table)

The application handles the version prefix (``/v1.41/...`` or none), adds the engine's headers, limits bodies, and
translates errors into a status and ``{"message": ...}``.  A handler only has to decode, call and encode.

Source: moby 20.10, api/server/server.go and middleware/*.go.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar

import msgspec
import structlog
from aiohttp import web
from aiohttp.web_urldispatcher import AbstractResource
from yarl import URL

from skep import __version__
from skep.api.access.authorization import Objects, respond_if_authorized
from skep.api.access.identity import IS_PRIVATE, identity_of, is_of_token
from skep.api.errors import NotModified, status_of
from skep.api.formats.bodies import Unrecognized, decode_body
from skep.api.formats.filters import Filters
from skep.api.http.framing import plain_path
from skep.api.http.responses import (
    JsonLines,
    OutputFrames,
    OutputStream,
    frame,
    json_list_response,
    json_response,
    known_list_response,
)
from skep.api.http.versions import NEWEST, ApiVersion, requested
from skep.errors import ResourceExhausted, SkepError

__all__ = [
    "MAX_BODY_BYTES",
    "ApiVersion",
    "Filters",
    "JsonLines",
    "OutputFrames",
    "OutputStream",
    "Routes",
    "api_version",
    "application",
    "common_headers",
    "flag",
    "frame",
    "json_list_response",
    "json_response",
    "known_list_response",
    "read_body",
    "read_json",
    "runner",
]

log = structlog.get_logger()

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_BODY_BYTES = 4 * 1024 * 1024
"""Size limit of a request that is read as a whole.  ``request.content`` reads streams."""

_HEAD_BYTES_MAX = 1024 * 1024
"""Size limit of a request's first line and of each header, as in the engine: filters may name hundreds of objects."""

_LARGE_BODY = 64 * 1024
"""Bodies above this size in bytes are decoded in a thread, so that they never block the event loop."""

SERVER = f"Skep/{__version__} (linux)"
"""The ``Server`` header."""

_NEWEST: web.AppKey[Callable[[], ApiVersion]] = web.AppKey("newest")
_SERVER = web.AppKey("server", str)
_OBJECTS: web.AppKey[Objects] = web.AppKey("objects")
VERSION_KEY = web.RequestKey("api_version", ApiVersion)
_PLAIN = web.RequestKey("is_resolved_by_plain_path", bool)
_HAS_BEGUN = web.RequestKey("has_begun", bool)
"""Whether the head of a response was sent."""

Routes = web.RouteTableDef


def is_of_administrator(request: web.Request) -> bool:
    """Return whether an administrator makes ``request``.  Every client counts as one if the application has no
    ``objects``.
    """
    return request.app.get(_OBJECTS) is None or identity_of(request).is_admin


def application(
    *tables: Iterable[web.AbstractRouteDef],
    newest: ApiVersion | Callable[[], ApiVersion] = NEWEST,
    server: str = SERVER,
    is_private: Callable[[web.Request], bool] = lambda _: False,
    objects: Objects | None = None,
) -> web.Application:
    """Return an application with the routes of ``tables``, each under ``/v<version>`` and without it.

    Args:
        newest: Highest supported API version (``Api-Version``), or a function that returns it.
        server: The ``Server`` header.
        is_private: Returns whether a request came on a socket that only processes of this node open.
        objects: Objects for authorization, or None if every client may do everything.
    """
    app = web.Application(
        client_max_size=MAX_BODY_BYTES,
        middlewares=[_with_plain_path, _translate_errors, _read_version, _close_on_late_error],
    )
    if objects is not None:
        app[_OBJECTS] = objects
        app.middlewares.append(_authorize)
    app[_NEWEST] = (lambda: newest) if isinstance(newest, ApiVersion) else newest
    app[_SERVER] = server
    app[IS_PRIVATE] = is_private
    app.on_response_prepare.append(_add_headers)
    versioned = web.UrlDispatcher()
    for route in (route for table in tables for route in table):
        assert isinstance(route, web.RouteDef), "only plain routes can have a version before them"
        for router in (app.router, versioned):
            # not route.register(), which would also add HEAD for each GET, unlike the engine
            router.add_route(route.method, route.path, route.handler)
    app.router.register_resource(_Versioned(versioned))
    return app


def insert_in_errors(app: web.Application, middleware: Any) -> None:
    """Insert a middleware that may replace the errors of all others, before they become responses."""
    app.middlewares.insert(app.middlewares.index(_translate_errors) + 1, middleware)


class _Versioned(AbstractResource):
    """All routes under ``/v<version>``, and without it if slashes are doubled or at the end.

    If each route's pattern contained the version, aiohttp could not index the routes.  It would try one pattern after
    another, which takes 50 to 130 µs for each request.
    """

    def __init__(self, router: web.UrlDispatcher) -> None:
        super().__init__()
        self._router = router

    @property
    def canonical(self) -> str:
        return "/v{version}"

    async def resolve(self, request: web.Request) -> tuple[web.UrlMappingMatchInfo | None, set[str]]:
        sent = request.rel_url.path_safe
        path = plain_path(sent)
        match = _VERSIONED_PATH.fullmatch(path)
        if match is None and path == sent:
            return None, set()
        rest = _Unversioned(request.method, _Url(match[2] if match is not None else path))
        found = await self._router.resolve(rest)  # type: ignore[arg-type]
        if not isinstance(found, web.UrlMappingMatchInfo) or found.http_exception is not None:
            return None, set()
        if match is not None:
            found["version"] = match[1]
        if path != sent:
            request[_PLAIN] = True
        return found, {request.method}

    def raw_match(self, path: str) -> bool:
        return path == self.canonical

    def url_for(self, **_kwargs: str) -> URL:
        raise NotImplementedError("requests are resolved by it, no URLs are made")

    def add_prefix(self, _prefix: str) -> None:
        raise NotImplementedError("it is at the root")

    def get_info(self) -> Any:
        return {"path": self.canonical}

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[web.AbstractRoute]:
        return iter(())


class _Url(msgspec.Struct, frozen=True):
    path_safe: str


class _Unversioned(msgspec.Struct, frozen=True):
    """The parts of a request that a router reads."""

    method: str
    rel_url: _Url


_VERSIONED_PATH = re.compile(r"/v([0-9.]+)(/.*)")


def runner(app: web.Application, **options: Any) -> web.AppRunner:
    """Return the runner that serves ``app``.  The caller adds sites.  ``options`` add to aiohttp's, or replace them.

    A handler is cancelled when its client disconnects, so that a stream without a reader ends at once.
    """
    settings: dict[str, Any] = {
        "access_log": None,
        "handler_cancellation": True,
        "shutdown_timeout": 2.0,
        "max_line_size": _HEAD_BYTES_MAX,
        "max_field_size": _HEAD_BYTES_MAX,
    }
    return web.AppRunner(app, **settings | options)


def api_version(request: web.Request) -> ApiVersion:
    """Return the API version of ``request``."""
    return request[VERSION_KEY]


async def read_json(request: web.Request, type_: type[T], *, unrecognized: Unrecognized | None = None) -> T:
    """Return the body of ``request`` as ``type_``, decoded by Go's rules (see ``bodies``).

    ``unrecognized`` returns the engine's errors for values outside of an enumeration.

    Raises:
        InvalidArgument: It is not JSON of that type.
        ResourceExhausted: It is longer than ``MAX_BODY_BYTES``.
    """
    body = await read_body(request)
    if len(body) < _LARGE_BODY:
        return decode_body(body, type_, unrecognized=unrecognized)
    return await asyncio.to_thread(decode_body, body, type_, unrecognized=unrecognized)


async def read_body(request: web.Request) -> bytes:
    """Return the whole body of ``request``.  Raises: ResourceExhausted."""
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(request) from None


def _too_large(request: web.Request) -> ResourceExhausted:
    """Return the error for a body over the limit.  The engine itself has no limit, but gRPC's limit is the same."""
    size = request.content_length or MAX_BODY_BYTES + 1
    return ResourceExhausted(
        "rpc error: code = ResourceExhausted desc = grpc: received message larger than max "
        f"({size} vs. {MAX_BODY_BYTES})"
    )


_FALSE = frozenset({"", "0", "no", "false", "none"})


def flag(request: web.Request, name: str) -> bool:
    """Return the query parameter ``name`` as a boolean by the engine's rule.

    Everything except 0, no, false, none and the empty string is true.
    """
    return request.query.get(name, "").strip().lower() not in _FALSE


@web.middleware
async def _with_plain_path(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Pass handlers the path that was routed, because some of them choose the action by its end."""
    if _PLAIN in request:
        url = request.rel_url
        path = plain_path(url.raw_path)
        request = request.clone(rel_url=url.with_path(path, encoded=True, keep_query=True))
    return await handler(request)


@web.middleware
async def _translate_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Translate errors into responses.  No other code does so."""
    try:
        return await handler(request)
    except NotModified:
        return web.Response(status=304)
    except SkepError as error:
        return _error_response(request, status_of(error), str(error))
    except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
        if request.method == "OPTIONS":  # an empty response for any path
            return web.Response()
        return _error_response(request, 404, "page not found")
    except web.HTTPRequestEntityTooLarge:
        refusal = _too_large(request)
        return _error_response(request, status_of(refusal), str(refusal))
    except web.HTTPException:
        raise
    except ConnectionResetError:
        raise  # the client disconnected while a stream was sent
    except Exception:
        log.exception("request failed", method=request.method, path=request.path)
        return _error_response(request, 500, "internal error (the daemon's log has the details)")


@web.middleware
async def _close_on_late_error(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Close the connection if a response fails after its head was sent, because an error response can no longer be
    sent.
    """
    try:
        return await handler(request)
    except ConnectionResetError:
        raise
    except Exception as error:
        if not request.get(_HAS_BEGUN):
            raise
        is_bug = not isinstance(error, SkepError)
        log.warning("response aborted", path=request.path, error=str(error), exc_info=is_bug)
        if request.transport is not None:
            request.transport.close()
        raise ConnectionResetError("the response was aborted") from error


@web.middleware
async def _read_version(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Read the requested version, and refuse unsupported versions."""
    if request.match_info.http_exception is None:
        request[VERSION_KEY] = requested(request.match_info.get("version"), request.app[_NEWEST]())
    return await handler(request)


@web.middleware
async def _authorize(request: web.Request, handler: Handler) -> web.StreamResponse:
    return await respond_if_authorized(request, handler, request.app[_OBJECTS])


_LAST_WITH_PLAIN_ERRORS = ApiVersion("1.23")


def _error_response(request: web.Request, status: int, message: str) -> web.Response:
    prefix = request.match_info.get("version")
    if prefix is not None and ApiVersion(prefix) <= _LAST_WITH_PLAIN_ERRORS:
        return web.Response(text=message + "\n", status=status, headers={"X-Content-Type-Options": "nosniff"})
    return json_response({"message": message}, status)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Add the headers of every response for a known path."""
    request[_HAS_BEGUN] = True
    if response.status != 101 and is_of_token(request):
        response.force_close()
        response.headers["Connection"] = "close"
    if request.match_info.http_exception is not None:
        response.headers.popall("Server", None)
        return
    response.headers.update(common_headers(request.app[_NEWEST](), request.app[_SERVER]))


def common_headers(newest: ApiVersion, server: str = SERVER) -> dict[str, str]:
    """Return the headers of every response.  ``newest`` is the highest supported API version."""
    return {
        "Api-Version": str(newest),
        "Docker-Experimental": "false",
        "Ostype": "linux",
        "Server": server,
    }
