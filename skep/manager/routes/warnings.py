"""``/_skep/warnings``: what ``docker info`` is to warn of.  Ours, on the manager's own socket only."""

from aiohttp import web

from skep.api.server import Routes, json_answer
from skep.manager.ca.expiry import expiring
from skep.manager.discovery.conflicts import data_path_warnings
from skep.manager.routes.access import manager_of
from skep.model.node import Node
from skep.model.times import moment

routes = Routes()


@routes.get("/_skep/warnings")
async def warnings(request: web.Request) -> web.Response:
    """Sentences, the most urgent first; from this manager's own state, so a cluster without a leader has them too."""
    manager = manager_of(request)
    now = moment(manager.clock.now_ns())
    view = manager.store.view()
    return json_answer(
        [*(expiry.warning for expiry in expiring(view, now)), *data_path_warnings(view.find(Node))]
    )
