"""Skep extensions for one service.

``/skep/services/{id}/revisions`` lists its specs, ``/skep/services/{id}/{verb}`` stops or starts it, and
``/skep/services/{id}/update/{verb}`` pauses, resumes or aborts its update, or changes the step of a staged one.
"""

from aiohttp import web

from skep.api.access.identity import identity_of
from skep.api.http.server import Routes, json_response
from skep.manager.control import updates as control
from skep.manager.control.quotas import bounded
from skep.manager.journal.changes import spec_changes
from skep.manager.routes.access import current_view, manager_of, version_parameter
from skep.manager.routes.guard.audit import author_of
from skep.manager.routes.guard.strict_freezes import unfrozen
from skep.manager.routes.representations import problems_of, shown_service
from skep.manager.services.spec_history import comparable, revisions
from skep.model.service import Service, ServiceSpec
from skep.model.values.encoding import ApiObject, always
from skep.model.values.stacks import stack_of
from skep.model.values.times import Timestamp

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


@routes.post("/skep/services/{id}/update/promote")
async def promote_update(request: web.Request) -> web.StreamResponse:
    """Begin the next step of a staged update at once."""
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    change = unfrozen(request, control.promote_update, stack_of(service.spec.labels))
    return _shown(request, await manager_of(request).update(change, service.id))


@routes.post("/skep/services/{id}/update/switch-back")
async def switch_back(request: web.Request) -> web.StreamResponse:
    """Return all new connections to the old tasks of a blue-green update, and pause it."""
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    change = unfrozen(request, control.switch_back, stack_of(service.spec.labels))
    return _shown(request, await manager_of(request).update(change, service.id))


@routes.post("/skep/services/{id}/update/abort")
async def abort_update(request: web.Request) -> web.StreamResponse:
    """Return to the previous spec.  ``version`` is the version of the service as it was read."""
    manager = manager_of(request)
    version = version_parameter(request, "service")
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    is_admin = identity_of(request).is_admin
    stack = stack_of(service.spec.labels)
    abort = unfrozen(request, bounded(control.abort_update, stack, is_admin=is_admin), stack)
    changed = await manager.update(abort, service.id, version, now=manager.now(), by=author_of(request))
    return _shown(request, changed)


class ShownRevision(ApiObject):
    """One spec of a service, in the response of ``GET /skep/services/{id}/revisions``."""

    number: int
    by: str = always("")
    """The author, or empty if unknown."""
    at: Timestamp = always(Timestamp(""))
    """Time of the request, or empty if unknown."""
    changes: tuple[str, ...] = always(())
    """The differences from the previous revision, in words.  The oldest revision has none."""
    spec: ServiceSpec = always(ServiceSpec())


@routes.get("/skep/services/{id}/revisions")
async def list_revisions(request: web.Request) -> web.StreamResponse:
    """List the last specs of a service, the present one last."""
    view = await current_view(request)
    found = revisions(view, view.resolve(Service, request.match_info["id"]))
    before = (None, *found)
    return json_response(
        [
            ShownRevision(
                number=one.number,
                by=one.author.by,
                at=one.author.at,
                changes=tuple(spec_changes(comparable(old.spec), comparable(one.spec))) if old else (),
                spec=one.spec,
            )
            for old, one in zip(before, found, strict=False)
        ]
    )


@routes.post("/skep/services/{id}/stop")
async def stop_service(request: web.Request) -> web.StreamResponse:
    """Stop all tasks of a service.  Its spec keeps the number of replicas."""
    manager = manager_of(request)
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    stop = unfrozen(request, control.stop_service, stack_of(service.spec.labels))
    return _shown(request, await manager.update(stop, service.id, now=manager.now()))


@routes.post("/skep/services/{id}/start")
async def start_service(request: web.Request) -> web.StreamResponse:
    """Start a stopped service."""
    manager = manager_of(request)
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    is_admin = identity_of(request).is_admin
    stack = stack_of(service.spec.labels)
    start = unfrozen(request, bounded(control.start_service, stack, is_admin=is_admin), stack)
    return _shown(request, await manager.update(start, service.id, now=manager.now()))


def _shown(request: web.Request, service: Service) -> web.StreamResponse:
    return json_response(shown_service(problems_of(manager_of(request).store.view(), Service), service))
