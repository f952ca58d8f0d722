"""The swarm half of the Engine API, with one module per resource.

``application(api)`` is the application that a manager serves on its socket.  Handlers decode the request, call
``manager.control`` in a transaction, and encode the response.
"""

from aiohttp import web

from skep.api.http.handover_server import is_passed
from skep.api.http.server import ApiVersion
from skep.api.http.server import application as engine_application
from skep.api.http.versions import NEWEST
from skep.manager.routes import (
    events,
    files,
    logs,
    networks,
    nodes,
    reach,
    services,
    swarm,
    tasks,
    volumes,
    warnings,
)
from skep.manager.routes.access import MANAGER, ManagerApi
from skep.manager.routes.extensions import (
    catalog,
    certificates,
    doctor,
    explain,
    history,
    jobs,
    maintenance,
    notifications,
    placement,
    stacks,
    state,
    updates,
    users,
    view,
    what_if,
)
from skep.manager.routes.guard.audit import record_request
from skep.manager.routes.guard.authorization import ClusterObjects

__all__ = ["ManagerApi", "application", "compile_routes"]

_TABLES = (
    # the most frequent ones come first, because the router tries one after the other
    services.routes,
    stacks.routes,
    tasks.routes,
    nodes.routes,
    swarm.routes,
    logs.routes,
    files.routes,
    networks.routes,
    volumes.routes,
    events.routes,
    history.routes,
    maintenance.routes,
    updates.routes,
    jobs.routes,
    users.routes,
    notifications.routes,
    certificates.routes,
    catalog.routes,
    explain.routes,
    placement.routes,
    what_if.routes,
    reach.routes,
    doctor.routes,
    state.routes,
    view.routes,
    warnings.routes,
)


def application(api: ManagerApi, *, newest: ApiVersion = NEWEST) -> web.Application:
    """Return an application that serves requests from ``api``.  ``newest`` is the API version that it announces."""
    # A connection that was not passed arrived on the manager's own socket, which processes of this node open.
    app = engine_application(
        *_TABLES,
        newest=newest,
        is_private=lambda request: not is_passed(request),
        objects=ClusterObjects(api.store),
    )
    app[MANAGER] = api
    # Insert before the last middleware, which checks the rights, so that refusals are recorded before they become
    # responses.
    app.middlewares.insert(len(app.middlewares) - 1, record_request)
    return app


def compile_routes() -> None:
    """Compile the patterns of all routes, before the first application is created."""
    engine_application(*_TABLES)
