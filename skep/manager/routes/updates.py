"""``/skep/services/{id}/update/{verb}``: pause, resume or abort an update that is under way.  Ours, not Docker's."""

from aiohttp import web

from skep.api.server import Routes, json_response
from skep.manager.control import updates as control
from skep.manager.routes.access import current_view, manager_of, version_parameter
from skep.manager.routes.shown import problems_of, shown_service
from skep.model.service import Service

routes = Routes()


@routes.post("/skep/services/{id}/update/pause")
async def pause_update(request: web.Request) -> web.StreamResponse:
    """Begin with no further task of the update; it stays paused over changes of leader."""
    manager = manager_of(request)
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    return _shown(request, await manager.update(control.pause_update, service.id, now=manager.now()))


@routes.post("/skep/services/{id}/update/resume")
async def resume_update(request: web.Request) -> web.StreamResponse:
    """Let a paused update go on; failures until now do not count any more."""
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    return _shown(request, await manager_of(request).update(control.resume_update, service.id))


@routes.post("/skep/services/{id}/update/abort")
async def abort_update(request: web.Request) -> web.StreamResponse:
    """Return to the previous spec (``version``: of the service, as it was read)."""
    manager = manager_of(request)
    version = version_parameter(request, "service")
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    changed = await manager.update(control.abort_update, service.id, version, now=manager.now())
    return _shown(request, changed)


def _shown(request: web.Request, service: Service) -> web.StreamResponse:
    return json_response(shown_service(problems_of(manager_of(request).store.view(), Service), service))
