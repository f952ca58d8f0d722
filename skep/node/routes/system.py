"""``/_ping``, ``/version``, ``/info``, ``/events``; and the refusal of unsupported routes.

Source: moby 20.10, api/server/router/system/system_routes.go.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from aiohttp import web

from skep.api.server import Filters, JsonLines, Routes, json_answer
from skep.api.timestamps import period_of
from skep.errors import NotFound, Unimplemented
from skep.node.events import EventRequest, Message


class System(Protocol):
    """The node, as these routes use it."""

    @property
    def swarm_header(self) -> str:
        """The ``Swarm`` header of ``/_ping``."""

    def version(self) -> Mapping[str, Any]:
        """The response to ``GET /version``."""

    async def info(self) -> Mapping[str, Any]:
        """The response to ``GET /info``."""

    async def stream_events(self, request: EventRequest, send: Callable[[Message], Awaitable[None]]) -> None:
        """``send`` the requested events, past and present, until the requested end."""


SYSTEM: web.AppKey[System] = web.AppKey("system", System)

routes = Routes()
last_routes = Routes()
"""The application's last routes: they match every request that no other route matches."""


@routes.head("/_ping")
@routes.get("/_ping")
async def ping(request: web.Request) -> web.StreamResponse:
    """Alive; the headers have the version of the API."""
    headers = {
        "Cache-Control": "no-cache, no-store, must-revalidate",
        "Pragma": "no-cache",
        "Swarm": request.app[SYSTEM].swarm_header,
    }
    body = "" if request.method == "HEAD" else "OK"
    return web.Response(text=body, headers=headers, content_type="text/plain", charset="utf-8")


@routes.get("/version")
async def show_version(request: web.Request) -> web.StreamResponse:
    """``docker version``."""
    return json_answer(request.app[SYSTEM].version())


@routes.get("/info")
async def show_info(request: web.Request) -> web.StreamResponse:
    """``docker info``."""
    return json_answer(await request.app[SYSTEM].info())


@routes.get("/events")
async def stream_events(request: web.Request) -> web.StreamResponse:
    """Events of this node and of the cluster, one JSON object per line, each sent at once."""
    since, until = period_of(request)
    wanted = EventRequest(since, until, Filters.of(request), dict(request.query))
    async with JsonLines(request) as lines:
        await request.app[SYSTEM].stream_events(wanted, lines.send)
    return lines.response


_SUPPORTED_FAMILIES = (
    "_ping",
    "version",
    "info",
    "events",
    "swarm",
    "containers",
    "exec",
    "images",
    "distribution",
)
_REASONS = {
    "POST /containers/create": "this node runs plain commands of services, no containers",
    "POST /build": "images are not built here: build with docker or buildah and load the archive with docker load",
}


@last_routes.route("*", "/{tail:(?!v[0-9]).*}")  # what follows a version comes here as well
async def refuse(request: web.Request) -> web.StreamResponse:
    """A route of Docker's API that this node does not support."""
    path = "/" + request.match_info["tail"]
    family = path.split("/")[1]
    route = f"{request.method} {path}"
    if family in _SUPPORTED_FAMILIES and route not in _REASONS:
        raise NotFound("page not found")
    reason = _REASONS.get(route, "it is no part of the swarm API, nor about containers or images of services")
    raise Unimplemented(
        f"{route} is not answered by this node: {reason}; "
        "or give skep a Docker Engine to pass such requests on to (--engine-socket)"
    )
