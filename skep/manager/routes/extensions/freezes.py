"""Times in which Skep changes nothing by itself: ``/skep/cluster/freezes``, ``/skep/cluster/freeze``,
``/skep/cluster/window`` and ``/skep/stacks/{name}/freeze``.  A Skep extension.
"""

from aiohttp import web

from skep.api.access.identity import identity_of
from skep.api.access.permissions import sees
from skep.api.http.server import Routes, json_response, read_json
from skep.manager.cluster import cluster_of
from skep.manager.routes.access import current_view, manager_of
from skep.manager.routes.guard.audit import author_of
from skep.manager.services import freezes as control
from skep.model.options.freezes import CLUSTER, FreezeRequest, FreezesResponse, MaintenanceWindow

routes = Routes()


@routes.get("/skep/cluster/freezes")
async def list_freezes(request: web.Request) -> web.StreamResponse:
    """Show the freezes in force, and the window.  Users see the cluster's freeze and their stacks' freezes."""
    swarm, identity = cluster_of(await current_view(request)), identity_of(request)
    seen = {
        scope: one
        for scope, one in sorted(swarm.change_freezes.items())
        if scope == CLUSTER or sees(identity, scope)
    }
    return json_response(FreezesResponse(freezes=seen, window=swarm.window))


@routes.put("/skep/cluster/freeze")
async def freeze_cluster(request: web.Request) -> web.StreamResponse:
    """Freeze the cluster, or renew its freeze."""
    return await _freeze(request, CLUSTER)


@routes.put("/skep/stacks/{name}/freeze")
async def freeze_stack(request: web.Request) -> web.StreamResponse:
    """Freeze a stack, or renew its freeze."""
    return await _freeze(request, request.match_info["name"])


async def _freeze(request: web.Request, scope: str) -> web.StreamResponse:
    manager, wanted = manager_of(request), await read_json(request, FreezeRequest)
    now_ns = manager.clock.now_ns()
    made = await manager.update(control.set_freeze, scope, wanted, by=author_of(request), now_ns=now_ns)
    return json_response(made)


@routes.delete("/skep/cluster/freeze")
async def unfreeze_cluster(request: web.Request) -> web.StreamResponse:
    """End the cluster's freeze."""
    await manager_of(request).update(control.end_freeze, CLUSTER)
    return web.Response(status=204)


@routes.delete("/skep/stacks/{name}/freeze")
async def unfreeze_stack(request: web.Request) -> web.StreamResponse:
    """End the freeze of a stack."""
    await manager_of(request).update(control.end_freeze, request.match_info["name"])
    return web.Response(status=204)


@routes.put("/skep/cluster/window")
async def set_window(request: web.Request) -> web.StreamResponse:
    """Set the maintenance window."""
    manager, wanted = manager_of(request), await read_json(request, MaintenanceWindow)
    window = await manager.update(control.set_window, wanted, now_ns=manager.clock.now_ns())
    return json_response(window)


@routes.delete("/skep/cluster/window")
async def remove_window(request: web.Request) -> web.StreamResponse:
    """Remove the maintenance window, so that Skep may act by itself at any time."""
    manager = manager_of(request)
    await manager.update(control.set_window, None, now_ns=manager.clock.now_ns())
    return web.Response(status=204)
