"""``/skep/view``: the cluster as the dashboard shows it, at once and as it changes; ``/ui``: the pages of it."""

import asyncio
from contextlib import aclosing

from aiohttp import web

from skep.api.server import Routes
from skep.dashboard.pages import RELAY_HEADER, page_response, pages
from skep.errors import NotFound, Unavailable
from skep.manager.routes.access import Sent, Watching, manager_of, past_of
from skep.model.times import SECOND_NS

routes = Routes()

TAKES_S_MAX = 60.0
"""For a viewer to take what is written; then its connection is dropped."""
_EVENT_STREAM = "text/event-stream"


@routes.get("/skep/view")
async def view_now(request: web.Request) -> web.StreamResponse:
    """All rows; from this manager's replica, so it works without a leader.

    ``at``: of an earlier state: a time, or ``revision:N``.
    """
    if when := request.query.get("at", ""):
        past = await past_of(request).at(when)
        rows = await _view_of(request).snapshot_of(past.view, past.at_ns / SECOND_NS)
        return web.Response(body=rows, content_type="application/json")
    return web.Response(body=await _view_of(request).snapshot(), content_type="application/json")


@routes.get("/skep/view/stream")
async def stream_view(request: web.Request) -> web.StreamResponse:
    """Server-sent events: a snapshot, then what changes.

    ``after``, or the header ``Last-Event-ID``: go on after the event with that id, if this manager can.
    """
    cursor = request.query.get("after", "") or request.headers.get("Last-Event-ID", "")
    async with aclosing(_view_of(request).watch(cursor)) as sent:
        first = await anext(sent)  # its refusal is an ordinary response
        response = web.StreamResponse(headers={"Content-Type": _EVENT_STREAM, "Cache-Control": "no-store"})
        await response.prepare(request)
        await _write(request, response, first)
        async for one in sent:
            await _write(request, response, one)
    return response


async def _write(request: web.Request, response: web.StreamResponse, one: Sent | None) -> None:
    """Raises: ConnectionResetError: the viewer has gone, or takes nothing."""
    data = b":\n\n" if one is None else _message(one)
    try:
        async with asyncio.timeout(TAKES_S_MAX):
            await response.write(data)
    except TimeoutError:
        if isinstance(request.transport, asyncio.WriteTransport):
            request.transport.abort()  # what was written would keep it open
        raise ConnectionResetError("the viewer takes nothing") from None


def _message(one: Sent) -> bytes:
    return b"id: %s\nevent: %s\ndata: %s\n\n" % (one.cursor.encode(), one.event.encode(), one.data)


def _view_of(request: web.Request) -> Watching:
    view = manager_of(request).cluster_view
    if view is None:
        raise Unavailable("this manager follows no cluster")
    return view


@routes.get("/ui")
@routes.get("/ui/")
@routes.get("/ui/{name}")
async def page(request: web.Request) -> web.StreamResponse:
    """One file of the dashboard, for `skep ui`: no browser can send its header by itself.

    Raises: NotFound.
    """
    if RELAY_HEADER not in request.headers:
        raise NotFound("the dashboard is opened by: skep ui")
    found = pages().get(name := request.match_info.get("name", ""))
    if found is None:
        raise NotFound("page not found")
    if not name and (view := manager_of(request).cluster_view) is not None:
        view.prepare()  # the rows of a large cluster are made while the browser starts
    return page_response(found, request.headers.get("If-None-Match", ""))
