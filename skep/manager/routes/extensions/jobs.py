"""``/skep/jobs``, ``/skep/services/{id}/run`` and ``/retry``: jobs with their schedules.  A Skep extension."""

import asyncio

from aiohttp import web

from skep.api.http.server import Routes, json_list_response, json_response
from skep.errors import InvalidArgument
from skep.manager.control import jobs as control
from skep.manager.routes.access import current_view, manager_of
from skep.manager.services.job_listing import Job, shown_job
from skep.model.options.schedules import JOB_MODES
from skep.model.service import Service

routes = Routes()

_PIECE = 50
"""Number of jobs between two pauses for the event loop."""


@routes.get("/skep/jobs")
async def list_jobs(request: web.Request) -> web.StreamResponse:
    """List every job with its last and next run, in order of id."""
    view = await current_view(request)
    ids = [service.id for service in view.find(Service) if service.spec.mode.name in JOB_MODES]
    jobs: list[Job] = []
    for number, id in enumerate(ids):
        service = view.lookup(Service, id)
        if service is not None and service.removed_at is None:
            jobs.append(shown_job(view, service))
        if number % _PIECE == _PIECE - 1:
            await asyncio.sleep(0)
            view = manager_of(request).store.view()
    return json_list_response(jobs)


@routes.post("/skep/services/{id}/run")
async def run_job(request: web.Request) -> web.StreamResponse:
    """Start the next run of a job now.  With ``replace``, even while the current run is active."""
    manager = manager_of(request)
    word = request.query.get("replace", "false")
    if word not in ("true", "false"):
        raise InvalidArgument(f"invalid replace {word!r}: expected true or false")
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    changed = await manager.update(control.run_job, service.id, now=manager.now(), replaces=word == "true")
    return json_response(shown_job(manager.store.view(), changed))


@routes.post("/skep/services/{id}/retry")
async def retry_job(request: web.Request) -> web.StreamResponse:
    """Retry the failed slots of a job's current run."""
    manager = manager_of(request)
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    changed = await manager.update(control.retry_job, service.id)
    return json_response(shown_job(manager.store.view(), changed))
