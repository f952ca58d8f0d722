"""``/events``: events of the cluster.  The front adds the node's own events.

Source: moby 20.10, api/server/router/system/system_routes.go, daemon/events/filter.go.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

from aiohttp import web
from msgspec.structs import replace

from skep.api.formats.timestamps import period_of
from skep.api.http.server import Filters, JsonLines, Routes
from skep.errors import InvalidArgument, PermissionDenied
from skep.manager.routes.access import WORKER_HEADER, current_view, manager_of
from skep.manager.telemetry.events import EventMessage, EventsLost, is_dockers
from skep.manager.telemetry.node_events import TYPES, StreamPosition, WantedEvents

routes = Routes()


@routes.get("/events")
async def stream_events(request: web.Request) -> web.StreamResponse:
    """Send events as they happen, one JSON object per line.

    Events of nodes are included if the filters name their types with the scope ``swarm``.  In Docker, they do not have
    that scope.
    """
    since, until = period_of(request)
    manager, filters = manager_of(request), Filters.of(request)
    cluster = partial(manager.events.subscribe, since, until, lambda message: fits(message, filters))
    wanted = None
    if (
        "swarm" in filters["scope"]
        and TYPES.intersection(filters["type"])
        and WORKER_HEADER not in request.headers
    ):
        wanted = WantedEvents(
            filters=filters.json("scope"), since=request.query.get("since", ""), until_ns=until
        )
        manager.all_events.check(wanted)
    async with JsonLines(request) as lines:

        async def send(message: Mapping[str, Any] | EventMessage) -> None:
            if isinstance(message, EventMessage):
                if message.type != "stream":
                    await lines.send(replace(message, cursor=""))
            else:
                await lines.send({key: value for key, value in message.items() if key != "Cursor"})

        if wanted is not None:
            await manager.all_events.stream(wanted, cluster, send)
        else:
            await _send_all(cluster, lines)
    return lines.response


@routes.get("/skep/events")
async def stream_all_events(request: web.Request) -> web.StreamResponse:
    """Send all events, also of tasks, each with its cursor.

    ``after`` resumes after the event with that cursor.  ``since`` starts with the kept events of that time.  ``nodes``
    adds the events of containers, images and volumes, of ``all`` nodes or of the nodes with these names.

    Raises:
        InvalidArgument: The cursor is invalid.
        EventsLost: Some events after the cursor are no longer kept.
        PermissionDenied: A client of a worker asked for events of nodes.
    """
    since, until = period_of(request)
    manager, filters = manager_of(request), Filters.of(request)
    position = StreamPosition.of(cursor) if (cursor := request.query.get("after", "")) else None
    after: int | None
    if position is not None:
        after, since = manager.events.revision_after(position.cluster), None
        # Another manager may be ahead of this one, so only a view with everything acknowledged can tell.
        if after > manager.store.view().revision and after > (await current_view(request)).revision:
            raise InvalidArgument(
                f"no event has the cursor {cursor} yet: continue after {manager.events.cursor()}"
            )
    else:
        after = manager.events.revision_before(since) if since is not None else None

    def is_wanted(message: EventMessage) -> bool:
        return (until is None or message.time_nano <= until) and _matches(message, filters)

    cluster = partial(manager.events.subscribe_after, after, until, is_wanted)
    wanted = None
    if names := request.query.get("nodes", ""):
        if WORKER_HEADER in request.headers:
            raise PermissionDenied("workers do not pass on node events: ask a manager")
        words = () if names == "all" else names.split(",")
        wanted = WantedEvents(
            names=words,
            filters=filters.json("scope"),
            since=request.query["since"] if since is not None else "",
            until_ns=until,
            begins_at=manager.events.cursor(after),
            after=position,
        )
        manager.all_events.check(wanted)
    elif position is not None and position.nodes:
        raise InvalidArgument(
            "the cursor belongs to a stream with events of nodes: name the same nodes again"
        )
    async with JsonLines(request) as lines:
        try:
            if wanted is not None:
                await manager.all_events.stream(wanted, cluster, lines.send)
            else:
                await _send_all(cluster, lines)
        except EventsLost as error:
            await lines.send({"message": str(error)})
    return lines.response


async def _send_all(events: Callable[[], AsyncGenerator[EventMessage, None]], lines: JsonLines) -> None:
    async with aclosing(events()) as messages:
        async for message in messages:
            await lines.send(message)


def fits(message: EventMessage, filters: Filters) -> bool:
    """Return whether ``filters`` select ``message`` for ``docker events``.

    Messages that Docker does not have need a filter with their type.
    """
    return (is_dockers(message) or message.type in filters["type"]) and _matches(message, filters)


def _matches(message: EventMessage, filters: Filters) -> bool:
    """Return whether the filters match the message's type, action, scope, labels, name and id.

    As in the engine, a filter like ``node=m1`` compares the id and name of events of any type.
    """
    name = message.actor.attributes.get("name", "")
    return (
        filters.matches("event", message.action)
        and filters.matches("type", message.type)
        and filters.matches("scope", message.scope)
        and filters.matches_labels("label", message.actor.attributes)
        and "image" not in filters
        and all(filters.matches_prefix(kind, message.actor.id, name) for kind in _KINDS)
    )


_KINDS = ("service", "node", "secret", "config", "network", "container", "plugin", "volume", "daemon", "task")
