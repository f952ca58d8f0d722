"""All routes of Docker's API that an engine serves by itself."""

import asyncio
from collections.abc import Iterable, Mapping
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler

from skep.aio.clock import Clock
from skep.api.http.server import Routes, json_response
from skep.engine.api.builds import build_routes
from skep.engine.api.commits import commit_routes
from skep.engine.api.containers import container_routes, image_users
from skep.engine.api.disk_usage import disk_usage_routes
from skep.engine.api.images import image_routes
from skep.engine.api.volumes import volume_routes
from skep.engine.build.builder import Builder
from skep.engine.engine import Engine
from skep.errors import NotFound

_BUILDKIT_PATHS = ("/session", "/grpc", "/build/cancel")


def with_buildkit(
    builder: Builder, clock: Clock, classic: Iterable[web.RouteDef]
) -> list[web.AbstractRouteDef]:
    """Return the ``classic`` routes of builds together with BuildKit's."""
    buildkit = _BuildKit(builder, clock)

    def either(route: web.RouteDef) -> web.RouteDef:
        async def handle(request: web.Request) -> web.StreamResponse:
            if request.query.get("version") == "2":
                return await buildkit.handle("/build", request)
            response: web.StreamResponse = await route.handler(request)
            return response

        return web.post(route.path, handle) if route.path == "/build" else route

    return [
        *map(either, classic),
        *(web.post(path, partial(buildkit.handle, path)) for path in _BUILDKIT_PATHS),
    ]


class _BuildKit:
    """BuildKit's handlers.  The first request imports their modules: they take 0.8 MB, and few nodes need them."""

    def __init__(self, builder: Builder, clock: Clock) -> None:
        self._builder = builder
        self._clock = clock
        self._turn = asyncio.Lock()
        self._handlers: Mapping[str, Handler] = {}

    async def handle(self, path: str, request: web.Request) -> web.StreamResponse:
        async with self._turn:
            if not self._handlers:
                await asyncio.to_thread(_import)  # so that the event loop continues meanwhile
                from skep.engine.buildkit.routes import buildkit_for, handlers

                self._handlers = handlers(buildkit_for(self._builder, self._clock))
        return await self._handlers[path](request)


def _import() -> None:
    from skep.engine.buildkit import routes  # noqa: F401


def engine_routes(engine: Engine, clock: Clock) -> tuple[web.AbstractRouteDef, ...]:
    """Return the routes of containers, execs, images, builds, volumes and disk usage.

    ``POST /containers/create`` is separate (``containers.create_routes``), because next to a Docker Engine it depends
    on the container's networks.
    """
    builder = Builder(engine, engine.images.builds, clock)
    return (
        *image_routes(engine.images, lambda: image_users(engine), clock=clock),
        *container_routes(engine, clock),
        *commit_routes(engine, clock),
        *volume_routes(engine.volumes, engine.list),
        *disk_usage_routes(engine, builder.mounts, clock),
        *with_buildkit(builder, clock, build_routes(builder)),
        *absent_routes(),
    )


def absent_routes() -> Routes:
    """Return the routes of objects that Skep does not have: plugins.

    ``docker inspect NAME`` tries all kinds of objects until one is found, so these must be reported as not found.
    """
    table = Routes()

    @table.get("/plugins")
    async def list_plugins(request: web.Request) -> web.StreamResponse:
        return json_response([])

    @table.get("/plugins/{name:.+}/json")
    async def inspect_plugin(request: web.Request) -> web.StreamResponse:
        raise NotFound(f'plugin "{request.match_info["name"]}" not found')

    return table
