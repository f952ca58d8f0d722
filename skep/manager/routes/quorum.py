"""``/skep/quorum``: whether there is a leader, as this manager knows it.  Answers at once, also when there is none."""

from aiohttp import web

from skep.api.server import Routes, json_answer
from skep.manager.routes.access import manager_of

routes = Routes()


@routes.get("/skep/quorum")
async def show_quorum(request: web.Request) -> web.Response:
    """What ``docker info`` and ``skep status`` ask before anything that would wait for a leader."""
    return json_answer(manager_of(request).quorum())
