"""Audit log: each request that may change something becomes an entry of the history (``manager.journal``).

An entry has the client and the outcome of the request, never its body.
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from aiohttp import web
from msgspec.structs import replace

from skep.api.access.identity import identity_of, peer_of, unlimited_identity_of
from skep.api.errors import status_of
from skep.api.http.framing import path_of
from skep.errors import SkepError, Unauthenticated
from skep.manager.control.validation.new_objects import visible_to
from skep.manager.journal.loop import Journal
from skep.manager.routes.access import manager_of
from skep.model.history import By, JournalEntry, Severity, masked_text
from skep.model.network import Network
from skep.model.node import Node
from skep.model.permissions.access import Origin
from skep.model.secret import Config, Secret
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.stacks import stack_of
from skep.model.volume import Volume
from skep.store.interface import View

_KINDS: dict[str, tuple[str, type[Any]]] = {
    "services": ("service", Service),
    "tasks": ("task", Task),
    "nodes": ("node", Node),
    "secrets": ("secret", Secret),
    "configs": ("config", Config),
    "networks": ("network", Network),
    "volumes": ("volume", Volume),
}
_NAMED = {"users": "user", "stacks": "stack"}
"""Nouns whose objects are found by their names alone."""
_NO_RECORD = re.compile(
    r"/skep/services/placement|/skep/stacks/check"  # dry runs
    r"|/skep/registrations/[^/]+/renew"  # a few each minute from every machine
    r"|/skep/tasks/[^/]+/(?:container|exec|port)/.*"  # recorded when they start, because they may last for hours
)
_READS = re.compile(r"/swarm/unlockkey|/skep/backup")
"""Requests that change nothing but return secrets that protect the cluster."""

_RPC = re.compile(r"^rpc error: code = \w+ desc = ")
"""Prefix of SwarmKit's errors in Docker's API, which the history leaves out."""
_CLIENT_GONE = 499
"""nginx's status for a disconnected client.  HTTP has no such status."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def record_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Record a request that may change something, once its outcome is known."""
    path = path_of(request.path)
    is_read = request.method in ("GET", "HEAD") and not _READS.fullmatch(path)
    journal = manager_of(request).journal
    if is_read or journal is None or _NO_RECORD.fullmatch(path):
        return await handler(request)
    record = _Record(request, path, journal)
    loop = asyncio.get_running_loop()
    loop.call_soon(record.begin)  # runs while the handler waits for the store
    try:
        response = await handler(request)
    except SkepError as error:
        record.failed(status_of(error), str(error))
        raise
    except web.HTTPException as error:  # raised by aiohttp itself: the route does not exist
        record.failed(error.status, "" if error.status < 400 else error.reason)
        raise
    except asyncio.CancelledError:
        if (sent := request.get(SENT_RESPONSE)) is not None:
            record.responded(sent)
            raise
        record.failed(_CLIENT_GONE, "the client disconnected before the response: the outcome is unknown")
        raise
    except Exception:
        record.failed(500, "internal error")
        raise
    loop.call_soon(record.responded, response)  # runs after a small response was sent
    return response


SENT_RESPONSE = web.RequestKey("sent_response", web.StreamResponse)
"""Key of a request with a response that was sent whole while its handler still has work.  Its client may close the
connection then, which cancels the handler."""
CHANGED_SERVICES = web.RequestKey("changed_services", list[str])
"""Key of a request with the names of the services that it has changed."""
_NAMED_MAX: Final = 5
"""Most services that an entry names."""


class _Record:
    """Journal entry of one request, recorded concurrently with its handler.  No request waits for its entry."""

    def __init__(self, request: web.Request, path: str, journal: Journal) -> None:
        self._request = request
        self._path = path
        self._journal = journal
        self._entry: JournalEntry | None = None

    def begin(self) -> JournalEntry:
        """Return the entry without its outcome.

        It is created before the request takes effect, because the request may remove its object.
        """
        if self._entry is None:
            self._entry = entry_of(self._request, self._path)
        return self._entry

    def responded(self, response: web.StreamResponse) -> None:
        """Record the handler's response."""
        entry = _created(self.begin(), response, manager_of(self._request).store.view())
        if names := self._request.get(CHANGED_SERVICES):
            more = len(names) - _NAMED_MAX
            entry = replace(
                entry, name=", ".join(names[:_NAMED_MAX]) + (f" and {more} more" if more > 0 else "")
            )
        self._journal.record(with_outcome(entry, response.status))

    def failed(self, status: int, error: str) -> None:
        """Record the handler's failure."""
        self._journal.record(with_outcome(self.begin(), status, error))


def record_reached(request: web.Request, task: Task, what: str, details: str = "") -> None:
    """Record the start of a request for the container of ``task``.

    Args:
        details: Command of the request or path of its files, or empty.
    """
    manager = manager_of(request)
    if manager.journal is None:
        return
    entry = _about_object(
        JournalEntry(type="task", action=what.partition("/")[0]), task, manager.store.view()
    )
    message = f"{entry.action} in the container of task {entry.name}{f': {details}' if details else ''}"
    path = path_of(request.path)
    manager.journal.record(
        replace(entry, message=message, method=request.method, path=path, by=client_of(request))
    )


