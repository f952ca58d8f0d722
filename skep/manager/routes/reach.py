"""``/skep/tasks/{id}/...``: the container of a task, on any node.

Each request is one exchange with the Engine API of the task's node over a tunnel.  The client receives the response as
the node sent it.  The manager forwards only those parts of a request that ``api.formats.forwarded_requests`` names, and
encodes them again.  The node checks them again.
"""

import re
import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from aiohttp import web

from skep.aio.time_slices import result_in_slices
from skep.api.access.identity import identity_of
from skep.api.formats.forwarded_requests import (
    ExecRequest,
    ExecStart,
    Forwarded,
    forwarded,
    query_of,
    why_not,
)
from skep.api.http.connection import Connection
from skep.api.http.framing import path_of
from skep.api.http.handover_server import take_over
from skep.api.http.responses import Hijacked
from skep.api.http.server import Routes, json_response, read_body, read_json
from skep.api.http.tunnelling import join_client
from skep.errors import FailedPrecondition, InvalidArgument, PermissionDenied, SkepError
from skep.manager.control.targets import TaskTarget, target_of
from skep.manager.routes.access import current_view, manager_of
from skep.manager.routes.guard.audit import client_of, record_reached
from skep.model.container import ContainerSpec
from skep.model.history import masked_text
from skep.model.service import ServiceSpec
from skep.model.task import Task, TaskState
from skep.model.values.encoding import to_json
from skep.store.interface import View
from skep.store.kinds import spec_of
from skep.wire.tunnel import Tunnel

log = structlog.get_logger(__name__)

routes = Routes()

_WHAT = re.compile(r"^.*?/skep/tasks/[^/]+/(?:container/)?")
_DETAILS_MAX = 256
"""Longest command in an entry of the history, in characters.  The first words suffice to show the purpose of a
command.
"""
_RECORDED = re.compile(r"(?:exec|attach|kill|archive|exec/[0-9a-f]+/start|port/.*)")
"""Requests that appear in the log and the history, because they change something or read files."""


@routes.get("/skep/tasks/{id}/target")
async def find_target(request: web.Request) -> web.StreamResponse:
    """Return the running task that ``SERVICE``, ``SERVICE.SLOT``, ``SERVICE.NODE`` or a task id refers to."""
    view = await current_view(request)
    return json_response(TaskTarget.of(view, await _target(view, request)))


@routes.post("/skep/tasks/{id}/container/exec")
@routes.post("/skep/tasks/{id}/container/attach")
@routes.post("/skep/tasks/{id}/container/resize")
@routes.post("/skep/tasks/{id}/container/kill")
@routes.get("/skep/tasks/{id}/container/json")
@routes.get("/skep/tasks/{id}/container/top")
@routes.get("/skep/tasks/{id}/container/stats")
@routes.get("/skep/tasks/{id}/container/logs")
@routes.post("/skep/tasks/{id}/container/wait")
@routes.get("/skep/tasks/{id}/container/archive")
@routes.head("/skep/tasks/{id}/container/archive")
@routes.put("/skep/tasks/{id}/container/archive")
async def reach_container(request: web.Request) -> web.StreamResponse:
    """Forward a request of the Engine API below ``/containers/ID``."""
    task = await _task(request)
    status, rest = task.status, request.path.rpartition("/")[2]
    if status.container_status is None and status.state is not TaskState.RUNNING:
        raise FailedPrecondition(f"task {task.id} is not running: it is {status.state.value}")
    # A running task without a container is a plain process.  The tunnel refuses it with the reason.
    container = status.container_status.container_id if status.container_status is not None else ""
    return await _forward(request, task, f"/containers/{container}/{rest}")


@routes.post("/skep/tasks/{id}/exec/{exec:[0-9a-f]+}/start")
@routes.post("/skep/tasks/{id}/exec/{exec:[0-9a-f]+}/resize")
@routes.get("/skep/tasks/{id}/exec/{exec:[0-9a-f]+}/json")
async def reach_exec(request: web.Request) -> web.StreamResponse:
    """Forward a request of the Engine API below ``/exec/ID``."""
    task = await _task(request)
    return await _forward(
        request, task, f"/exec/{request.match_info['exec']}/{request.path.rpartition('/')[2]}"
    )


