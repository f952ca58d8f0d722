"""The swarm half of the Engine API, one module per resource.

``application(api)`` is what a manager serves on its socket.  Handlers decode, call ``manager.control`` in a
transaction, and encode.
"""

from aiohttp import web

from skep.api.passed import is_passed
from skep.api.server import ApiVersion
from skep.api.server import application as engine_application
from skep.api.versions import NEWEST
from skep.manager.routes import (
    backup,
    doctor,
    events,
    evictions,
    explain,
    files,
    history,
    jobs,
    logs,
    networks,
    nodes,
    placement,
    quotas,
    reach,
    runs,
    services,
    stack_checks,
    state,
    swarm,
    tasks,
    updates,
    users,
    view,
    volumes,
    warnings,
)
from skep.manager.routes.access import MANAGER, ManagerApi
from skep.manager.routes.audit import audited
from skep.manager.routes.authorization import ClusterObjects

__all__ = ["ManagerApi", "application", "compile_routes"]

_TABLES = (
    # most frequent first: the router tries one after another
    services.routes,
    stack_checks.routes,
    tasks.routes,
    nodes.routes,
    swarm.routes,
    logs.routes,
    files.routes,
    networks.routes,
    volumes.routes,
    events.routes,
    history.routes,
    evictions.routes,
    updates.routes,
    jobs.routes,
    users.routes,
    explain.routes,
    placement.routes,
    quotas.routes,
    runs.routes,
    reach.routes,
    backup.routes,
    doctor.routes,
    state.routes,
    view.routes,
    warnings.routes,
)


def application(api: ManagerApi, *, newest: ApiVersion = NEWEST) -> web.Application:
    """An application that serves requests from ``api``.   ``newest``: the API version it announces."""
    # What is not passed came on the manager's own socket, which the processes of this node open.
    app = engine_application(
        *_TABLES,
        newest=newest,
        is_private=lambda request: not is_passed(request),
        objects=ClusterObjects(api.store),
    )
    app[MANAGER] = api
    # Refusals are recorded, and errors have not become responses yet: the last one checks the rights.
    app.middlewares.insert(len(app.middlewares) - 1, audited)
    return app


def compile_routes() -> None:
    """Have the patterns of all routes compiled before the first application is made."""
    engine_application(*_TABLES)
