"""All routes of Docker's API that an engine serves by itself."""

import asyncio
from collections.abc import Mapping
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler

from skep.aio.clock import Clock
from skep.api.http.server import Routes, json_response
from skep.engine.api.commits import commit_routes
from skep.engine.api.containers import container_routes, image_users
from skep.engine.api.disk_usage import disk_usage_routes
from skep.engine.api.images import image_routes
from skep.engine.api.volumes import volume_routes
from skep.engine.build.cache.cache import CacheMounts
from skep.engine.engine import Engine
from skep.errors import NotFound

_CLASSIC_PATHS = ("/build", "/build/prune")
_BUILDKIT_PATHS = ("/session", "/grpc", "/build/cancel")


class _Builds:
    """Handlers of builds.  The first request imports their modules: they take 2.5 MB, and few nodes need them."""

    def __init__(self, engine: Engine, mounts: CacheMounts, clock: Clock) -> None:
        self._engine = engine
        self._mounts = mounts
        self._clock = clock
        self._turn = asyncio.Lock()
        self._classic: Mapping[str, Handler] = {}
        self._buildkit: Mapping[str, Handler] = {}

    def routes(self) -> list[web.RouteDef]:
        return [web.post(path, partial(self._handle, path)) for path in (*_CLASSIC_PATHS, *_BUILDKIT_PATHS)]

    async def _handle(self, path: str, request: web.Request) -> web.StreamResponse:
        async with self._turn:
            if not self._classic:
                await asyncio.to_thread(_import)  # so that the event loop continues meanwhile
                self._prepare()
        is_buildkit = path in _BUILDKIT_PATHS or (path == "/build" and request.query.get("version") == "2")
        return await (self._buildkit if is_buildkit else self._classic)[path](request)

    def _prepare(self) -> None:
        from skep.engine.api.builds import build_routes
        from skep.engine.build.builder import Builder
        from skep.engine.buildkit.routes import buildkit_for, handlers

        engine = self._engine
        builder = Builder(engine, engine.images.builds, self._clock, self._mounts)
        self._classic = {route.path: route.handler for route in build_routes(builder)}
        self._buildkit = handlers(buildkit_for(builder, self._clock))


def _import() -> None:
    from skep.engine.api import builds  # noqa: F401
    from skep.engine.buildkit import routes  # noqa: F401


def engine_routes(engine: Engine, clock: Clock) -> tuple[web.AbstractRouteDef, ...]:
    """Return the routes of containers, execs, images, builds, volumes and disk usage.

    ``POST /containers/create`` is separate (``containers.create_routes``), because next to a Docker Engine it depends
    on the container's networks.
    """
    mounts = CacheMounts(engine.images.builds / "mounts")
    return (
        *image_routes(engine.images, lambda: image_users(engine), clock=clock),
        *container_routes(engine, clock),
        *commit_routes(engine, clock),
        *volume_routes(engine.volumes, engine.list),
        *disk_usage_routes(engine, mounts, clock),
        *_Builds(engine, mounts, clock).routes(),
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
