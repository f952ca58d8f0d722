"""``/skep/cluster/store``: how full this manager's copy of the store is."""

from aiohttp import web

from skep.api.server import Routes, json_answer
from skep.errors import Unavailable
from skep.manager.routes.access import manager_of
from skep.model.encoding import ApiObject

routes = Routes()


class StoreAnswer(ApiObject):
    """In bytes: the file, what is in use of it, and the quota."""

    size: int
    in_use: int
    quota: int
    summary: str


@routes.get("/skep/cluster/store")
async def store_space(request: web.Request) -> web.Response:
    """Works without a leader, too."""
    space = await manager_of(request).store.space()
    if space is None:
        raise Unavailable("this manager's store has no file")
    summary = f"{space.summary}; reached its quota" if space.has_alarm else space.summary
    return json_answer(StoreAnswer(size=space.size, in_use=space.in_use, quota=space.quota, summary=summary))
