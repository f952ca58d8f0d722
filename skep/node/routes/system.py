"""``/_ping``, ``/version``, ``/info``, ``/events`` of this node; and the refusal of unsupported routes.

Events have the form of each version of the Engine API.  The membership of this node has the routes ``/swarm/init``,
``join``, ``leave`` and ``unlock``, and the manager serves the rest of ``/swarm``.

Source: moby 20.10, api/server/router/system/system_routes.go, api/server/router/swarm/cluster_routes.go; moby,
api/docs/CHANGELOG.md, daemon/server/router/system/system_routes.go (getEvents, backFillLegacy),
daemon/server/httputils/contenttype.
"""

import asyncio
import base64
import hashlib
from base64 import b32encode
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import msgspec
import structlog
from aiohttp import web

from skep.api.access.identity import identity_of
from skep.api.access.permissions import sees
from skep.api.backups import KEY_HEADER
from skep.api.formats.timestamps import period_of
from skep.api.http.framing import path_of
from skep.api.http.responses import JSON_SEQUENCE, ChunkedResponse
from skep.api.http.server import (
    Filters,
    JsonLines,
    Routes,
    api_version,
    common_headers,
    flag,
    json_response,
    read_json,
)
from skep.api.http.tables import RouteTable
from skep.api.http.versions import NEWEST, ApiVersion, requested
from skep.configuration.configuration import Configuration
from skep.engine.confinement import cdi
from skep.engine.containers.container import EngineCounts
from skep.engine.engine import Engine
from skep.errors import InvalidArgument, NotFound, SkepError, Unavailable, Unimplemented
from skep.model.permissions.access import Identity
from skep.model.swarm import InitRequest, JoinRequest, UnlockRequest
from skep.model.values.times import SECOND_NS, timestamp
from skep.node import info
from skep.node.cluster.cluster_reads import ClusterReads
from skep.node.cluster.membership import Membership
from skep.node.cluster.swarm_info import NOT_A_MANAGER
from skep.node.docker.docker_engine import DockerEngine
from skep.node.events import READER, EventLines, EventRequest, Message, NodeEvents, without_commands
from skep.node.host import features
from skep.node.host.description import volume_drivers

log = structlog.get_logger()

_V1_46 = ApiVersion("1.46")
_V1_52 = ApiVersion("1.52")
_V1_53 = ApiVersion("1.53")
_NEWLINE_DELIMITED, _JSON_LINES = "application/x-ndjson", "application/jsonl"
_LEGACY = ("status", "id", "from")
"""Fields that only clients before API 1.22 need, and that versions before 1.52 still have."""

_membership = RouteTable[Membership]()


