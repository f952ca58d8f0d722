"""Presents images and volumes of this node and of the machine's Docker Engine together, and removes them from both.

Requests about an image that this node does not have are passed to the engine (``front.routing``).  This module handles
the rest.  Volumes of services are on this node, and all other volumes are in the engine.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, cast

import msgspec
import structlog
from aiohttp import web

from skep.api.client.client import Response
from skep.api.http.server import api_version, json_response, read_body
from skep.api.http.versions import ApiVersion
from skep.engine.images.reference import parse_reference
from skep.engine.volumes.volumes import Volumes
from skep.errors import InvalidArgument, SkepError
from skep.node.docker.docker_engine import DockerEngine, DockerHandler
from skep.node.docker.engine_images import EngineImages, merged

log = structlog.get_logger()

_EMPTY_LISTS = ApiVersion("1.43")
_NO_NAMES = {"RepoDigests": ["<none>@<none>"], "RepoTags": ["<none>:<none>"]}
_PASSED_ON = ("Content-Type", "User-Agent")

Wrap = Callable[[DockerHandler], DockerHandler]


def with_objects_of(
    docker: DockerEngine,
    images: EngineImages,
    volumes: Volumes,
    routes: tuple[web.AbstractRouteDef, ...],
) -> tuple[web.AbstractRouteDef, ...]:
    """Return this node's ``routes`` with the engine's images and volumes included."""
    merged_objects = _MergedObjects(docker, images, volumes)
    wraps: Mapping[tuple[str, str], Wrap] = {
        ("GET", "/images/json"): merged_objects.list_images,
        ("POST", "/images/create"): merged_objects.note_names,
        ("POST", "/images/load"): merged_objects.note_names,
        ("POST", "/images/{name:.+}/tag"): merged_objects.note_names,
        ("GET", "/images/get"): merged_objects.save_images,
        ("POST", "/images/prune"): merged_objects.prune_images,
        ("DELETE", "/images/{name:.+}"): merged_objects.remove_image,
        ("GET", "/volumes"): merged_objects.list_volumes,
        ("GET", "/volumes/{name}"): merged_objects.of_volume,
        ("DELETE", "/volumes/{name}"): merged_objects.of_volume,
        ("POST", "/volumes/create"): merged_objects.only_theirs,
        ("POST", "/volumes/prune"): merged_objects.prune_volumes,
    }

    def wrapped(route: web.AbstractRouteDef) -> web.AbstractRouteDef:
        if not isinstance(route, web.RouteDef) or (wrap := wraps.get((route.method, route.path))) is None:
            return route
        return web.RouteDef(
            route.method, route.path, wrap(cast("DockerHandler", route.handler)), route.kwargs
        )

    return tuple(wrapped(route) for route in routes)


class _MergedObjects:
    """Handlers that query both this node and the engine."""

    def __init__(self, docker: DockerEngine, images: EngineImages, volumes: Volumes) -> None:
        self._docker = docker
        self._images = images
        self._volumes = volumes

    def list_images(self, ours: DockerHandler) -> DockerHandler:
        async def handle(request: web.Request) -> web.StreamResponse:
            response = await ours(request)
            if (listed := _content(response)) is None:
                return response
            try:
                theirs = await self._docker.images(dict(request.query), request.path)
            except SkepError as error:
                log.info("images of the engine are missing", reason=str(error))
                theirs = []
            untagged = _NO_NAMES if api_version(request) < _EMPTY_LISTS else {}
            return json_response(merged(listed, theirs, untagged))

        return handle

    def note_names(self, ours: DockerHandler) -> DockerHandler:
        """Handle a pull, load, import or tag, and record the names that it sets."""

        async def handle(request: web.Request) -> web.StreamResponse:
            before, query = self._images.names(), request.query
            response = await ours(request)
            after = self._images.names()
            changed = {name for name, id in after.items() if before.get(name) != id}
            name = query.get("fromImage") or query.get("repo", "")
            tag = f":{query['tag']}" if query.get("tag") and not query["tag"].startswith("sha256:") else ""
            with suppress(InvalidArgument):
                changed |= {parse_reference(name + tag).with_default_tag().familiar} & after.keys()
            await self._images.note_given(changed)
            return response

        return handle

    def save_images(self, ours: DockerHandler) -> DockerHandler:
        async def handle(request: web.Request) -> web.StreamResponse:
            for name in request.query.getall("names", []):
                await self._images.bring(name)
            return await ours(request)

        return handle

    def remove_image(self, ours: DockerHandler) -> DockerHandler:
        """Handle the removal of an image.

        It is removed from the engine first: if a plain container uses it there, it stays in both.
        """

        async def handle(request: web.Request) -> web.StreamResponse:
            theirs = await self._pass_on(request)
            if theirs.status not in (200, 404):
                return _passed_back(theirs)
            response = await ours(request)
            here, there = _content(response), _content(_passed_back(theirs))
            if here is None or there is None:
                return response
            return json_response([*here, *(one for one in there if one not in here)])

        return handle

    def prune_images(self, ours: DockerHandler) -> DockerHandler:
        return self._prune(ours, "ImagesDeleted")

    def prune_volumes(self, ours: DockerHandler) -> DockerHandler:
        return self._prune(ours, "VolumesDeleted")

    def _prune(self, ours: DockerHandler, field: str) -> DockerHandler:
        async def handle(request: web.Request) -> web.StreamResponse:
            response = await ours(request)
            here = _content(response)
            if here is None:
                return response
            theirs = await self._pass_on(request)
            there = _content(_passed_back(theirs))
            if there is None:
                return _passed_back(theirs)
            deleted = list(here.get(field) or ())
            deleted += [one for one in there.get(field) or () if one not in deleted]
            freed = int(here.get("SpaceReclaimed") or 0) + int(there.get("SpaceReclaimed") or 0)
            return json_response({field: deleted or there.get(field), "SpaceReclaimed": freed})

        return handle

    def list_volumes(self, ours: DockerHandler) -> DockerHandler:
        async def handle(request: web.Request) -> web.StreamResponse:
            theirs = await self._pass_on(request)
            there = _content(_passed_back(theirs))
            here = _content(await ours(request))
            if there is None or here is None:
                return _passed_back(theirs)
            listed = list(there.get("Volumes") or ())
            names = {one.get("Name") for one in listed}
            listed += [one for one in here["Volumes"] or () if one["Name"] not in names]
            return json_response({**there, "Volumes": listed})

        return handle

    def of_volume(self, ours: DockerHandler) -> DockerHandler:
        """Handle a request about a volume: pass it to the engine if the engine has a volume of that name."""

        async def handle(request: web.Request) -> web.StreamResponse:
            name = request.match_info["name"]
            if name in self._volumes.names() and not await self._has_volume(request, name):
                return await ours(request)
            return _passed_back(await self._pass_on(request))

        return handle

    def only_theirs(self, _ours: DockerHandler) -> DockerHandler:
        async def handle(request: web.Request) -> web.StreamResponse:
            return _passed_back(await self._pass_on(request))

        return handle

    async def _has_volume(self, request: web.Request, name: str) -> bool:
        path = request.path if request.method == "GET" else f"/volumes/{name}"
        return (await self._docker.api.send("GET", path)).status == 200

    async def _pass_on(self, request: web.Request) -> Response:
        """Return the engine's response to the same request.  Raises: Unavailable."""
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        return await self._docker.api.send(request.method, request.path_qs, await read_body(request), headers)


def _passed_back(response: Response) -> web.Response:
    return web.Response(
        status=response.status,
        body=response.body,
        headers={"Content-Type": response.content_type or "application/json"},
    )


def _content(response: web.StreamResponse) -> Any:
    """Return the decoded body of a successful response, or None."""
    if (
        response.status != 200
        or not isinstance(response, web.Response)
        or not isinstance(response.body, bytes)
    ):
        return None
    try:
        return msgspec.json.decode(response.body)
    except msgspec.DecodeError:
        return None
