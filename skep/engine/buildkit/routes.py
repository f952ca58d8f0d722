"""HTTP routes of BuildKit's protocols: ``/session``, ``/grpc``, and ``/build`` with a session, as in docker 20.10.

Source: moby 20.10, api/server/router/session, api/server/router/grpc, builder/builder-next/builder.go.
"""

import asyncio
import secrets
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from skep.aio.clock import Clock
from skep.aio.race import LostRace, run_unless
from skep.api.http.responses import Hijacked
from skep.api.http.server import JsonLines, flag
from skep.api.http.tables import RouteTable
from skep.engine.api.streams.hijack import upgrade
from skep.engine.api.streams.uploads import drain, pieces_of
from skep.engine.build.builder import Builder
from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.buildkit.caches import Caches
from skep.engine.buildkit.contexts import ContextStore
from skep.engine.buildkit.protocol.control import Control
from skep.engine.buildkit.protocol.filesend import image_archive
from skep.engine.buildkit.protocol.sessions import SILENT_S, BuildSessions, SessionInfo
from skep.engine.buildkit.solver import Solver
from skep.engine.buildkit.uploads import PREFIX, OpenUpload, Uploads
from skep.engine.images.progress import ProgressMessage, failure
from skep.errors import InvalidArgument, ResourceExhausted, SkepError, Unavailable, Unimplemented
from skep.rpc.serving import LIMITS, connection
from skep.rpc.status import CallFailed

CONNECTIONS_MAX = 64
"""Largest number of connections.  Each build has two or three."""


class BuildKit:
    """Everything that clients of BuildKit's protocols can reach."""

    def __init__(self, sessions: BuildSessions, solver: Solver, control: Control) -> None:
        self.sessions = sessions
        self.solver = solver
        self.control = control
        self.uploads = Uploads()
        self.connections = 0
        self.running: dict[str, asyncio.Task[object]] = {}
        """Builds of docker 20.10 by the client's ids."""


_table = RouteTable[BuildKit]()


def buildkit_for(builder: Builder, clock: Clock) -> BuildKit:
    """Return BuildKit's protocols for an engine's builder."""
    images = builder.images
    sessions = BuildSessions()
    contexts = ContextStore(images.contexts, images.limits)
    solver = Solver(
        builder, partial(image_archive, builder.engine), sessions, contexts, Caches(builder.images), clock
    )
    return BuildKit(sessions, solver, Control(sessions, solver, builder))


def handlers(buildkit: BuildKit) -> Mapping[str, Handler]:
    """Return the handlers of ``/session``, ``/grpc``, ``/build/cancel``, and of ``/build`` with ``version=2``."""
    return {"/build": partial(build, buildkit)} | {
        route.path: route.handler for route in buildkit_routes(buildkit)
    }


def buildkit_routes(buildkit: BuildKit) -> list[web.RouteDef]:
    """Return the routes ``/session``, ``/grpc`` and ``/build/cancel``."""
    return _table.bound(buildkit)


@_table.post("/session")
async def open_session(buildkit: BuildKit, request: web.Request) -> web.StreamResponse:
    """Take over the connection.  From now on the engine calls the client on it."""
    _require_http2(request)
    async with buildkit.sessions.register(SessionInfo.of(request.headers.items())) as session:
        connection = session.connection
        await session.keep_checking_while(upgrade(request, connection, connection.connection_made))
    return Hijacked()


@_table.post("/grpc")
async def serve_control(buildkit: BuildKit, request: web.Request) -> web.StreamResponse:
    """Take over the connection.  From now on the client calls BuildKit's control protocol on it."""
    _require_http2(request)
    if buildkit.connections >= CONNECTIONS_MAX:
        raise ResourceExhausted(f"there are {CONNECTIONS_MAX} build connections already")
    protocol = connection(buildkit.control.methods())
    buildkit.connections += 1
    try:
        await upgrade(request, protocol, lambda transport: protocol.begin(transport, LIMITS))
        await protocol.wait_closed()
    finally:
        buildkit.connections -= 1
        protocol.abort()
    return Hijacked()


def _require_http2(request: web.Request) -> None:
    wanted = request.headers.get("Upgrade", "")
    if not wanted:
        raise InvalidArgument("no upgrade proto in request")
    if wanted != "h2c":
        raise InvalidArgument(f"protocol {wanted} not supported")


@_table.post("/build/cancel")
async def cancel_build(buildkit: BuildKit, request: web.Request) -> web.StreamResponse:
    """Cancel a build of docker 20.10."""
    id = request.query.get("id", "")
    if not id:
        raise InvalidArgument("build ID not provided")
    if task := buildkit.running.get(id):
        task.cancel()
    return web.Response()


async def build(buildkit: BuildKit, request: web.Request) -> web.StreamResponse:
    """Handle ``POST /build?version=2``: a build with a session, as in docker 20.10, or the upload of its context."""
    id = request.query.get("buildid", "")
    if id.startswith(f"{PREFIX}:"):
        return await _receive_upload(buildkit.uploads, id.removeprefix(f"{PREFIX}:"), request)
    has_upload = request.query.get("remote") == PREFIX
    upload = partial(buildkit.uploads.take, id) if has_upload else None
    try:
        wanted = solve_request(request.query, secrets.token_hex(12))
    except SkepError:
        if has_upload:  # otherwise the client would report that nothing reads its upload
            with suppress(SkepError):
                async with buildkit.uploads.take(id):
                    pass
        raise
    is_quiet = flag(request, "q")
    lines = JsonLines(request)
    async with asyncio.TaskGroup() as group:
        work = group.create_task(_outcome(buildkit.solver, wanted, upload), name="build")
        buildkit.running[id] = work
        try:
            async with lines:
                await _show(buildkit.solver, wanted.ref, work, lines)
                last = await work
                await lines.send(last)
                if is_quiet and last.aux and last.aux["ID"]:  # the client prints the output of a quiet build
                    await lines.send(ProgressMessage(stream=f"{last.aux['ID']}\n"))
        except (ConnectionError, asyncio.CancelledError):
            work.cancel()
            if work.cancelled() or work.cancelling():
                return lines.response
            raise
        finally:
            buildkit.running.pop(id, None)
            if has_upload:
                buildkit.uploads.end(id)
    return lines.response


