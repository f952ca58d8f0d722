"""``/skep/stacks/{name}/quota``: limits of a stack's services together.  A Skep extension."""

from aiohttp import web
from msgspec.structs import replace

from skep.api.http.server import Routes, json_response, read_json
from skep.errors import NotFound
from skep.manager.control import quotas as control
from skep.manager.routes.access import current_view, manager_of
from skep.manager.services.quotas import quota_of
from skep.model.quota import QuotaSpec

routes = Routes()


@routes.get("/skep/stacks/{name}/quota")
async def show_quota(request: web.Request) -> web.StreamResponse:
    """Show the quota of a stack and its usage."""
    view, name = await current_view(request), request.match_info["name"]
    quota = quota_of(view, name)
    if quota is None:
        raise NotFound(f"stack {name} has no quota")
    return json_response(control.quota_state(view, quota))


@routes.put("/skep/stacks/{name}/quota")
async def set_quota(request: web.Request) -> web.StreamResponse:
    """Set the quota of a stack."""
    manager = manager_of(request)
    spec = replace(await read_json(request, QuotaSpec), name=request.match_info["name"])
    await manager.require_room(creates=True)
    quota = await manager.update(control.set_quota, spec, new_id=manager.new_id, now=manager.now())
    return json_response(control.quota_state(manager.store.view(), quota))


@routes.delete("/skep/stacks/{name}/quota")
async def remove_quota(request: web.Request) -> web.StreamResponse:
    """Remove the quota of a stack."""
    await manager_of(request).update(control.remove_quota, request.match_info["name"])
    return web.Response(status=204)
