"""``/skep/view``: the cluster for the dashboard, at once and as it changes.  ``/ui``: the dashboard's pages."""

import asyncio
from contextlib import aclosing

from aiohttp import web

from skep.api.http.server import Routes
from skep.dashboard.pages import RELAY_HEADER, page_response, pages
from skep.errors import NotFound, Unavailable
from skep.manager.routes.access import Sent, Watching, manager_of, past_of
from skep.model.values.times import SECOND_NS

routes = Routes()

TAKES_S_MAX = 60.0
"""Seconds that a viewer may take to read a message before its connection is dropped."""
_EVENT_STREAM = "text/event-stream"


@routes.get("/skep/view")
async def view_now(request: web.Request) -> web.StreamResponse:
    """Return all rows from this manager's replica.  Works without a leader.

    ``at`` selects an earlier state: a time or ``revision:N``.
    """
    if when := request.query.get("at", ""):
        past = await past_of(request).at(when)
        rows = await _view_of(request).snapshot_of(past.view, past.at_ns / SECOND_NS)
        return web.Response(body=rows, content_type="application/json")
    return web.Response(body=await _view_of(request).snapshot(), content_type="application/json")


@routes.get("/skep/view/stream")
async def stream_view(request: web.Request) -> web.StreamResponse:
    """Send server-sent events: a snapshot, then changes.

    ``after`` or the header ``Last-Event-ID`` resumes after the event with that id, if this manager can.
    """
    cursor = request.query.get("after", "") or request.headers.get("Last-Event-ID", "")
    async with aclosing(_view_of(request).watch(cursor)) as sent:
        # A refusal is raised here, before the stream starts, so it becomes an ordinary response.
        first = await anext(sent)
        response = web.StreamResponse(headers={"Content-Type": _EVENT_STREAM, "Cache-Control": "no-store"})
        await response.prepare(request)
        await _write(request, response, first)
        async for one in sent:
            await _write(request, response, one)
    return response


async def _write(request: web.Request, response: web.StreamResponse, one: Sent | None) -> None:
    """Send one message.  Raises: ConnectionResetError: the viewer has disconnected or reads nothing."""
    data = b":\n\n" if one is None else _message(one)
    try:
        async with asyncio.timeout(TAKES_S_MAX):
            await response.write(data)
    except TimeoutError:
        if isinstance(request.transport, asyncio.WriteTransport):
            request.transport.abort()  # otherwise unsent data would keep the connection open
        raise ConnectionResetError("the viewer reads nothing") from None


def _message(one: Sent) -> bytes:
    return b"id: %s\nevent: %s\ndata: %s\n\n" % (one.cursor.encode(), one.event.encode(), one.data)


def _view_of(request: web.Request) -> Watching:
    view = manager_of(request).cluster_view
    if view is None:
        raise Unavailable("this manager has no view of the cluster")
    return view


@routes.get("/ui")
@routes.get("/ui/")
@routes.get("/ui/{name}")
async def page(request: web.Request) -> web.StreamResponse:
    """Return a file of the dashboard to ``skep ui``.  Browsers cannot send its header, so they get nothing from here.

    Raises:
        NotFound: The file does not exist, or the request has no such header.
    """
    if RELAY_HEADER not in request.headers:
        raise NotFound("open the dashboard with: skep ui")
    found = pages().get(name := request.match_info.get("name", ""))
    if found is None:
        raise NotFound("page not found")
    if not name and (view := manager_of(request).cluster_view) is not None:
        view.prepare()  # a large cluster's rows are built while the browser starts
    return page_response(found, request.headers.get("If-None-Match", ""))
