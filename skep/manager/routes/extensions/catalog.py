"""``/skep/catalog``: where services are reached, and ``/skep/registrations``: services on machines outside.

All are Skep extensions.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web

from skep.aio.time_slices import result_in_slices
from skep.api.access.identity import identity_of
from skep.api.access.permissions import sees
from skep.api.http.server import Routes, json_response, read_json
from skep.errors import InvalidArgument
from skep.manager.catalog.building import built_catalog
from skep.manager.catalog.registrations import checked, deregister, is_record, name_of, register, renew
from skep.manager.routes.access import ManagerApi, current_view, manager_of
from skep.model.catalog import WAIT_S_MAX, CatalogAnswer, ServiceRegistration
from skep.model.node import Node, differ_in_load_alone
from skep.model.service import Service
from skep.model.task import Task
from skep.store.interface import Commit, Event, Updated, View, WatchLagged
from skep.store.kinds import Payload

routes = Routes()

_SETTLES_S = 0.2
"""Seconds to wait for further changes after the first one, because a deploy changes many tasks at once."""


@routes.get("/skep/catalog")
async def show_catalog(request: web.Request) -> web.StreamResponse:
    """Return the services that the user sees.

    With ``after``, the digest of an earlier response, wait up to ``wait`` seconds until the content differs.
    """
    after, wait_s = request.query.get("after", ""), _wait_s(request.query.get("wait", "0"))
    manager = manager_of(request)
    answer = await _answer(request, await current_view(request))
    if answer.digest == after and wait_s:
        async with manager.catalog_readers.hold():
            answer = await _wait_changed(request, manager, after, wait_s) or answer
    return json_response(CatalogAnswer(digest=after) if answer.digest == after else answer)


@routes.put("/skep/registrations/{name}")
async def put_registration(request: web.Request) -> web.StreamResponse:
    """Register a service on a machine outside of the cluster, or replace its registration."""
    manager = manager_of(request)
    registration = checked(await read_json(request, ServiceRegistration))
    if name_of(registration) != request.match_info["name"]:
        raise InvalidArgument(
            f"the body is about {name_of(registration)}, and the path about {request.match_info['name']}: "
            "use the same name"
        )
    await manager.require_room(creates=True)
    await manager.update(register, registration)
    return web.Response(status=204)


@routes.post("/skep/registrations/{name}/renew")
async def renew_registration(request: web.Request) -> web.StreamResponse:
    """Renew the lease of a registration."""
    await manager_of(request).update(renew, request.match_info["name"])
    return web.Response(status=204)


@routes.delete("/skep/registrations/{name}")
async def delete_registration(request: web.Request) -> web.StreamResponse:
    """Remove a registration."""
    await manager_of(request).update(deregister, request.match_info["name"])
    return web.Response(status=204)


def _wait_s(word: str) -> float:
    try:
        wait_s = float(word)
    except ValueError:
        wait_s = -1.0
    if not 0 <= wait_s <= WAIT_S_MAX:
        raise InvalidArgument(f"invalid wait {word!r}: expected 0 to {WAIT_S_MAX:g} seconds")
    return wait_s


async def _answer(request: web.Request, view: View) -> CatalogAnswer:
    identity, manager = identity_of(request), manager_of(request)
    return await result_in_slices(built_catalog(view, lambda stack: sees(identity, stack)), manager.clock)


async def _wait_changed(
    request: web.Request, manager: ManagerApi, after: str, wait_s: float
) -> CatalogAnswer | None:
    """Return the first catalog whose digest is not ``after``, or None after ``wait_s``."""
    try:
        async with asyncio.timeout(wait_s), aclosing(_views(manager)) as views:
            async for view in views:
                answer = await _answer(request, view)
                if answer.digest != after:
                    return answer
    except (TimeoutError, WatchLagged):
        pass
    return None


async def _views(manager: ManagerApi) -> AsyncGenerator[View, None]:
    """Yield the present view, and another one after each change of the catalog's objects."""
    async with manager.store.watch(Service, Task, Node, Payload) as watch:
        yield watch.snapshot
        async for commit in watch:
            if _concerns(commit):
                await manager.clock.sleep(_SETTLES_S)
                for _ in watch.waiting():
                    pass
                yield manager.store.view()


def _concerns(commit: Commit) -> bool:
    return any(map(_is_of_catalog, commit.events))


def _is_of_catalog(event: Event) -> bool:
    object = event.new if isinstance(event, Updated) else event.object
    if isinstance(object, Payload):
        return is_record(object.id)
    if isinstance(event, Updated) and isinstance(event.old, Node) and isinstance(event.new, Node):
        return not differ_in_load_alone(event.old, event.new)
    return True
