"""``/skep/history``: changes in the cluster with their reasons, and the requests of users.  A Skep extension."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress

from aiohttp import web
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.access.identity import identity_of
from skep.api.formats.timestamps import parse_time
from skep.api.http.server import Routes, json_response
from skep.errors import InvalidArgument, NotFound, PermissionDenied, Unavailable
from skep.manager.control.tasks import known_status
from skep.manager.diagnosis.service_health import status_with_health
from skep.manager.journal.reading import LIMIT_MAX, TIME_MAX, HistoryQuery, page
from skep.manager.routes.access import current_view, manager_of, past_of
from skep.manager.routes.representations import problems_of, shown_node, shown_service
from skep.model.history import EntryType, without_credentials
from skep.model.node import Node
from skep.model.permissions.access import EVERY_STACK, Identity, Role
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.times import Timestamp, timestamp
from skep.store.interface import View

routes = Routes()

_PARAMETERS = frozenset(
    {"about", "service", "node", "stack", "kind", "since", "until", "limit", "cursor", "order"}
)

_PIECE = 500
"""Number of tasks between two pauses for the event loop."""


class TaskThen(ApiObject):
    """A task at an earlier time, without its spec, because there may be thousands."""

    id: TaskId
    service_id: ServiceId = ServiceId("")
    slot: int = 0
    node_id: NodeId = NodeId("")
    image: str = ""
    state: TaskState = always(TaskState.NEW)
    desired_state: TaskState = always(TaskState.NEW)
    timestamp: Timestamp = always(Timestamp(""))
    err: str = ""

    @classmethod
    def of(cls, view: View, task: Task) -> "TaskThen":
        """Return ``task`` as it is in ``view``."""
        status, container = known_status(view, task), task.spec.container_spec
        return cls(
            id=task.id,
            service_id=task.service_id,
            slot=task.shown_slot,
            node_id=task.node_id,
            image=container.image if container is not None else "",
            state=status.state,
            desired_state=task.desired_state,
            timestamp=status.timestamp,
            err=status.err,
        )


@routes.get("/skep/history")
async def show_history(request: web.Request) -> web.Response:
    """Show a page of entries.

    Only administrators see requests and their clients.  Users of stacks see only the entries of their stacks.
    """
    view = await current_view(request)
    query = query_of(request.query, view, manager_of(request).clock.now_ns())
    found = await page(view, limited(query, identity_of(request)))
    past = manager_of(request).past
    if past is not None:
        with suppress(Unavailable):
            found = replace(found, oldest_state=await past.oldest())
    return json_response(found)


class StateResponse(ApiObject):
    """The cluster at an earlier time.  ``tasks`` are the tasks that were wanted."""

    time: Timestamp
    revision: int
    nodes: tuple[Node, ...] = always(())
    services: tuple[Service, ...] = always(())
    tasks: tuple[TaskThen, ...] = always(())


@routes.get("/skep/state")
async def show_state(request: web.Request) -> web.Response:
    """Show the nodes, services and tasks at an earlier time.  ``at`` is a time or ``revision:N``.

    Raises:
        HistoryGone: The store no longer has that state.  The error names the oldest available time.
        PermissionDenied: The user only has roles in single stacks.
    """
    if not _sees_all(identity_of(request)):
        raise PermissionDenied(
            "users with roles in single stacks only may not see the state of the whole cluster"
        )
    past = await past_of(request).at(request.query.get("at", ""))
    view = past.view
    nodes, services = problems_of(view, Node), problems_of(view, Service)
    shown = [
        shown_service(
            services,
            without_credentials(service),
            status=await status_with_health(view, service, past.at_ns, SystemClock()),
        )
        for service in view.find(Service)
        if service.removed_at is None
    ]
    response = StateResponse(
        time=timestamp(past.at_ns),
        revision=view.revision,
        nodes=tuple(shown_node(nodes, node) for node in view.find(Node)),
        services=tuple(shown),
        tasks=tuple([task async for task in _tasks(view)]),
    )
    return json_response(response)


async def _tasks(view: View) -> AsyncIterator[TaskThen]:
    """Yield the wanted tasks, with pauses for the event loop."""
    for number, task in enumerate(view.find(Task)):
        if number % _PIECE == 0:
            await asyncio.sleep(0)
        if task.is_wanted:
            yield TaskThen.of(view, task)


def _sees_all(identity: Identity) -> bool:
    return any(one.stack == EVERY_STACK for one in identity.bindings)


def limited(query: HistoryQuery, identity: Identity) -> HistoryQuery:
    """Return ``query`` limited to the entries that ``identity`` may see."""
    if not any(one.role is Role.ADMIN and one.stack == EVERY_STACK for one in identity.bindings):
        query = replace(query, kinds=query.kinds & {EntryType.CHANGE})
    if not _sees_all(identity):
        query = replace(query, stacks=frozenset(one.stack for one in identity.bindings))
    return query


def query_of(given: Mapping[str, str], view: View, now_ns: int) -> HistoryQuery:
    """Parse the query parameters.  Raises: InvalidArgument: an unknown parameter or an invalid value."""
    if unknown := sorted(set(given) - _PARAMETERS):
        raise InvalidArgument(
            f"unknown parameter {unknown[0][:100]!r}: expected {', '.join(sorted(_PARAMETERS))}"
        )
    return HistoryQuery(
        services=_meant(view, Service, given.get("service", "")),
        nodes=_meant(view, Node, given.get("node", "")),
        stack=given.get("stack", ""),
        about=_about(view, given.get("about", "")),
        kinds=_kinds(given.get("kind", "")),
        since_ns=parse_time(given["since"], now_ns) if given.get("since") else 0,
        until_ns=parse_time(given["until"], now_ns) if given.get("until") else TIME_MAX,
        limit=_limit(given.get("limit", "200")),
        is_ascending=_is_ascending(given.get("order", "desc")),
        cursor=given.get("cursor", ""),
    )


def _meant(view: View, kind: type[Service | Node], word: str) -> frozenset[str]:
    """Return the id of the object that ``word`` names, or the word itself if the object was removed."""
    if not word:
        return frozenset()
    try:
        return frozenset({view.resolve(kind, word).id})
    except NotFound:
        return frozenset({word})


def _about(view: View, word: str) -> frozenset[str]:
    """Return the words in entries about a service, a node or a stack."""
    if not word:
        return frozenset()
    return frozenset({word, *_meant(view, Service, word), *_meant(view, Node, word)})


def _kinds(words: str) -> frozenset[EntryType]:
    try:
        return frozenset(map(EntryType, words.split(","))) if words else frozenset(EntryType)
    except ValueError:
        raise InvalidArgument(f"invalid kind {words[:100]!r}: expected request, change or both") from None


def _limit(word: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) < 10 and 1 <= int(word) <= LIMIT_MAX):
        raise InvalidArgument(
            f"invalid limit {word[:100]!r}: expected a number of entries from 1 to {LIMIT_MAX}"
        )
    return int(word)


def _is_ascending(word: str) -> bool:
    if word not in ("asc", "desc"):
        raise InvalidArgument(f"invalid order {word[:100]!r}: expected asc or desc")
    return word == "asc"