async def _receive_upload(uploads: Uploads, id: str, request: web.Request) -> web.StreamResponse:
    """Pass an archive to the build ``id``, and respond when the build has read it."""

    async def pieces() -> AsyncIterator[bytes]:
        try:
            async for piece in pieces_of(request, silent_s=SILENT_S):
                yield piece
        except (OSError, web.RequestPayloadError) as error:
            # The build is another request, which can show the error.
            raise Unavailable("the client ended the upload of the build context early") from error

    await uploads.offer(id, pieces())
    await drain(request)
    return web.Response()


async def _show(solver: Solver, ref: str, work: "asyncio.Task[ProgressMessage]", lines: JsonLines) -> None:
    """Send the build's progress until it has ended."""
    try:
        await run_unless(solver.job(ref), asyncio.wait({work}))
    except LostRace:
        return  # refused before it started
    async for event in solver.status(ref):
        trace = b64encode(event.SerializeToString()).decode()
        await lines.send(ProgressMessage(id="moby.buildkit.trace", aux=trace))


async def _outcome(solver: Solver, wanted: pb.SolveRequest, upload: OpenUpload | None) -> ProgressMessage:
    """Return the last line of a build's response."""
    try:
        response = await solver.solve(wanted, upload)
    except (SkepError, CallFailed) as error:
        return failure(str(error))
    return ProgressMessage(id="moby.image.id", aux={"ID": response.get("containerimage.digest", "")})


def solve_request(query: Any, ref: str) -> pb.SolveRequest:
    """Convert ``POST /build?version=2`` to BuildKit's own request.

    Raises: Unimplemented: with the name of the unsupported option; InvalidArgument.
    """
    for name in ("squash", "securityopt", "isolation"):
        if query.get(name, "") not in ("", "0", "false", "null", "[]", "default"):
            raise Unimplemented(f"build option {name} is not supported")
    remote = query.get("remote", "client-session")
    outputs = _json(query, "outputs", list[_Output]) or [_Output(type="moby")]
    request = pb.SolveRequest(ref=ref, session=query.get("session", ""), frontend="dockerfile.v0")
    attributes = request.frontend_attrs
    attributes.update(_attributes(query))
    if remote not in ("client-session", PREFIX):
        attributes["context"] = remote
    for name, value in (_json(query, "buildargs", dict[str, str | None]) or {}).items():
        if value is not None:
            attributes[f"build-arg:{name}"] = value
    for name, value in (_json(query, "labels", dict[str, str]) or {}).items():
        attributes[f"label:{name}"] = value
    if attributes.get("force-network-mode") == "host":
        request.entitlements.append("network.host")
    for output in outputs:
        if output.type == "cacheonly":
            continue
        exporter = request.exporters.add(type=output.type)
        exporter.attrs.update(output.attrs)
        if output.type == "moby":
            exporter.attrs["name"] = ",".join(query.getall("t", []))
    return request


class _Output(msgspec.Struct, frozen=True, rename="pascal"):
    type: str = ""
    attrs: Mapping[str, str] = {}


class _Limit(msgspec.Struct, frozen=True, rename="pascal"):
    name: str
    soft: int = 0
    hard: int = 0


_PLAIN = {
    "target": "target",
    "platform": "platform",
    "memory": "memory",
    "memswap": "memswap",
    "cpushares": "cpushares",
    "cpuperiod": "cpuperiod",
    "cpuquota": "cpuquota",
    "cpusetcpus": "cpusetcpus",
    "cpusetmems": "cpusetmems",
    "cgroupparent": "cgroup-parent",
    "shmsize": "shm-size",
}


def _attributes(query: Any) -> Mapping[str, str]:
    """Return the options of the front end.  Raises: InvalidArgument."""
    attributes = {
        attribute: query[name] for name, attribute in _PLAIN.items() if query.get(name, "") not in ("", "0")
    }
    if (filename := query.get("dockerfile", "")) not in ("", "."):
        attributes["filename"] = filename
    if query.get("nocache", "") in ("1", "true"):
        attributes["no-cache"] = ""
    if query.get("pull", "") in ("1", "true"):
        attributes["image-resolve-mode"] = "pull"
    network = query.get("networkmode", "")
    if network not in ("", "default", "host", "none"):
        raise InvalidArgument(f'network mode "{network}" not supported by buildkit')
    if network in ("host", "none"):
        attributes["force-network-mode"] = network
    if hosts := query.getall("extrahosts", []):
        attributes["add-hosts"] = ",".join(host.replace(":", "=", 1) for host in hosts)
    if images := _json(query, "cachefrom", list[str]):
        attributes["cache-from"] = ",".join(images)
    if limits := _json(query, "ulimits", list[_Limit]):
        attributes["ulimit"] = ",".join(f"{limit.name}={limit.soft}:{limit.hard}" for limit in limits)
    return attributes


def _json(query: Any, name: str, kind: Any) -> Any:
    """Decode a query parameter.  Raises: InvalidArgument."""
    text = query.get(name, "")
    if not text:
        return None
    try:
        return msgspec.json.decode(text, type=kind | None)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"invalid value of {name}: {error}") from error
