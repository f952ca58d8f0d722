"""Kinds of objects that do not exist here: plugins, caches of builds.

``docker inspect NAME`` tries objects of every kind until one is found, so they have to be reported as not found;
``docker system prune`` prunes every kind.
"""

from aiohttp import web

from skep.api.server import Routes, json_answer
from skep.errors import NotFound

routes = Routes()


@routes.get("/plugins")
async def list_none(request: web.Request) -> web.StreamResponse:
    return json_answer([])


@routes.get("/plugins/{name:.+}/json")
async def inspect_plugin(request: web.Request) -> web.StreamResponse:
    raise NotFound(f'plugin "{request.match_info["name"]}" not found')


@routes.post("/build/prune")
async def prune_none(request: web.Request) -> web.StreamResponse:
    return json_answer({"CachesDeleted": None, "SpaceReclaimed": 0})
