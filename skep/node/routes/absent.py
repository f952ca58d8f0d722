"""Kinds of objects that a node without an engine never has: plugins, and networks of its own.

``docker inspect NAME`` asks for objects of every kind until one is found, so it must hear that they are not there.
"""

from aiohttp import web

from skep.api.server import Routes, json_answer
from skep.errors import NotFound

routes = Routes()


@routes.get("/plugins")
@routes.get("/networks")
async def list_none(request: web.Request) -> web.StreamResponse:
    """A manager answers for networks itself; on a worker the cluster's are not known."""
    return json_answer([])


@routes.get("/plugins/{name:.+}/json")
async def inspect_plugin(request: web.Request) -> web.StreamResponse:
    raise NotFound(f'plugin "{request.match_info["name"]}" not found')


@routes.get("/networks/{name}")
async def inspect_network(request: web.Request) -> web.StreamResponse:
    raise NotFound(f"network {request.match_info['name']} not found")