def entry_of(request: web.Request, path: str) -> JournalEntry:
    """Return an entry for the request, without its outcome."""
    view = manager_of(request).store.view()
    try:
        among = visible_to(view, identity_of(request))
    except SkepError:  # the request is refused for the same reason
        among = None
    entry = about(path, request.method, view, among)
    if request.query.get("rollback") == "previous":
        entry = replace(entry, action="roll-back")
    return replace(entry, method=request.method, path=path, by=client_of(request))


def about(path: str, method: str, view: View, among: Callable[[Any], bool] | None = None) -> JournalEntry:
    """Return an entry for the object of a request: ``/services/web/update`` is an update of the service ``web``.

    Args:
        among: Returns whether the client sees an object, or None if it sees all.  The word means an object that the
            client sees, as for the handler, before any other, which the client tried to reach.
    """
    words = [word for word in path.split("/") if word and word != "skep"]
    noun, *rest = words or ["?"]
    action = {"DELETE": "remove", "GET": "read"}.get(method) or (rest[-1] if rest else "create")
    if noun in _NAMED:
        return _about_named(noun, method, rest)
    if noun not in _KINDS:
        if noun == "cluster" and rest and method in ("DELETE", "PUT"):
            action = f"{'remove' if method == 'DELETE' else 'set'}-{rest[-1]}"  # a freeze, or the window
        return JournalEntry(type="cluster" if noun in ("swarm", "cluster") else noun, action=action)
    name, kind = _KINDS[noun]
    entry = JournalEntry(type=name, action=action)
    if not rest or rest == ["create"]:
        return replace(entry, action="create")
    if noun == "services" and rest == ["changes"]:  # the names are in the body
        return replace(entry, action="change")
    for seen in (among, None) if among is not None and kind is not Node else (None,):
        with suppress(SkepError):
            return _about_object(entry, view.resolve(kind, rest[0], seen), view)
    return replace(entry, name=rest[0])


def _about_named(noun: str, method: str, rest: Sequence[str]) -> JournalEntry:
    """Return an entry for a user or a stack, or for its tokens, certificates or quota."""
    name, part, *_ = [*rest, "", ""]
    verb = {"DELETE": "remove", "PUT": "set", "GET": "read"}.get(method, "create")
    action = f"{verb}-{part.removesuffix('s')}" if part and part != "update" else part or verb
    return JournalEntry(type=_NAMED[noun], action=action, name="" if name == "create" else name)


def _about_object(entry: JournalEntry, found: Any, view: View) -> JournalEntry:
    match found:
        case Service() as service:
            name = service.spec.name
            entry = replace(
                entry, name=name, service_id=service.id, service=name, stack=stack_of(service.spec.labels)
            )
        case Node() as node:
            hostname = node.shown_name
            entry = replace(entry, name=hostname, node_id=node.id, node=hostname)
        case Task() as task:
            owner = view.lookup(Service, task.service_id)
            service_name = owner.spec.name if owner is not None else ""
            place = view.lookup(Node, task.node_id)
            hostname = place.description.hostname if place is not None else ""
            entry = replace(
                entry,
                name=f"{service_name}.{task.place(hostname or task.node_id)}",
                task_id=task.id,
                service_id=task.service_id,
                service=service_name,
                node_id=task.node_id,
                node=hostname,
            )
        case other:
            entry = replace(entry, name=other.spec.name, stack=stack_of(other.spec.labels))
    return replace(entry, object_id=found.id)


def _created(entry: JournalEntry, response: web.StreamResponse, view: View) -> JournalEntry:
    """Add the object that the request created, if the response names it."""
    if response.status != 201 or not isinstance(response, web.Response) or entry.object_id:
        return entry
    try:
        body = json.loads(response.body or b"")  # type: ignore[arg-type]
        id = str(body.get("ID") or body.get("Id") or "")
    except (ValueError, AttributeError):
        return entry
    kind = next((kind for name, kind in _KINDS.values() if name == entry.type), None)
    found = view.lookup(kind, id) if kind is not None else None
    return _about_object(entry, found, view) if found is not None else replace(entry, object_id=id)


def with_outcome(entry: JournalEntry, status: int, error: str = "") -> JournalEntry:
    """Return the entry of a request with the outcome ``status``."""
    what = " ".join(filter(None, (entry.action, entry.type, entry.name)))
    failed = f": refused with {status}" if status >= 400 and status != _CLIENT_GONE else ""
    because = f": {masked_text(_RPC.sub('', error))}" if error else ""
    severity = Severity.INFO if status < 400 else Severity.WARNING if status < 500 else Severity.ERROR
    return replace(entry, status=status, severity=severity, message=f"{what}{failed}{because}")


def author_of(request: web.Request) -> str:
    """Return the client of ``request`` as the author of a spec (``SpecAuthor.by``)."""
    by = client_of(request)
    return f"{by.user or 'unknown'}@{by.node}"


def client_of(request: web.Request) -> By:
    """Return the known facts about the client of ``request``."""
    manager = manager_of(request)
    own = manager.store.view().lookup(Node, manager.own)
    by = By(node=own.description.hostname if own is not None else manager.own)
    try:
        identity = unlimited_identity_of(request)
    except Unauthenticated:
        return by
    by = replace(by, user=identity.name, through=identity.origin.value)
    peer = peer_of(request) if identity.origin is Origin.SOCKET else None
    return by if peer is None else replace(by, uid=peer.uid, pid=peer.pid)
