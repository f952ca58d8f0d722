"""Containers of this node in the Engine API.

A task whose container is stopped or removed by hand fails, and the cluster replaces it.

Source: moby 20.10, api/server/router/container/container_routes.go.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import msgspec
import structlog
from aiohttp import web
from msgspec.structs import replace

from skep.aio.clock import Clock, SystemClock
from skep.aio.trees import walk_tree
from skep.api.access.identity import identity_of
from skep.api.access.permissions import sees
from skep.api.errors import NotModified, Untranslated
from skep.api.formats.filters import is_prunable, until_of
from skep.api.http.server import (
    Filters,
    JsonLines,
    Routes,
    api_version,
    flag,
    json_list_response,
    json_response,
    read_body,
)
from skep.api.http.tables import RouteTable
from skep.api.http.versions import ApiVersion
from skep.engine.api.exec import exec_routes
from skep.engine.api.files import file_routes
from skep.engine.api.queries import integer
from skep.engine.api.responses import container_responses
from skep.engine.api.responses.container_listing import ListingOptions, ancestors, image_id_among, select
from skep.engine.api.responses.container_versions import container_known_to, line_known_to
from skep.engine.api.streams.container_output import output_routes
from skep.engine.capacity import processors
from skep.engine.confinement.limits import check_cpus
from skep.engine.containers.container import (
    BeingRemoved,
    Conflicting,
    Container,
    ContainerState,
    NotRunning,
    StillRunning,
    WaitCondition,
)
from skep.engine.containers.image_mounts import images_of
from skep.engine.containers.request import cleared_limits, create_warnings, read_create, read_update
from skep.engine.containers.updates import refuse_cleared, updated
from skep.engine.engine import Engine
from skep.engine.images.archives.untar import tree_bytes
from skep.engine.images.local import LocalImages
from skep.engine.images.platforms import parse_platform, require_platform
from skep.engine.images.removal import ImageUser
from skep.errors import AlreadyExists, InvalidArgument, NotFound, SkepError, Unavailable, Unimplemented
from skep.model.options.secret_env import SECRET_ENV_LABEL

log = structlog.get_logger()

_LINES_AT_ONCE = 128
"""Number of list entries that are rendered in a row before other requests run."""
_WITHOUT_NULL_ERROR = _WITH_STOP_SIGNAL = _WITH_CONSOLE_SIZE = ApiVersion("1.42")
_WITH_CONDITION = ApiVersion("1.30")
_EMPTY_OBJECT_BYTES_MAX = 7
"""Longest body of a start in bytes that counts as empty, as in moby.

