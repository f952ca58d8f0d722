"""``/skep/services/{id}/{verb}`` stops or starts a service, ``/skep/services/{id}/update/{verb}`` pauses, resumes or
aborts its update.  Skep extensions.
"""

from aiohttp import web

from skep.api.access.identity import identity_of
from skep.api.http.server import Routes, json_response
from skep.manager.control import stops
from skep.manager.control import updates as control
from skep.manager.control.quotas import bounded
from skep.manager.control.validation.new_objects import stack_of
from skep.manager.routes.access import current_view, manager_of, version_parameter
from skep.manager.routes.representations import problems_of, shown_service
from skep.model.service import Service

routes = Routes()


@routes.post("/skep/services/{id}/update/pause")
async def pause_update(request: web.Request) -> web.StreamResponse:
    """Pause an update, so that it starts no further task.  It stays paused when the leader changes."""
    manager = manager_of(request)
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    return _shown(request, await manager.update(control.pause_update, service.id, now=manager.now()))


@routes.post("/skep/services/{id}/update/resume")
async def resume_update(request: web.Request) -> web.StreamResponse:
    """Resume a paused update.  Earlier failures no longer count."""
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    return _shown(request, await manager_of(request).update(control.resume_update, service.id))


@routes.post("/skep/services/{id}/update/abort")
async def abort_update(request: web.Request) -> web.StreamResponse:
    """Return to the previous spec.  ``version`` is the version of the service as it was read."""
    manager = manager_of(request)
    version = version_parameter(request, "service")
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    is_admin = identity_of(request).is_admin
    abort = bounded(control.abort_update, stack_of(service.spec.labels), is_admin=is_admin)
    changed = await manager.update(abort, service.id, version, now=manager.now())
    return _shown(request, changed)


@routes.post("/skep/services/{id}/stop")
async def stop_service(request: web.Request) -> web.StreamResponse:
    """Stop all tasks of a service.  Its spec keeps the number of replicas."""
    manager = manager_of(request)
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    return _shown(request, await manager.update(stops.stop_service, service.id, now=manager.now()))


@routes.post("/skep/services/{id}/start")
async def start_service(request: web.Request) -> web.StreamResponse:
    """Start a stopped service."""
    manager = manager_of(request)
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    is_admin = identity_of(request).is_admin
    start = bounded(stops.start_service, stack_of(service.spec.labels), is_admin=is_admin)
    return _shown(request, await manager.update(start, service.id, now=manager.now()))


def _shown(request: web.Request, service: Service) -> web.StreamResponse:
    return json_response(shown_service(problems_of(manager_of(request).store.view(), Service), service))
