"""``/events``: those of the cluster.  The front adds the node's own.

Source: moby 20.10, api/server/router/system/system_routes.go, daemon/events/filter.go.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

from aiohttp import web
from msgspec.structs import replace

from skep.api.server import Filters, JsonLines, Routes
from skep.api.timestamps import period_of
from skep.errors import InvalidArgument, PermissionDenied
from skep.manager.events import EventsLost, Message, is_dockers
from skep.manager.node_events import TYPES, Position, Wanted
from skep.manager.routes.access import OF_WORKER, manager_of

routes = Routes()


@routes.get("/events")
async def stream_events(request: web.Request) -> web.StreamResponse:
    """Events as they come, one JSON object per line, each sent at once.

    Those of nodes are among them if their types are asked for by name in the scope of the swarm, in which they have
    none in Docker.
    """
    since, until = period_of(request)
    manager, filters = manager_of(request), Filters.of(request)
    cluster = partial(manager.events.subscribe, since, until, lambda message: fits(message, filters))
    wanted = None
    if (
        "swarm" in filters["scope"]
        and TYPES.intersection(filters["type"])
        and OF_WORKER not in request.headers
    ):
        wanted = Wanted(filters=filters.json("scope"), since=request.query.get("since", ""), until_ns=until)
        manager.all_events.check(wanted)
    async with JsonLines(request) as lines:

        async def send(message: Mapping[str, Any] | Message) -> None:
            if isinstance(message, Message):
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
    """The same with those of tasks, each with its cursor.

    ``after``: go on after the event with that cursor.  ``since``: begin with the kept events of that time.
    ``nodes``: also those of containers, images and volumes, of ``all`` nodes, or of those with these names.
    Raises: InvalidArgument: no cursor; EventsLost: some events after it are not kept; PermissionDenied: the events of
    nodes are not for clients of workers.
    """
    since, until = period_of(request)
    manager, filters = manager_of(request), Filters.of(request)
    position = Position.of(cursor) if (cursor := request.query.get("after", "")) else None
    after: int | None
    if position is not None:
        after, since = manager.events.revision_after(position.cluster), None
    else:
        after = manager.events.revision_before(since) if since is not None else None

    def is_wanted(message: Message) -> bool:
        return (until is None or message.time_nano <= until) and _matches(message, filters)

    cluster = partial(manager.events.subscribe_after, after, until, is_wanted)
    wanted = None
    if names := request.query.get("nodes", ""):
        if OF_WORKER in request.headers:
            raise PermissionDenied("clients of workers may not read the events of nodes")
        words = () if names == "all" else names.split(",")
        wanted = Wanted(
            names=words,
            filters=filters.json("scope"),
            since=request.query["since"] if since is not None else "",
            until_ns=until,
            begins_at=manager.events.cursor(after),
            after=position,
        )
        manager.all_events.check(wanted)
    elif position is not None and position.nodes:
        raise InvalidArgument("the cursor is of a stream with events of nodes: name them again")
    async with JsonLines(request) as lines:
        try:
            if wanted is not None:
                await manager.all_events.stream(wanted, cluster, lines.send)
            else:
                await _send_all(cluster, lines)
        except EventsLost as error:
            await lines.send({"message": str(error)})
    return lines.response


async def _send_all(events: Callable[[], AsyncGenerator[Message, None]], lines: JsonLines) -> None:
    async with aclosing(events()) as messages:
        async for message in messages:
            await lines.send(message)


def fits(message: Message, filters: Filters) -> bool:
    """Whether ``filters`` take ``message`` for ``docker events``: if Docker does not have it, by its type only."""
    return (is_dockers(message) or message.type in filters["type"]) and _matches(message, filters)


def _matches(message: Message, filters: Filters) -> bool:
    """Its type, action, scope, labels, name and id.

    As in the engine, a filter like ``node=m1`` looks at the id and name of events of any type.
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