@routes.post("/skep/tasks/{id}/port/{port:[0-9]{1,5}}")
async def reach_port(request: web.Request) -> web.StreamResponse:
    """Connect to a TCP port in the task's container.  The connection of the request becomes the other end."""
    task = await _task(request)
    port = int(request.match_info["port"])
    if not 0 < port < 65536:
        raise InvalidArgument(f"invalid port {port}: expected 1 to 65535")
    if "upgrade" not in request.headers:
        raise InvalidArgument("a connection to a port needs the header Upgrade: tcp")
    _record(request, task, f"port/{port}")
    async with manager_of(request).tunnels.open(task, port=port) as tunnel, _taken_over(request) as client:
        client.transport.write(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
        await join_client(client, tunnel, is_port=True)
    return Hijacked()


async def _task(request: web.Request) -> Task:
    return await _target(await current_view(request), request)


async def _target(view: View, request: web.Request) -> Task:
    return await result_in_slices(target_of(view, request.match_info["id"]), manager_of(request).clock)


async def _forward(request: web.Request, task: Task, path: str) -> web.StreamResponse:
    """Forward one exchange to the Engine API of the task's node.

    Raises:
        PermissionDenied: Only an administrator may send the request.
        SkepError: No tunnel can be opened.
    """
    kind = forwarded(request.method, _pattern(path))
    value = await _read_body(request, kind)
    await _authorize(request, task, kind, value)
    body = to_json(value) if value is not None else b""
    # The entry has the word that the client used. In the path, authorization has replaced it by the task's id.
    _record(request, task, _WHAT.sub("", request.path), _details(request, value))
    async with manager_of(request).tunnels.open(
        task, head=_head(request, kind, path, body), is_admin=identity_of(request).is_admin
    ) as tunnel:
        if body:
            await tunnel.send(body)
        upload = None if _upgrades(request, kind) else _send_upload(request, tunnel, kind)
        async with _taken_over(request) as client:
            await join_client(client, tunnel, body=upload)
    return Hijacked()


def _pattern(path: str) -> str:
    """Return ``/containers/{id}/exec`` for ``/containers/2f.../exec``."""
    kind, _, what = path.removeprefix("/").split("/")
    return f"/{kind}/{{id}}/{what}"


async def _read_body(request: web.Request, kind: Forwarded) -> ExecRequest | ExecStart | None:
    """Return the decoded body, or None without a body to decode.

    Raises:
        InvalidArgument: The body cannot be decoded, or its encoding or framing is not supported.
    """
    if "Content-Encoding" in request.headers:
        raise InvalidArgument("requests to the containers of tasks cannot have the header Content-Encoding")
    if _upgrades(request, kind) and request.content_length is None and request.body_exists:
        raise InvalidArgument("a request that upgrades its connection cannot have Transfer-Encoding: chunked")
    if kind.is_upload:
        return None
    given = await read_body(request)
    if kind.body is None or (not given and kind.body is ExecStart):
        return None
    return await read_json(request, kind.body)


async def _authorize(
    request: web.Request, task: Task, kind: Forwarded, value: ExecRequest | ExecStart | None
) -> None:
    """Check that the client may send the request.  Raises: PermissionDenied."""
    identity = identity_of(request)
    if identity.is_admin:
        return
    spec = spec_of(await current_view(request), task) or ServiceSpec(task_template=task.spec)
    container = spec.task_template.container_spec or ContainerSpec()
    execution = value if isinstance(value, ExecRequest) else None
    if why := why_not(kind, request.query, container.labels, execution):
        raise PermissionDenied(f"{identity.name} may not {request.method} {path_of(request.path)}: {why}")


def _head(request: web.Request, kind: Forwarded, path: str, body: bytes) -> bytes:
    """Return the head of the request for the node, with the client's API version if it named one."""
    version = f"/v{number}" if (number := request.match_info.get("version")) else ""
    lines = [f"{request.method} {version}{path}{query_of(kind, request.query)} HTTP/1.1", "Host: node"]
    if _upgrades(request, kind):
        lines += ["Connection: Upgrade", "Upgrade: tcp"]
    else:
        # Otherwise the node would keep the connection open for a second request.
        lines.append("Connection: close")
    if kind.is_upload:
        length = request.content_length
        lines.append("Content-Type: application/x-tar")
        lines.append("Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}")
    elif body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join((*lines, "", "")).encode()


def _upgrades(request: web.Request, kind: Forwarded) -> bool:
    return kind.upgrades and "upgrade" in request.headers


async def _send_upload(request: web.Request, tunnel: Tunnel, kind: Forwarded) -> None:
    """Send an archive as it arrives, framed as announced in the head.  Any other body was already sent."""
    if not kind.is_upload:
        return
    is_chunked = request.content_length is None
    async for data in request.content.iter_any():
        await tunnel.send(b"%x\r\n%b\r\n" % (len(data), data) if is_chunked else data)
    if is_chunked:
        await tunnel.send(b"0\r\n\r\n")


@asynccontextmanager
async def _taken_over(request: web.Request) -> AsyncIterator[Connection]:
    """Take over the client's connection for the response as the node sends it.  It is closed with the block."""
    client = Connection()
    take_over(request, client)
    try:
        yield client
    except SkepError as error:
        # The head may have been sent, so only the end of the connection can report the error.
        log.info("connection to a container ended early", path=request.path, reason=str(error))
        client.abort()
    except BaseException:
        client.abort()
        raise
    else:
        if request.content.is_eof():
            await client.linger()
        else:
            client.end()  # the web server reads the rest of the body


def _details(request: web.Request, value: ExecRequest | ExecStart | None) -> str:
    """Return details of a request for a container, for the history: its command, or the path of its files.

    Values of variables and credentials in URLs are masked, and a long command is cut.
    """
    if isinstance(value, ExecRequest):
        options = [
            *(["--privileged"] if value.privileged else []),
            *(["-u", value.user] if value.user else []),
        ]
        text = masked_text(shlex.join((*options, *value.cmd)))
    elif request.path.endswith("/kill"):
        text = request.query.get("signal", "")
    elif request.path.endswith("/archive"):
        text = f"{'write' if request.method == 'PUT' else 'read'} {request.query.get('path', '')}"
    else:
        return ""
    return text if len(text) <= _DETAILS_MAX else f"{text[:_DETAILS_MAX]}..."


def _record(request: web.Request, task: Task, what: str, details: str = "") -> None:
    if _RECORDED.fullmatch(what):
        by = client_of(request)
        log.info(
            "container reached",
            request=f"{request.method} {what}",
            task=task.id,
            node=task.node_id,
            client=by.summary,
        )
        record_reached(request, task, what, details)