Clients send ``{}`` or ``null``.  An object with a field is longer.
"""


def image_users(engine: Engine) -> Collection[ImageUser]:
    """Return every container as a user of its image and of the images that it mounts."""
    return [ImageUser(one.id, image, one.is_active) for one in engine.list() for image in images_of(one)]


class ContainerRoutes(msgspec.Struct, frozen=True):
    """Dependencies of these routes."""

    engine: Engine
    clock: Clock


_table = RouteTable[ContainerRoutes]()


def container_routes(engine: Engine, clock: Clock | None = None) -> Iterable[web.AbstractRouteDef]:
    """Return the routes ``/containers/...`` and ``/exec/...``, without ``/containers/create``."""
    clock = clock or SystemClock()
    own = _table.bound(ContainerRoutes(engine, clock))
    return (*own, *exec_routes(engine.execs), *output_routes(engine, clock), *file_routes(engine))


def create_routes(engine: Engine) -> Routes:
    """Return the route ``POST /containers/create``."""
    table = Routes()

    @table.post("/containers/create")
    async def create(request: web.Request) -> web.StreamResponse:
        return await create_container(engine, request)

    return table


async def create_container(engine: Engine, request: web.Request) -> web.StreamResponse:
    """Create a plain container from the body of ``request``."""
    body = read_create(await read_body(request))
    check_cpus(body.host_config.nano_cpus, processors())
    if platform := request.query.get("platform"):
        require_platform(engine.images.get(body.image), body.image, parse_platform(platform))
    version = api_version(request)
    warnings = create_warnings(body, version)
    if version < _WITH_CONSOLE_SIZE:
        body = replace(body, host_config=replace(body.host_config, console_size=()))
    container = await engine.create(body, name=request.query.get("name", ""))
    warnings = [*container.warnings, *warnings]
    if body.host_config.network_mode == "host" and body.host_config.port_bindings:
        warnings.append("Published ports are discarded when using host network mode")
    return json_response({"Id": container.id, "Warnings": warnings}, 201)


@_table.get("/containers/json")
async def list_containers(served: ContainerRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker ps``: one line per container.  ``limit`` n selects the n newest, running or not."""
    filters, containers = Filters.of(request), served.engine.list()
    image_id: Callable[[str], str] = partial(_image_id, served.engine.images)
    if not sees(identity_of(request), ""):
        # Drop containers that the user may not see first, because filters and the limit must not depend on them.
        containers = [one for one in containers if sees(identity_of(request), one.stack)]
        image_id = image_id_among(containers)
    selection = ListingOptions(
        filters=filters,
        all=flag(request, "all"),
        limit=_limit(request),
        ancestors=ancestors(filters["ancestor"], image_id),
        network_ids=served.engine.network_ids,
    )
    found = select(containers, selection)
    has_size, now_ns, lines = flag(request, "size"), served.clock.now_ns(), list[Mapping[str, Any]]()
    for number, container in enumerate(found, 1):
        size = await _sizes(served, container) if has_size else {}
        line = container_responses.summary(container, served.engine.images, now_ns, selection.network_ids)
        lines.append(line_known_to(api_version(request), line | size))
        if number % _LINES_AT_ONCE == 0:
            await asyncio.sleep(0)  # let other requests run
    return json_list_response(lines)


def _image_id(images: LocalImages, word: str) -> str:
    image = images.lookup(word)
    return image.id if image is not None else ""


