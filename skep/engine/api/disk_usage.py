"""``docker system df``: the disk space of this node's images, containers and volumes.

Source: moby 28, api/server/router/system/system_routes.go (getDiskUsage), daemon/disk_usage.go.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from aiohttp import web

from skep.aio.clock import Clock
from skep.aio.trees import walk_tree
from skep.api.http.server import Routes, api_version, flag, json_response
from skep.api.http.versions import ApiVersion
from skep.engine.api import volumes as volume_routes
from skep.engine.api.images import shared_bytes
from skep.engine.api.responses import container_responses, image_responses
from skep.engine.api.responses.container_versions import line_known_to
from skep.engine.build.cache.cache import CacheMounts
from skep.engine.engine import Engine
from skep.engine.images.archives.untar import tree_bytes
from skep.engine.images.listing import ImageFilter, select
from skep.engine.volumes.volumes import users_by_volume
from skep.errors import InvalidArgument, NotFound

_TYPES = ("container", "image", "volume", "build-cache")
_TYPES_SINCE = ApiVersion("1.42")
_USAGES_SINCE = ApiVersion("1.52")
_WITHOUT_BUILDER_SIZE = _TYPES_SINCE
_ACTIVE = ("running", "paused", "restarting")


def disk_usage_routes(engine: Engine, mounts: CacheMounts, clock: Clock) -> Routes:
    """Return the route ``GET /system/df``.  It measures at each request, without a cache.

    The build cache is the data that ``docker builder prune`` would remove.  Results of steps are images, and count
    there.
    """
    table = Routes()

    @table.get("/system/df")
    async def show(request: web.Request) -> web.StreamResponse:
        version = api_version(request)
        wanted = request.query.getall("type", _TYPES) if version >= _TYPES_SINCE else _TYPES
        for type in wanted:
            if type not in _TYPES:
                raise InvalidArgument(f"unknown object type: {type}")
        response: dict[str, Any] = dict.fromkeys(("Images", "Containers", "Volumes", "BuildCache"))
        response["LayersSize"] = response["BuilderSize"] = 0
        if "image" in wanted:
            response["LayersSize"] = engine.images.bytes_used()
            response["Images"] = _image_lines(engine, request)
        if "container" in wanted:
            response["Containers"] = await _container_lines(engine, clock, version)
        if "volume" in wanted:
            response["Volumes"] = await _volume_lines(engine)
        if "build-cache" in wanted:
            response["BuildCache"] = await _cache_lines(mounts)
            response["BuilderSize"] = sum(one["Size"] for one in response["BuildCache"])
        is_verbose = version >= _USAGES_SINCE and flag(request, "verbose")
        usages = _usages(response, is_verbose=is_verbose) if version >= _USAGES_SINCE else {}
        if version >= _WITHOUT_BUILDER_SIZE:
            del response["BuilderSize"]
        return json_response({**({} if is_verbose else response), **usages})

    return table


def _usages(found: Mapping[str, Any], *, is_verbose: bool) -> dict[str, Any]:
    """Return the form of the response since API 1.52: numbers and sizes for each type, and with ``is_verbose`` the
    objects.
    """
    usages: dict[str, Any] = {}
    if (images := found["Images"]) is not None:
        unused = [one["Size"] - one["SharedSize"] for one in images if not one["Containers"]]
        usages["ImageUsage"] = _usage(images, found["LayersSize"], unused)
    if (containers := found["Containers"]) is not None:
        ended = [one.get("SizeRw", 0) for one in containers if one["State"] not in _ACTIVE]
        usages["ContainerUsage"] = _usage(containers, sum(one.get("SizeRw", 0) for one in containers), ended)
    if (volumes := found["Volumes"]) is not None:
        data = [one["UsageData"] for one in volumes]
        free = [one["Size"] for one in data if not one["RefCount"]]
        usages["VolumeUsage"] = _usage(volumes, sum(one["Size"] for one in data), free)
    if (caches := found["BuildCache"]) is not None:
        idle = [one["Size"] for one in caches if not one["InUse"]]
        usages["BuildCacheUsage"] = _usage(caches, found["BuilderSize"], idle)
    if is_verbose:
        for name, items in zip(
            ("ImageUsage", "ContainerUsage", "VolumeUsage", "BuildCacheUsage"),
            (images, containers, volumes, caches),
            strict=True,
        ):
            if name in usages:
                usages[name]["Items"] = items
    return usages


def _usage(items: Sequence[Any], total_bytes: int, reclaimable: Sequence[int]) -> dict[str, Any]:
    """Return one type's usage.  ``reclaimable`` has the size of each object that is not in use."""
    return {
        "ActiveCount": len(items) - len(reclaimable),
        "TotalCount": len(items),
        "TotalSize": total_bytes,
        "Reclaimable": sum(reclaimable),
    }


def _image_lines(engine: Engine, request: web.Request) -> list[Any]:
    listed = select(engine.images.images(), ImageFilter())
    shared = shared_bytes(engine.images, listed)
    users = [container.image_id for container in engine.list()]
    return [
        image_responses.summary(
            one,
            api_version(request),
            shared_bytes=shared[one.image.id],
            containers=users.count(one.image.id),
        )
        for one in listed
    ]


async def _cache_lines(mounts: CacheMounts) -> list[Any]:
    sizes = await walk_tree(mounts.sizes)
    return [
        {
            "ID": name,
            "Type": "exec.cachemount",
            "Description": "directory of RUN --mount=type=cache",
            "InUse": mounts.is_used(name),
            "Shared": False,
            "Size": size,
        }
        for name, size in sizes.items()
    ]


async def _container_lines(engine: Engine, clock: Clock, version: ApiVersion) -> list[Any]:
    lines = []
    for container in engine.list():
        changed = await walk_tree(tree_bytes, str(engine.bundles.path(container.id) / "upper"))
        image = engine.images.lookup(container.image_id)
        sizes = {"SizeRw": changed, "SizeRootFs": changed + (image.size_bytes if image else 0)}
        line = container_responses.summary(container, engine.images, clock.now_ns(), engine.network_ids)
        lines.append(line_known_to(version, line | {name: size for name, size in sizes.items() if size}))
    return lines


async def _volume_lines(engine: Engine) -> list[Any]:
    users = users_by_volume(engine.list())
    lines = []
    for name in engine.volumes.names():
        if engine.volumes.has_options(name):
            continue  # as in Docker: its data is not on this node
        size = await walk_tree(tree_bytes, str(engine.volumes.path(name)))
        usage = {"RefCount": len(users.get(name, ())), "Size": size}
        with suppress(NotFound):  # removed meanwhile
            lines.append({**volume_routes.shown_volume(engine.volumes, name), "UsageData": usage})
    return lines
