"""Lets managers reach the containers of this node's tasks through tunnels: for some Engine API requests, and for TCP
ports. Managers also read the events of this node's containers, images and volumes, and idle times at its front door.

Requests are answered by a separate application that has only these routes.  A request must be about the container that
the manager named for the tunnel, and this container must belong to the named task.
"""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import structlog
from aiohttp import web

from skep.agent.tunnels import TunnelHost
from skep.api.formats.filters import Filters
from skep.api.formats.forwarded_requests import FORWARDED, ExecRequest, forwarded, why_not
from skep.api.formats.timestamps import period_of
from skep.api.http.connection import Connection
from skep.api.http.framing import parse_request, path_of
from skep.api.http.server import application, json_response, read_json, runner
from skep.dataplane.door.listener import FrontDoor
from skep.dataplane.netns.kernel.namespaces import inside
from skep.engine.api.containers import container_routes
from skep.engine.containers.container import Container, StandardStream
from skep.engine.containers.limited_execs import LimitedExecs
from skep.engine.engine import Engine
from skep.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unavailable,
    reason_of,
)
from skep.model.measures.queries import COMMAND_S, LINE_CHARACTERS_MAX
from skep.model.measures.readings import DOOR_IDLE, QueueLine
from skep.model.options.labels import LABEL_TASK_ID
from skep.model.values.times import SECOND_NS
from skep.node.events import NodeEvents, gap_in_place_of
from skep.wire import skep_pb2 as skep
from skep.wire.shared import ConnectToManager

log = structlog.get_logger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CONNECT_S_MAX = 5.0
"""Seconds to connect to a node of the cluster."""
EVENTS = "/events"
LENGTH = "/containers/{id}/length"
EVENT_BYTES_MAX = 128 << 10
"""Longest event in bytes, because managers do not accept much longer ones.  Labels and command lines can be long."""
_LOOPBACK = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))

REACHABLE: Final = frozenset((one.method, one.path) for one in FORWARDED)
_SUBJECT = re.compile(r"/(?P<kind>containers|exec)/(?P<id>[0-9a-f]+)/[a-z]+")