@_table.get("/containers/{id}/json")
async def inspect_container(served: ContainerRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker inspect``."""
    container = served.engine.get(request.match_info["id"])
    exec_ids = [exec.id for exec in served.engine.execs.of(container.id)]
    response = container_responses.inspected(
        container, served.engine.bundles, exec_ids, served.engine.network_ids
    )
    if flag(request, "size"):
        response |= await _sizes(served, container)
    return json_response(container_known_to(api_version(request), response))


async def _sizes(served: ContainerRoutes, container: Container) -> dict[str, int]:
    image = served.engine.images.lookup(container.image_id)
    changed = await walk_tree(tree_bytes, str(served.engine.bundles.path(container.id) / "upper"))
    total = changed + (image.size_bytes if image is not None else 0)
    return {"SizeRw": changed, "SizeRootFs": total} if changed else {"SizeRootFs": total}


@_table.get("/containers/{id}/top")
async def show_processes(served: ContainerRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker top``."""
    top = await served.engine.top(request.match_info["id"], request.query.get("ps_args", ""))
    return json_response({"Processes": top.processes, "Titles": top.titles})


@_table.get("/containers/{id}/changes")
async def show_changes(served: ContainerRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker diff``.  Responds with null if the container changed nothing."""
    with served.engine.action_times.timed("changes"):
        changes = await walk_tree(served.engine.changes, request.match_info["id"])
    return json_response([{"Path": path, "Kind": kind} for kind, path in changes] or None)


@_table.post("/containers/{id}/wait")
async def wait(served: ContainerRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker wait``: the exit code, once the condition holds."""
    condition = _condition(request)
    container = served.engine.get(request.match_info["id"])
    async with JsonLines(request) as lines:  # send the header before the container has ended
        ended = await served.engine.wait(container.id, condition)
        response: dict[str, Any] = {"StatusCode": ended.exit_code}
        # A successful removal clears the error of a failed start (moby, container/state.go, SetRemovalError).
        if ended.error and condition is not WaitCondition.REMOVED:
            response["Error"] = {"Message": ended.error}
        elif api_version(request) < _WITHOUT_NULL_ERROR:
            response["Error"] = None
        await lines.send(response)
    return lines.response


@_table.post("/containers/{id}/kill")
async def kill(served: ContainerRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker kill``."""
    word = request.match_info["id"]
    try:
        await served.engine.kill(word, request.query.get("signal") or "SIGKILL")
    except NotFound as error:
        raise NotFound(f"Cannot kill container: {word}: {error}") from error
    except Unavailable as error:
        raise Untranslated(f"Cannot kill container: {word}: {error}") from error
    return web.Response(status=204)


@_table.post("/containers/{id}/stop")
async def stop(served: ContainerRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker stop``.  Responds with 304 if it does not run.  Waits for a start in progress, as Docker does."""
    container = served.engine.get(request.match_info["id"])
    grace_s = _grace(request)
    if not container.is_active:
        served.engine.note_stopped(container.id)
        if not (await served.engine.lifecycle.await_start(container.id)).is_running:
            raise NotModified
    try:
        await served.engine.stop(container.id, grace_s, _stop_signal(request))
    except (InvalidArgument, Unavailable) as error:
        raise Untranslated(f"cannot stop container: {request.match_info['id']}: {error}") from error
    return web.Response(status=204)


@_table.post("/containers/{id}/start")
async def start(served: ContainerRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker start``.  Responds with 304 if it runs already, or its policy will start it."""
    _check_start(request)
    container = served.engine.get(request.match_info["id"])
    if container.is_active:
        raise NotModified
    _require_startable(container)
    await served.engine.start(container.id)
    return web.Response(status=204)


@_table.post("/containers/{id}/restart")
async def restart(served: ContainerRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker restart``: stop and start.  A container that does not run is only started."""
    word = request.match_info["id"]
    container = served.engine.get(word)
    _require_startable(container)
    try:
        await served.engine.stop_and_start(container.id, _grace(request), _stop_signal(request))
    except (NotFound, NotRunning, BeingRemoved) as error:
        raise type(error)(f"Cannot restart container {word}: {error}") from error
    except (InvalidArgument, Unavailable) as error:
        raise Untranslated(f"Cannot restart container {word}: {error}") from error
    return web.Response(status=204)


def _check_start(request: web.Request) -> None:
    """Refuse unsupported options of a start, instead of starting a container without them.

    Raises: InvalidArgument.  Source: moby, api/server/router/container/container_routes.go, daemon/start.go.
    """
    length = request.content_length
    if (length is None and request.can_read_body) or (length or 0) > _EMPTY_OBJECT_BYTES_MAX:
        raise InvalidArgument(
            "starting container with non-empty request body was deprecated since API v1.22 and removed in v1.24"
        )
    if request.query.get("checkpoint"):
        raise InvalidArgument("checkpoint is only supported in experimental mode")


def _require_startable(container: Container) -> None:
    """Raise Unimplemented for a task's container with secrets, because without its task it would run without them."""
    if container.plain is None and SECRET_ENV_LABEL in container.labels:
        raise Unimplemented(
            f"The container of a task with {SECRET_ENV_LABEL} is started by its task only, which has the secrets: "
            "use docker service update --force."
        )


@_table.post("/containers/{id}/pause")
async def pause(served: ContainerRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker pause``."""
    container = served.engine.get(request.match_info["id"])
    if container.state is ContainerState.PAUSED:
        raise NotRunning(f"Container {container.id} is already paused")
    await served.engine.pause(container.id)
    return web.Response(status=204)


@_table.post("/containers/{id}/unpause")
async def unpause(served: ContainerRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker unpause``."""
    container = served.engine.get(request.match_info["id"])
    if container.state is not ContainerState.PAUSED:
        raise Untranslated(f"Container {container.id} is not paused")
    await served.engine.unpause(container.id)
    return web.Response(status=204)


@_table.post("/containers/{id}/resize")
async def resize(served: ContainerRoutes, request: web.Request) -> web.StreamResponse:
    """Set the size of the terminal to ``h`` rows and ``w`` columns."""
    height, width = integer(request, "h"), integer(request, "w")
    await served.engine.resize(request.match_info["id"], height, width)
    return web.Response()


@_table.post("/containers/{id}/update")
async def update(served: ContainerRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker update``: limits and restart policy.  Omitted fields stay unchanged."""
    raw, version = await read_body(request), api_version(request)
    body = read_update(raw, version)
    check_cpus(body.nano_cpus, processors())
    before = served.engine.get(request.match_info["id"])
    refuse_cleared(cleared_limits(raw, version), before)
    after = await served.engine.update(before.id, partial(updated, body))
    return json_response({"Warnings": list(after.warnings[len(before.warnings) :]) or None})


@_table.post("/containers/prune")
async def prune(served: ContainerRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker container prune``: remove containers that do not run.

    Containers of tasks that are about to start stay. A build's containers stay, because it reads their changes later.

    A failed removal does not prevent others.  Source: moby, daemon/prune.go (ContainersPrune).
    """
    filters = Filters.of(request)
    filters.refuse_unknown("label", "label!", "until")
    until_ns = until_of(filters, served.clock.now_ns())
    freed_bytes, removed = 0, []
    for container in served.engine.list():
        if (
            not container.is_active
            and not container.is_unfilled
            and (container.was_started if container.plain is None else not container.plain.is_step)
            and is_prunable(container.created_at, container.labels, filters, until_ns)
        ):
            size = (await _sizes(served, container)).get("SizeRw", 0)
            try:
                await served.engine.remove(container.id)
            except SkepError as error:  # also if it ended or was started meanwhile
                log.warning("container not pruned", container=container.id, reason=str(error))
                continue
            freed_bytes += size
            removed.append(container.id)
    return json_response({"ContainersDeleted": removed or None, "SpaceReclaimed": freed_bytes})


@_table.delete("/containers/{id}")
async def remove(served: ContainerRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker rm``."""
    word = request.match_info["id"]
    container = served.engine.get(word)
    if flag(request, "link"):
        # A link has paths of two containers, but only the container itself can be named.
        raise Conflicting("Conflict, cannot remove the default link name of the container")
    try:
        await served.engine.remove(
            container.id, force=flag(request, "force"), with_volumes=flag(request, "v")
        )
    except StillRunning as error:
        raise StillRunning(f'cannot remove container "{word}": {error}') from error
    return web.Response(status=204)


@_table.post("/containers/{id}/rename")
async def rename(served: ContainerRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker rename``, only for plain containers."""
    container = served.engine.get(request.match_info["id"])
    if container.plain is None:
        raise Unimplemented("The container of a task keeps the task's name: it cannot be renamed.")
    name = request.query.get("name", "")
    if not name:
        raise InvalidArgument("Neither old nor new names may be empty")
    try:
        await served.engine.rename(container.id, name)
    except AlreadyExists as error:
        if isinstance(error, BeingRemoved):
            raise
        raise AlreadyExists(f"Error when allocating new name: {error}") from error
    return web.Response(status=204)


def _limit(request: web.Request) -> int:
    try:
        return integer(request, "limit", 0)
    except InvalidArgument as error:
        raise Untranslated(str(error)) from error


def _grace(request: web.Request) -> float | None:
    """Return the grace period in seconds.

    None means the container's own period.  With a negative one, it is never killed.
    """
    if not request.query.get("t"):
        return None
    try:
        grace_s = integer(request, "t")
    except InvalidArgument as error:
        raise Untranslated(str(error)) from error
    return float(grace_s)


def _stop_signal(request: web.Request) -> str:
    """Return the signal, or "" for the container's own.

    Source: moby, api/server/router/container/container_routes.go.
    """
    return request.query.get("signal", "") if api_version(request) >= _WITH_STOP_SIGNAL else ""


def _condition(request: web.Request) -> WaitCondition:
    text = request.query.get("condition", "") if api_version(request) >= _WITH_CONDITION else ""
    text = text or WaitCondition.NOT_RUNNING.value
    try:
        return WaitCondition(text)
    except ValueError as error:
        raise InvalidArgument(f'invalid condition: "{text}"') from error
