"""Files of containers in the Engine API: ``docker cp``, ``docker export``.

Source: moby 20.10, api/server/router/container/copy.go, container_routes.go (getContainersExport).
"""

import base64
from collections.abc import AsyncIterator, Iterable

import msgspec
from aiohttp import web

from skep.api.http.server import flag
from skep.api.http.tables import RouteTable
from skep.engine.api.streams.uploads import TAKEN_S, drain, pieces_of, send_piece
from skep.engine.engine import Engine
from skep.engine.volumes.files import ArchiveTarget, PathStatus
from skep.errors import InvalidArgument, SkepError


class FileRoutes(msgspec.Struct, frozen=True):
    """Dependencies of these routes."""

    engine: Engine
    taken_s: float
    """Seconds after which a client that reads no data of an archive is disconnected."""


_table = RouteTable[FileRoutes]()


def file_routes(engine: Engine, taken_s: float = TAKEN_S) -> Iterable[web.AbstractRouteDef]:
    """Return the routes ``/containers/{id}/archive`` and ``/containers/{id}/export``."""
    return _table.bound(FileRoutes(engine, taken_s))


@_table.head("/containers/{id}/archive")
async def show_path(served: FileRoutes, request: web.Request) -> web.StreamResponse:
    """Return the status of a path in a header, which ``docker cp`` requests before it copies."""
    word, path = _place(request)
    status = await served.engine.files.status(word, path)
    return web.Response(headers=_header(status))


@_table.get("/containers/{id}/archive")
async def copy_out(served: FileRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker cp CONTAINER:PATH``: respond with an archive of the path."""
    word, path = _place(request)
    async with served.engine.files.read(word, path) as (status, pieces):
        return await send_archive(request, pieces, _header(status), served.taken_s)


@_table.put("/containers/{id}/archive")
async def copy_in(served: FileRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker cp ... CONTAINER:PATH``: unpack the body at the path."""
    word, path = _place(request)
    target = ArchiveTarget(
        path=path, keeps_kinds=flag(request, "noOverwriteDirNonDir"), as_user=flag(request, "copyUIDGID")
    )
    try:
        await served.engine.files.write(word, target, pieces_of(request))
    except SkepError:
        await drain(request)
        raise
    return web.Response()


@_table.get("/containers/{id}/export")
async def export(served: FileRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker export``: respond with an archive of the whole file system, without volumes."""
    async with served.engine.files.export(request.match_info["id"]) as pieces:
        return await send_archive(request, pieces, {}, served.taken_s)


def _place(request: web.Request) -> tuple[str, str]:
    path = request.query.get("path", "")
    if not path:
        raise InvalidArgument("bad parameter: pathcannot be empty")  # as in Docker
    if "\0" in path:
        raise InvalidArgument("invalid path: it contains a zero byte")
    return request.match_info["id"], path


def _header(status: PathStatus) -> dict[str, str]:
    text = msgspec.json.encode(
        {
            "name": status.name,
            "size": status.size,
            "mode": status.mode,
            "mtime": status.mtime,
            "linkTarget": status.link_target,
        }
    )
    return {"X-Docker-Container-Path-Stat": base64.b64encode(text).decode()}


async def send_archive(
    request: web.Request, pieces: AsyncIterator[bytes], headers: dict[str, str], taken_s: float = TAKEN_S
) -> web.StreamResponse:
    """Send an archive to a client that reads a piece within ``taken_s``.

    An incomplete archive is sent without an end, so that its reader notices.
    """
    response = web.StreamResponse(headers={"Content-Type": "application/x-tar", **headers})
    await response.prepare(request)
    async for piece in pieces:
        await send_piece(request, response, piece, taken_s)
    return response