class TaskContainers:
    """Implements ``agent.tunnels.ContainerAccess`` for the containers of ``engine``."""

    def __init__(self, engine: Engine, events: NodeEvents, door: FrontDoor) -> None:
        self._engine = engine
        self._events = events
        self._door = door
        self._commands = LimitedExecs(engine.execs, "command for a queue's length")
        self._commanded: set[str] = set()
        """Containers in which a command runs."""
        self._servers: dict[bool, web.Server] = {}
        """HTTP servers for administrators (True) and for other users (False), as authenticated by the manager."""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Answer requests during the block."""
        async with self._serving(is_admin=True), self._serving(is_admin=False):
            yield

    @asynccontextmanager
    async def _serving(self, *, is_admin: bool) -> AsyncIterator[None]:
        app = application(self._routes())
        if not is_admin:
            app.middlewares.append(self._authorize)
        app.on_response_prepare.append(_close_after)
        served = runner(app)
        await served.setup()
        assert served.server is not None, "it was set up"
        self._servers[is_admin] = served.server
        try:
            yield
        finally:
            del self._servers[is_admin]
            await served.cleanup()

    def _routes(self) -> Sequence[web.RouteDef]:
        of_containers = [
            route
            for route in container_routes(self._engine, self._events.clock)
            if isinstance(route, web.RouteDef) and (route.method, route.path) in REACHABLE
        ]
        of_node = web.get(EVENTS, self._stream_events), web.get(DOOR_IDLE, self._read_idle)
        return [*of_containers, *of_node, web.post(LENGTH, self._read_length)]

    async def _read_length(self, request: web.Request) -> web.StreamResponse:
        """Run a command in a container for autoscaling, with the rights of a user below administrator.

        Returns its exit code and the first line of its output.
        """
        container = self._engine.get(request.match_info["id"])
        kind = forwarded("POST", "/containers/{id}/exec")
        if why := why_not(kind, {}, container.labels, ExecRequest()):
            raise PermissionDenied(why)
        wanted = await read_json(request, ExecRequest)
        if container.id in self._commanded:
            raise Unavailable(
                "another command for a queue's length still runs in the container: it is retried"
            )
        self._commanded.add(container.id)
        output = bytearray()
        try:
            code = await self._commands.run(
                container.id, wanted.cmd, COMMAND_S, output, (StandardStream.STDOUT,)
            )
        except TimeoutError:
            raise Unavailable(f"its command took longer than {COMMAND_S:g} s: let it end sooner") from None
        finally:
            self._commanded.discard(container.id)
        line = output.decode(errors="replace").strip().partition("\n")[0][:LINE_CHARACTERS_MAX]
        return json_response(QueueLine(exit_code=code, line=line))

    async def _read_idle(self, _: web.Request) -> web.StreamResponse:
        """Return the seconds without a request at the front door, by service, from a reading of this moment."""
        await self._door.read_statistics()
        return json_response(self._door.idle())

    async def _stream_events(self, request: web.Request) -> web.StreamResponse:
        """Stream events (see ``NodeEvents.follow``).

        The parameter ``age`` is the age in seconds of the first wanted event.  An age instead of a time, because the
        clocks of node and manager may differ.
        """
        since, until = period_of(request)
        if age := request.query.get("age"):
            since = self._events.clock.now_ns() - parse_age(age)
        cursor, filters = request.query.get("after", ""), Filters.of(request)
        response = web.StreamResponse()
        await response.prepare(request)
        async with aclosing(self._events.follow(cursor, since, until, filters)) as messages:
            async for message in messages:
                line = msgspec.json.encode(message)
                if len(line) > EVENT_BYTES_MAX:
                    line = msgspec.json.encode(gap_in_place_of(message))
                await response.write(line + b"\n")
        return response

    @web.middleware
    async def _authorize(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Refuse requests that only administrators may make.

        The manager has already checked, but an older version checks less.
        """
        resource = request.match_info.route.resource
        path = resource.canonical if resource is not None else ""
        if (request.method, path) not in REACHABLE:
            return await handler(request)
        kind, id = forwarded(request.method, path), request.match_info["id"]
        execution: ExecRequest | None = None
        if path.startswith("/exec/"):
            exec = self._engine.execs.get(id)
            container = self._engine.get(exec.container_id)
            execution = ExecRequest(user=exec.config.user, privileged=exec.config.privileged)
        else:
            container = self._engine.get(id)
            if kind.body is ExecRequest:
                execution = await read_json(request, ExecRequest)
        if why := why_not(kind, request.query, container.labels, execution):
            raise PermissionDenied(why)
        return await handler(request)

    async def connect(self, request: skep.TunnelRequest) -> Connection:
        """Connect to the container or port that ``request`` names.

        Raises: NotFound: no such container; PermissionDenied: it is not the task's; Unavailable: nothing listens on the
        port.
        """
        if not (request.task_id or request.container_id):
            self._check_node(bytes(request.head))
        else:
            container = self._container(request)
            if not request.head:
                return await _connect_to_port(container, request.port)
            self._check(container, bytes(request.head))
        server = self._servers.get(request.admin)
        if server is None:
            raise Unavailable("the node is stopping")
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(server, theirs)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        connection = await Connection.over(ours)
        connection.transport.write(bytes(request.head))
        return connection

    def _check_node(self, head: bytes) -> None:
        """Check that the request is one about the node.  Raises: PermissionDenied; Malformed."""
        request = parse_request(head)
        if request.method != "GET" or path_of(request.target) not in (EVENTS, DOOR_IDLE):
            raise PermissionDenied("the request does not name a container")

    def _container(self, request: skep.TunnelRequest) -> Container:
        container = self._engine.get(request.container_id)
        if container.labels.get(LABEL_TASK_ID) != request.task_id or container.id != request.container_id:
            raise PermissionDenied(
                f"container {request.container_id} does not belong to task {request.task_id}"
            )
        return container

    def _check(self, container: Container, head: bytes) -> None:
        """Check that the request is about ``container``.  Raises: PermissionDenied; Malformed."""
        subject = _SUBJECT.fullmatch(path_of(parse_request(head).target))
        if subject is None:
            raise PermissionDenied("the request does not name a container")
        id = (
            subject["id"]
            if subject["kind"] == "containers"
            else self._engine.execs.get(subject["id"]).container_id
        )
        if id != container.id:
            if subject["kind"] == "exec":  # the same answer as for a missing exec
                raise NotFound(f"No such exec instance: {subject['id']}")
            raise PermissionDenied(f"the request is not about container {container.id}")


async def _close_after(_request: web.Request, response: web.StreamResponse) -> None:
    """Close the connection after its first request: later ones would be unchecked."""
    response.force_close()
    response.headers["Connection"] = "close"


def parse_age(text: str) -> int:
    """Parse whole seconds and return them as nanoseconds.  Raises: InvalidArgument."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise InvalidArgument(f"invalid age {text!r}")
    return int(text) * SECOND_NS


def tunnel_host(
    engine: Engine | None, events: NodeEvents, door: FrontDoor, connect: ConnectToManager
) -> TunnelHost | None:
    """Return the tunnels of a node, or None for a node without containers."""
    return TunnelHost(TaskContainers(engine, events, door), connect) if engine is not None else None


async def _connect_to_port(container: Container, port: int) -> Connection:
    """Connect to a TCP port from within the container's namespace, because a program may listen on its loopback only.

    Raises: FailedPrecondition: it is not running; NotFound: it has just ended; Unavailable: nothing listens there.
    """
    if not container.pid:
        raise FailedPrecondition(f"Container {container.id} is not running")
    reasons = []
    for family, address in _LOOPBACK:
        try:
            connected = await asyncio.to_thread(_socket_in, container.pid, family)
        except OSError as failure:
            raise NotFound(f"Container {container.id} has just ended: {reason_of(failure)}") from failure
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                await asyncio.get_running_loop().sock_connect(connected, (address, port))
            return await Connection.over(connected)
        except OSError as failure:  # includes a timeout
            connected.close()
            reasons.append(reason_of(failure))
        except BaseException:
            connected.close()
            raise
    raise Unavailable(f"nothing listens on port {port} in container {container.id[:12]}: {reasons[0]}")


def _socket_in(pid: int, family: int) -> socket.socket:
    """Open a TCP socket in the network namespace of a process.  Raises: OSError."""
    opened = inside(Path(f"/proc/{pid}/ns/net"), partial(socket.socket, family, socket.SOCK_STREAM))
    opened.setblocking(False)
    return opened
