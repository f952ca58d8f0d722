"""``/skep/tasks/{id}/...``: the container of a task, on whatever node it runs.

Each request is one exchange with the Engine API of the task's node, over a tunnel: what comes back goes to the client
as the node sent it.  Only the requests of ``FORWARDED`` are passed on, and a node checks them again.
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from aiohttp import web

from skep.api.connection import Connection
from skep.api.passed import take_over
from skep.api.responses import Hijacked
from skep.api.server import Routes, json_response
from skep.api.tunnelling import join_client
from skep.errors import InvalidArgument, SkepError
from skep.manager.control.targets import Target, target_of
from skep.manager.routes.access import current_view, manager_of
from skep.manager.routes.audit import client_of, record_reached
from skep.model.task import Task
from skep.wire.tunnel import Tunnel

log = structlog.get_logger(__name__)

routes = Routes()

_PASSED_HEADERS = ("Content-Type", "X-Registry-Auth")
_WHAT = re.compile(r"^.*?/skep/tasks/[^/]+/(?:container/)?")
_RECORDED = re.compile(r"(?:exec|attach|archive|exec/[0-9a-f]+/start|port/.*)")
"""Requests that the log and the history have: those that change something, or read files."""


@routes.get("/skep/tasks/{id}/target")
async def find_target(request: web.Request) -> web.StreamResponse:
    """The running task that ``SERVICE``, ``SERVICE.SLOT``, ``SERVICE.NODE`` or the id of a task means."""
    view = await current_view(request)
    return json_response(Target.of(view, target_of(view, request.match_info["id"])))


@routes.post("/skep/tasks/{id}/container/exec")
@routes.post("/skep/tasks/{id}/container/attach")
@routes.post("/skep/tasks/{id}/container/resize")
@routes.get("/skep/tasks/{id}/container/json")
@routes.get("/skep/tasks/{id}/container/top")
@routes.get("/skep/tasks/{id}/container/stats")
@routes.get("/skep/tasks/{id}/container/logs")
@routes.post("/skep/tasks/{id}/container/wait")
@routes.get("/skep/tasks/{id}/container/archive")
@routes.head("/skep/tasks/{id}/container/archive")
@routes.put("/skep/tasks/{id}/container/archive")
async def reach_container(request: web.Request) -> web.StreamResponse:
    """What the Engine API has below ``/containers/ID``."""
    task = await _task(request)
    assert task.status.container_status is not None, "otherwise it is no target"
    rest = request.path.rpartition("/")[2]
    return await _forward(request, task, f"/containers/{task.status.container_status.container_id}/{rest}")


@routes.post("/skep/tasks/{id}/exec/{exec:[0-9a-f]+}/start")
@routes.post("/skep/tasks/{id}/exec/{exec:[0-9a-f]+}/resize")
@routes.get("/skep/tasks/{id}/exec/{exec:[0-9a-f]+}/json")
async def reach_exec(request: web.Request) -> web.StreamResponse:
    """What the Engine API has below ``/exec/ID``."""
    task = await _task(request)
    return await _forward(
        request, task, f"/exec/{request.match_info['exec']}/{request.path.rpartition('/')[2]}"
    )


@routes.post("/skep/tasks/{id}/port/{port:[0-9]{1,5}}")
async def reach_port(request: web.Request) -> web.StreamResponse:
    """A connection to a TCP port in the task's container; the connection of the request becomes its other end."""
    task = await _task(request)
    port = int(request.match_info["port"])
    if not 0 < port < 65536:
        raise InvalidArgument(f"invalid port {port}: want 1 to 65535")
    if "upgrade" not in request.headers:
        raise InvalidArgument("a connection to a port needs the header Upgrade: tcp")
    _record(request, task, f"port/{port}")
    async with manager_of(request).tunnels.open(task, port=port) as tunnel, _taken_over(request) as client:
        client.transport.write(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
        await join_client(client, tunnel, is_port=True)
    return Hijacked()


async def _task(request: web.Request) -> Task:
    return target_of(await current_view(request), request.match_info["id"])


async def _forward(request: web.Request, task: Task, path: str) -> web.StreamResponse:
    """One exchange with the Engine API of the task's node.  Raises: SkepError: there is no tunnel to it."""
    # Not by the id: authorization has replaced what the path names by it.
    _record(request, task, _WHAT.sub("", request.path))
    async with manager_of(request).tunnels.open(task, head=_head(request, path)) as tunnel:
        if _upgrades(request):
            await tunnel.send(await request.read())
            body = None
        else:
            body = _send_body(request, tunnel)
        async with _taken_over(request) as client:
            await join_client(client, tunnel, body=body)
    return Hijacked()


def _head(request: web.Request, path: str) -> bytes:
    """The head of the request as the node gets it; with the client's version of the API, or the node's own.

    Raises: InvalidArgument: its body would not be framed as the head says.
    """
    if "Content-Encoding" in request.headers:
        raise InvalidArgument("requests to the containers of tasks cannot have the header Content-Encoding")
    if _upgrades(request) and request.content_length is None and request.body_exists:
        raise InvalidArgument("a request that upgrades its connection cannot have Transfer-Encoding: chunked")
    version = f"/v{given}" if (given := request.match_info.get("version")) else ""
    query = f"?{request.rel_url.raw_query_string}" if request.rel_url.raw_query_string else ""
    lines = [f"{request.method} {version}{path}{query} HTTP/1.1", "Host: node"]
    lines += [f"{name}: {request.headers[name]}" for name in _PASSED_HEADERS if name in request.headers]
    if _upgrades(request):
        lines += ["Connection: Upgrade", "Upgrade: tcp"]
    else:
        lines.append("Connection: close")
    if request.content_length is not None:
        lines.append(f"Content-Length: {request.content_length}")
    elif request.body_exists:
        lines.append("Transfer-Encoding: chunked")
    return "\r\n".join((*lines, "", "")).encode("utf-8", "surrogateescape")


def _upgrades(request: web.Request) -> bool:
    """Whether the connection may stop being HTTP: others would be kept by the node for a second request."""
    return "upgrade" in request.headers and request.path.endswith(("/container/attach", "/start"))


async def _send_body(request: web.Request, tunnel: Tunnel) -> None:
    """The body as it arrives, framed as the head says."""
    is_chunked = request.content_length is None and request.body_exists
    async for data in request.content.iter_any():
        await tunnel.send(b"%x\r\n%b\r\n" % (len(data), data) if is_chunked else data)
    if is_chunked:
        await tunnel.send(b"0\r\n\r\n")


@asynccontextmanager
async def _taken_over(request: web.Request) -> AsyncIterator[Connection]:
    """The client's connection, for the response as the node sends it; closed with the block."""
    client = Connection()
    take_over(request, client)
    try:
        yield client
    except SkepError as error:
        # The head may have been sent: only the end of the connection can say it.
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


def _record(request: web.Request, task: Task, what: str) -> None:
    if _RECORDED.fullmatch(what):
        by = client_of(request)
        log.info(
            "container reached",
            request=f"{request.method} {what}",
            task=task.id,
            node=task.node_id,
            client=by.summary,
        )
        record_reached(request, task, what)
