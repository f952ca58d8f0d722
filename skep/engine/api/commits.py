"""Images from containers and from archives in the Engine API: ``docker commit``, ``docker import``.

Source: moby 20.10, api/server/router/image/image_routes.go, api/server/router/container/container_routes.go.
"""

from typing import Any

import msgspec
from aiohttp import web

from skep.aio.clock import Clock
from skep.api.formats.bodies import decode_body
from skep.api.http.server import Routes, flag, json_response, read_body
from skep.engine.api.responses.container_responses import config_of
from skep.engine.api.streams.progress import respond_with_progress
from skep.engine.api.streams.uploads import drain, pieces_of
from skep.engine.containers.commits import CommitRequest, commit, with_changes
from skep.engine.engine import Engine
from skep.engine.images.image import ContainerDefaults
from skep.engine.images.platforms import parse_platform, this_platform
from skep.engine.images.progress import ProgressMessage, Report
from skep.engine.images.reference import Reference, parse_reference
from skep.engine.images.store import ImageStore, ImportRequest, import_tree
from skep.errors import InvalidArgument, SkepError, Unimplemented
from skep.model.values.times import timestamp

_TEXT_BYTES_MAX = 1 << 20
"""Limit in bytes for all Dockerfile instructions of one request."""


def commit_routes(engine: Engine, clock: Clock) -> Routes:
    """Return the route ``POST /commit``."""
    table = Routes()

    @table.post("/commit")
    async def make(request: web.Request) -> web.StreamResponse:
        query = request.query
        container = engine.get(query.get("container", ""))
        own = msgspec.convert(msgspec.to_builtins(config_of(container)), ContainerDefaults)
        body = await read_body(request)
        options = CommitRequest(
            reference=_reference(query.get("repo", ""), query.get("tag", "")),
            author=query.get("author", ""),
            comment=query.get("comment", ""),
            pauses=flag(request, "pause") or not query.get("pause"),
            config=decode_body(body, ContainerDefaults) if body.strip() not in (b"", b"null") else None,
            changes=_changes(request),
        )
        with engine.action_times.timed("commit"):
            image = await commit(engine, container.id, options, own, timestamp(clock.now_ns()))
        return json_response({"Id": image.id}, 201)

    return table


async def import_image(images: ImageStore, clock: Clock, request: web.Request) -> web.StreamResponse:
    """Handle ``POST /images/create`` with ``fromSrc``: the body is the archive."""
    query = request.query
    source = query.get("fromSrc", "")
    if source != "-":
        raise Unimplemented(
            f'This node does not download file systems from "{source}":'
            ' fetch it with another tool and pipe it into "docker import -".'
        )
    platform = parse_platform(query["platform"]) if query.get("platform") else this_platform()
    if platform.os != "linux":
        raise InvalidArgument("operating system is not supported")
    options = ImportRequest(
        reference=_reference(query.get("repo", ""), query.get("tag", "")),
        comment=query.get("message", "") or f"Imported from {source}",
        config=with_changes(ContainerDefaults(), _changes(request)),
        platform=platform,
    )

    async def work(report: Report) -> None:
        try:
            image = await import_tree(images, pieces_of(request), options, timestamp(clock.now_ns()))
        except SkepError:
            await drain(request)
            raise
        report(ProgressMessage(status=image.id))

    return await respond_with_progress(request, work, early_errors=True)


def _reference(repository: str, tag: str) -> Reference | None:
    """Return the new image's name, or None for no name.  Raises: InvalidArgument."""
    if not repository:
        return None
    reference = parse_reference(repository)
    if reference.digest:
        raise InvalidArgument("cannot import digest reference")
    return reference.with_tag(tag) if tag else reference.with_default_tag()


def _changes(request: web.Request) -> tuple[str, ...]:
    changes: Any = tuple(request.query.getall("changes", []))
    if sum(map(len, changes)) > _TEXT_BYTES_MAX:
        raise InvalidArgument(f"the changes have more than {_TEXT_BYTES_MAX} characters")
    return tuple(changes)
