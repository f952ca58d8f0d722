"""``/events``: those of the cluster.  The front adds the node's own.

Source: moby 20.10, api/server/router/system/system_routes.go, daemon/events/filter.go.
"""

from contextlib import aclosing

from aiohttp import web

from skep.api.server import Filters, JsonLines, Routes
from skep.api.timestamps import period_of
from skep.manager.events import Message
from skep.manager.routes.access import manager_of

routes = Routes()


@routes.get("/events")
async def stream_events(request: web.Request) -> web.StreamResponse:
    """Events as they come, one JSON object per line, each sent at once."""
    since, until = period_of(request)
    filters = Filters.of(request)
    messages = manager_of(request).events.subscribe(since, until, lambda message: fits(message, filters))
    async with JsonLines(request) as lines, aclosing(messages):
        async for message in messages:
            await lines.send(message)
    return lines.response


def fits(message: Message, filters: Filters) -> bool:
    """Whether ``filters`` take ``message``: its type, action, scope, labels, name and id.

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


_KINDS = ("service", "node", "secret", "config", "network", "container", "plugin", "volume", "daemon")
