"""Local state of this manager, which is available without a leader.  A Skep extension.

``/skep/quorum`` shows whether a leader exists.  ``/skep/cluster/store`` shows how full the manager's copy of the store
is.  ``/skep/cluster/level`` shows the level of the stored data, and is the only route here that needs a quorum.  On the
manager's own socket only, ``/_skep/lag`` shows the delays of its event loop since its start, and ``/_skep/metrics`` its
metrics.
"""

from collections.abc import Mapping

from aiohttp import web
from msgspec.structs import replace

from skep.api.http.server import Routes, json_response
from skep.errors import Unavailable
from skep.manager.routes.access import current_view, manager_of
from skep.model.node import Node
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId
from skep.store.level import LOWEST

routes = Routes()


@routes.get("/skep/quorum")
async def show_quorum(request: web.Request) -> web.Response:
    """Show the quorum state, for ``docker info`` and ``skep status`` before any request that would wait for
    a leader.
    """
    manager = manager_of(request)
    return json_response(replace(manager.quorum(), own_error=manager.own_error()))


class StoreResponse(ApiObject):
    """Sizes in bytes: the file, the part in use, and the quota."""

    size: int
    in_use: int
    quota: int
    summary: str


@routes.get("/skep/cluster/store")
async def store_space(request: web.Request) -> web.Response:
    """Show how full this manager's store is.  Raises: Unavailable: the store has no file (tests)."""
    space = await manager_of(request).store.space()
    if space is None:
        raise Unavailable("this manager's store has no file")
    summary = f"{space.summary}; reached its quota" if space.has_alarm else space.summary
    return json_response(
        StoreResponse(size=space.size, in_use=space.in_use, quota=space.quota, summary=summary)
    )


class LevelResponse(ApiObject):
    """Level of the stored data, and by manager id the newest level that each manager supports."""

    level: int
    managers: Mapping[NodeId, int] = always({})


@routes.get("/skep/cluster/level")
async def data_level(request: web.Request) -> web.Response:
    """Show the data level for ``skep upgrade``.  A manager does not start on a level that it does not support."""
    view = await current_view(request)
    return json_response(
        LevelResponse(
            level=view.level,
            managers={
                node.id: max(node.manager_status.level, LOWEST)
                for node in view.find(Node)
                if node.manager_status is not None
            },
        )
    )


@routes.get("/_skep/metrics")
async def metrics(request: web.Request) -> web.Response:
    """Return this manager's metric families, for the node's page.  Raises: Unavailable: without metrics (tests)."""
    found = manager_of(request).metrics
    if found is None:
        raise Unavailable("this manager has no metrics")
    return json_response(await found.families())


@routes.get("/_skep/lag")
async def loop_lag(request: web.Request) -> web.Response:
    """Return the event loop's delays, for benchmarks and tests of responsiveness."""
    return json_response(manager_of(request).lag.seen())
