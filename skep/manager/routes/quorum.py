"""``/skep/quorum``: whether there is a leader, from local knowledge.  Responds at once, also without a leader."""

from aiohttp import web
from msgspec.structs import replace

from skep.api.server import Routes, json_answer
from skep.manager.routes.access import manager_of

routes = Routes()


@routes.get("/skep/quorum")
async def show_quorum(request: web.Request) -> web.Response:
    """For ``docker info`` and ``skep status``, before any request that would wait for a leader."""
    manager = manager_of(request)
    return json_answer(replace(manager.quorum(), own_error=manager.own_error()))