class NodeSystem:
    """The content of ``/_ping``, ``/version``, ``/info`` and ``/events``.

    Args:
        engine: This node's engine, or None on a node without containers.
        docker: The machine's Docker Engine, if there is one.
        warnings: Returns sentences about the configuration, conditions, published ports and connections to other nodes.
    """

    def __init__(
        self,
        node: info.NodeProperties,
        *,
        membership: Membership,
        reads: ClusterReads,
        events: NodeEvents,
        engine: Engine | None,
        docker: DockerEngine | None,
        warnings: Callable[[], Sequence[str]],
    ) -> None:
        self._node = node
        self._membership = membership
        self.reads = reads
        self._events = events
        self._engine = engine
        self._docker = docker
        self._warnings = warnings

    @property
    def node(self) -> info.NodeProperties:
        """The node's present properties."""
        return self._node

    def configure(self, configuration: Configuration) -> None:
        """Show ``configuration`` from now on, after a reload."""
        self._node = msgspec.structs.replace(self._node, configuration=configuration)

    @property
    def builds_images(self) -> bool:
        """Whether this node builds images itself.  If the machine has a Docker Engine, the engine builds them."""
        return self._engine is not None and self._docker is None

    @property
    def newest_version(self) -> ApiVersion:
        """The highest supported API version, limited by the machine's Docker Engine."""
        return NEWEST if self._docker is None else self._docker.api_version

    def now_s(self) -> float:
        """Return the seconds since 1970."""
        return self._events.clock.now_ns() / SECOND_NS

    @property
    def swarm_header(self) -> str:
        """The ``Swarm`` header of ``/_ping``."""
        return self._membership.header

    def version(self) -> Mapping[str, Any]:
        """Return ``/version``, with the version of the Docker Engine if there is one."""
        if self._docker is None:
            return info.version(self._node, str(self.newest_version))
        node = msgspec.structs.replace(self._node, engine=self._docker.version)
        return info.version(node, str(self.newest_version))

    async def info(self, identity: Identity) -> Mapping[str, Any]:
        """Return ``/info`` of this node, its membership, and the Docker Engine if there is one.

        The counts include only containers that ``identity`` may see, and their images.
        """
        swarm = await self._membership.info()
        counts = await self._counts(identity)
        directories = self._node.configuration.cdi_spec_dirs if self._engine is not None else ()
        described = await asyncio.to_thread(cdi.described, directories)
        shown = info.info(
            self._node,
            counts=counts,
            swarm=swarm,
            warnings=(
                *swarm.get("Warnings", ()),
                *features.warnings(self._node.features),
                *(f"WARNING: {sentence}" for sentence in self._warnings()),
            ),
            now=timestamp(self._events.clock.now_ns()),
            devices=described,
        )
        shown["Plugins"]["Volume"] += volume_drivers(self._engine)
        return shown

    async def _counts(self, identity: Identity) -> EngineCounts:
        engine, counts = self._engine, EngineCounts()
        if not sees(identity, ""):
            seen = engine.list() if engine is not None else ()
            return EngineCounts.of([one for one in seen if sees(identity, one.stack)])
        if engine is not None:
            counts = engine.counts()
        if self._docker is not None:
            own = [one.id for one in engine.images.images()] if engine is not None else ()
            counts += await self._docker.counts(own)
        return counts

    async def stream_events(
        self,
        request: EventRequest,
        begin: Callable[[], Awaitable[None]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Stream events of this node, its manager, and the Docker Engine.

        For the arguments see ``NodeEvents.stream``.
        """
        sources: list[EventLines] = [self]
        if self._docker is not None:
            sources.append(self._docker.api)
        await self._events.stream(request, sources, begin, send)

    def lines(self, path: str, query: Mapping[str, str]) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Return the lines of a manager's response.

        The manager is this node's own, or else the manager of its session.
        """
        return (self.reads.own if self._membership.is_manager else self.reads).lines(path, query)

    async def read_cluster(self, request: web.Request) -> web.StreamResponse:
        """Return a manager's response to a request of a worker's client.

        Raises: Unavailable, in Docker's words: this node has a manager of its own, or is in no cluster, or the cluster
        does not allow it, or no manager answers.
        """
        reason = self._membership.manager_refusal() or NOT_A_MANAGER
        if reason != NOT_A_MANAGER:
            raise Unavailable(reason)
        try:
            async with self.reads.pieces(request.raw_path) as pieces:
                async with ChunkedResponse(request, content_type="application/json") as response:
                    async for piece in pieces:
                        await response.response.write(piece)
                return response.response
        except NotFound:
            raise
        except SkepError as error:
            log.debug("not read from a manager", path=request.path, reason=str(error))
            raise Unavailable(reason) from error


def engine_id(data_dir: Path) -> str:
    """Return the ``ID`` of ``/info``, which stays the same while this data directory stays on this machine."""
    try:
        machine = Path("/etc/machine-id").read_bytes()
    except OSError:
        machine = b""
    text = b32encode(hashlib.sha256(machine + bytes(data_dir)).digest()).decode()[:48]
    return ":".join(text[start : start + 4] for start in range(0, 48, 4))


_table = RouteTable[NodeSystem]()


def system_routes(system: NodeSystem) -> list[web.RouteDef]:
    """Return ``/_ping``, ``/version``, ``/info`` and ``/events``."""
    return _table.bound(system)


@_table.head("/_ping")
@_table.get("/_ping")
async def ping(system: NodeSystem, request: web.Request) -> web.StreamResponse:
    """Handle ``/_ping``.  The headers of the response have the API version."""
    headers, body = _ping(system, request.method)
    return web.Response(text=body, headers=headers)


def ping_response(system: NodeSystem, method: str, version: str | None) -> bytes | None:
    """Return the response of ``ping`` as bytes for the front, or None if the version must be refused."""
    newest = system.newest_version
    try:
        requested(version, newest)
    except InvalidArgument:
        return None
    headers, body = _ping(system, method)
    headers |= common_headers(newest) | {"Date": formatdate(system.now_s(), usegmt=True)}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 200 OK\r\n{lines}\r\n{body}".encode()


def _ping(system: NodeSystem, method: str) -> tuple[dict[str, str], str]:
    body = "" if method == "HEAD" else "OK"
    return {
        "Cache-Control": "no-cache, no-store, must-revalidate",
        "Pragma": "no-cache",
        "Swarm": system.swarm_header,
        **({"Builder-Version": "2"} if system.builds_images else {}),
        "Content-Type": "text/plain; charset=utf-8",
        "Content-Length": str(len(body)),
    }, body


@_table.get("/version")
async def show_version(system: NodeSystem, request: web.Request) -> web.StreamResponse:
    """Handle ``docker version``."""
    return json_response(system.version())


@_table.get("/info")
async def show_info(system: NodeSystem, request: web.Request) -> web.StreamResponse:
    """Handle ``docker info``."""
    return json_response(info.known_to(api_version(request), await system.info(identity_of(request))))


def is_known_to(version: ApiVersion, message: Mapping[str, Any]) -> bool:
    """Return whether API ``version`` has the event: since 1.46, new images without names have one."""
    return version >= _V1_46 or (message["Type"], message["Action"]) != ("image", "create")


def known_to(version: ApiVersion, message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an event in the form of API ``version``.

    Events of a new Docker Engine on the machine lack the legacy fields, so older versions get them here.
    """
    if version >= _V1_52:
        return {name: value for name, value in message.items() if name not in _LEGACY}
    type, actor = message["Type"], message["Actor"]
    if type not in ("container", "image"):
        return message
    legacy = {"status": message["Action"], "id": actor["ID"]}
    if type == "container":
        legacy["from"] = actor["Attributes"].get("image", "")
    return {**legacy, **message}


def content_type_for(version: ApiVersion, accept: str) -> str:
    """Return the media type of the stream, which ``accept`` prefers by name, or else the version's default.

    Wildcards do not count, because clients that send them may not know the newer media types.
    """
    if version < _V1_52:
        return "application/json"
    known = (_NEWLINE_DELIMITED, JSON_SEQUENCE, *((_JSON_LINES,) if version >= _V1_53 else ()))
    preferred, best = known[-1] if version >= _V1_53 else _NEWLINE_DELIMITED, 0.0
    for part in accept.split(","):
        name, *parameters = (word.strip() for word in part.lower().split(";"))
        quality = _quality(parameters)
        if name in known and quality > best:
            preferred, best = name, quality
    return preferred


def _quality(parameters: list[str]) -> float:
    for one in parameters:
        name, _, value = one.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


@_table.get("/events")
async def stream_events(system: NodeSystem, request: web.Request) -> web.StreamResponse:
    """Stream events of this node and of the cluster, one JSON object per line, each sent at once."""
    since, until = period_of(request)
    wanted = EventRequest(since, until, Filters.of(request), dict(request.query))
    version = api_version(request)
    lines = JsonLines(request, content_type=content_type_for(version, request.headers.get("Accept", "")))

    async def send(message: Message) -> None:
        if not is_known_to(version, message):
            return
        shown = without_commands(message) if READER in request.headers else message
        await lines.send(known_to(version, shown))

    await system.stream_events(wanted, lines.begin, send)
    return lines.response


@_table.get("/services")
@_table.get("/services/{id}")
@_table.get("/tasks")
@_table.get("/tasks/{id}")
@_table.get("/nodes")
@_table.get("/nodes/{id}")
@_table.get("/skep/events")
@_table.get("/skep/history")
async def read_cluster(system: NodeSystem, request: web.Request) -> web.StreamResponse:
    """Answer a worker's client with a manager's response.

    A node with a manager passes such requests on to its manager.
    """
    return await system.read_cluster(request)


_NO_CONTAINERS = "this node runs services as plain processes, not containers"
_NO_PLUGINS = "engine plugins are not supported; volume plugins are processes with a socket of their own"
_NEEDS_CONTAINERS = ("auth", "build", "commit", "grpc", "plugins", "session", "system", "volumes")
"""First parts of the paths that a node without containers does not serve."""


def unsupported_routes(*, has_containers: bool) -> Routes:
    """Return routes for paths of Docker's API that this node does not serve.

    They answer with the reason instead of 404.
    """
    table = Routes()

    def refuse(method: str, path: str, reason: str) -> None:
        async def handle(request: web.Request) -> web.StreamResponse:
            raise Unimplemented(
                f"{request.method} {path_of(request.path)} is not answered by this node: {reason}. "
                "To serve such requests, give skep a Docker Engine (--engine-socket)"
            )

        table.route(method, path)(handle)

    async def refuse_checkpoints(request: web.Request) -> web.StreamResponse:
        raise Unimplemented(
            "This experimental feature is disabled by default. Start the Docker daemon in experimental mode in order "
            "to enable it."
        )

    table.get("/containers/{id}/checkpoints")(refuse_checkpoints)
    table.post("/containers/{id}/checkpoints")(refuse_checkpoints)
    table.delete("/containers/{id}/checkpoints/{checkpoint}")(refuse_checkpoints)
    refuse("GET", "/plugins/privileges", _NO_PLUGINS)
    refuse("POST", "/plugins/{tail:.+}", _NO_PLUGINS)
    refuse("DELETE", "/plugins/{tail:.+}", _NO_PLUGINS)
    if not has_containers:
        refuse("POST", "/containers/create", _NO_CONTAINERS)
        for word in _NEEDS_CONTAINERS:
            refuse("*", f"/{word}", _NO_CONTAINERS)
            refuse("*", f"/{word}/{{tail:.*}}", _NO_CONTAINERS)
    return table


def swarm_routes(membership: Membership) -> list[web.RouteDef]:
    """Return ``/swarm/init``, ``join``, ``leave``, ``unlock`` and ``/skep/restore``."""
    return _membership.bound(membership)


@_membership.post("/swarm/init")
async def init(membership: Membership, request: web.Request) -> web.StreamResponse:
    """Handle ``docker swarm init``."""
    return json_response(await membership.init(await read_json(request, InitRequest)))


@_membership.post("/swarm/join")
async def join(membership: Membership, request: web.Request) -> web.StreamResponse:
    """Handle ``docker swarm join``."""
    await membership.join(await read_json(request, JoinRequest))
    return web.Response()


@_membership.post("/swarm/leave")
async def leave(membership: Membership, request: web.Request) -> web.StreamResponse:
    """Handle ``docker swarm leave``."""
    await membership.leave(force=flag(request, "force"))
    return web.Response()


@_membership.post("/swarm/unlock")
async def unlock(membership: Membership, request: web.Request) -> web.StreamResponse:
    """Handle ``docker swarm unlock``."""
    await membership.unlock(await read_json(request, UnlockRequest))
    return web.Response()


@_membership.post("/skep/restore")
async def restore(membership: Membership, request: web.Request) -> web.StreamResponse:
    """Restore the backup in the request's body on this node, which must be in no swarm.  Docker has no such route."""
    try:
        key = base64.b64decode(request.headers.get(KEY_HEADER, ""), validate=True)
    except ValueError as error:
        raise InvalidArgument(f"{KEY_HEADER} is not base64") from error
    plan = await membership.restore(
        request.content.iter_any(),
        key,
        request.query.get("advertiseAddr", ""),
        is_dry=flag(request, "dryRun"),
    )
    return json_response(plan)
