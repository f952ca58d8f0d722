"""BuildKit's routes.  Their modules take 0.8 MB, which few nodes need, so the first request imports them."""

import asyncio
from collections.abc import Iterable, Mapping
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler

from skep.aio.clock import Clock
from skep.engine.build.builder import Builder

_PATHS = ("/session", "/grpc", "/build/cancel")


def with_buildkit(
    builder: Builder, clock: Clock, classic: Iterable[web.RouteDef]
) -> list[web.AbstractRouteDef]:
    """Return the ``classic`` routes of builds together with BuildKit's."""
    first_use = _FirstUse(builder, clock)

    def either(route: web.RouteDef) -> web.RouteDef:
        async def handle(request: web.Request) -> web.StreamResponse:
            if request.query.get("version") == "2":
                return await first_use.handle("/build", request)
            response: web.StreamResponse = await route.handler(request)
            return response

        return web.post(route.path, handle) if route.path == "/build" else route

    return [*map(either, classic), *(web.post(path, partial(first_use.handle, path)) for path in _PATHS)]


class _FirstUse:
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
