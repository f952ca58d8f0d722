"""All routes of Docker's API that an engine serves by itself."""

from aiohttp import web

from skep.aio.clock import Clock
from skep.api.http.server import Routes, json_response
from skep.engine.api.buildkit import with_buildkit
from skep.engine.api.builds import build_routes
from skep.engine.api.commits import commit_routes
from skep.engine.api.containers import container_routes, image_users
from skep.engine.api.disk_usage import disk_usage_routes
from skep.engine.api.images import image_routes
from skep.engine.api.volumes import volume_routes
from skep.engine.build.builder import Builder
from skep.engine.engine import Engine
from skep.errors import NotFound


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
