"""``/_skep/lag``: the delays of this manager's event loop since its start.  Ours, on the manager's own socket only."""

from aiohttp import web

from skep.api.server import Routes, json_answer
from skep.manager.routes.access import manager_of

routes = Routes()


@routes.get("/_skep/lag")
async def loop_lag(request: web.Request) -> web.Response:
    """The measure that benchmarks and tests of responsiveness read."""
    return json_answer(manager_of(request).lag.seen())
