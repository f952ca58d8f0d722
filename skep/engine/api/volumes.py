"""Local volumes of this node in the Engine API: volumes of services, of plain containers, and standalone ones.

Source: moby 20.10, api/server/router/volume/volume_routes.go, volume/service/{service,store}.go.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import structlog
from aiohttp import web

from skep.aio.failures import log_error
from skep.aio.trees import walk_tree
from skep.api.formats.filters import has_prunable_labels
from skep.api.http.server import Filters, api_version, flag, json_response, read_json
from skep.api.http.tables import RouteTable
from skep.api.http.versions import ApiVersion
from skep.engine.images.archives.untar import tree_bytes
from skep.engine.volumes.mounts import check_local_options
from skep.engine.volumes.volume_plugins import LOCAL, PluginVolume
from skep.engine.volumes.volume_store import ANONYMOUS
from skep.engine.volumes.volumes import Listing, VolumeInUse, Volumes, users_by_volume
from skep.errors import InvalidArgument, NotFound, SkepError, Unavailable
from skep.model.values.encoding import ApiObject
from skep.model.values.times import SECOND_NS, timestamp

log = structlog.get_logger(__name__)

_NAMED_ARE_KEPT = ApiVersion("1.42")
_TRUTHS = {"1": True, "true": True, "0": False, "false": False}


class VolumeRequest(ApiObject):
    """Body of ``POST /volumes/create``."""

    name: str = ""
    driver: str = ""
    driver_opts: Mapping[str, str] | None = None
    labels: Mapping[str, str] | None = None
    cluster_volume_spec: Mapping[str, Any] | None = None


class VolumeRoutes(msgspec.Struct, frozen=True):
    """Dependencies of these routes."""

    volumes: Volumes
    containers: Listing


_table = RouteTable[VolumeRoutes]()


def volume_routes(volumes: Volumes, containers: Listing) -> list[web.RouteDef]:
    """Return the routes ``/volumes``: list, inspect, create, remove, prune."""
    return _table.bound(VolumeRoutes(volumes, containers))


@_table.post("/volumes/create")
async def create_volume(served: VolumeRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker volume create``.  An existing volume stays unchanged."""
    body = await read_json(request, VolumeRequest)
    name = body.name or served.volumes.new_name()
    check_volume(body, name)
    labels = body.labels if body.name else {**(body.labels or {}), ANONYMOUS: ""}
    await served.volumes.create(name, body.driver, labels, body.driver_opts)
    return json_response(await inspected_volume(served.volumes, name), status=201)


@_table.post("/volumes/prune")
async def prune_volumes(served: VolumeRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker volume prune``: without ``all``, only anonymous volumes (since API 1.42).

    As in Docker, volumes with options stay, because their data is not on this node.
    """
    filters = Filters.of(request)
    filters.refuse_unknown("label", "label!", "all")
    if len(filters["all"]) > 1:
        raise InvalidArgument(
            f"invalid filter 'all=[{' '.join(filters['all'])}]': only one value is expected"
        )
    named_too = api_version(request) < _NAMED_ARE_KEPT or _is_true(filters, "all")
    removed, reclaimed = [], 0
    used = users_by_volume(served.containers())
    for name in served.volumes.names():
        labels = served.volumes.labels(name) or {}
        if name in used or served.volumes.has_options(name) or _driver(served.volumes, name) != LOCAL:
            continue
        if not has_prunable_labels(labels, filters) or not (named_too or ANONYMOUS in labels):
            continue
        size = await walk_tree(tree_bytes, str(served.volumes.path(name)))
        if not served.volumes.has(name):
            continue  # another request has removed it
        try:
            await served.volumes.remove(name, served.containers)
        except VolumeInUse:
            continue  # a container was created meanwhile
        except SkepError as error:
            log.warning("volume not pruned", volume=name, reason=str(error))
            continue
        removed.append(name)
        reclaimed += size
    served.volumes.events.publish_volume("prune", "", {"reclaimed": str(reclaimed)})
    return json_response({"VolumesDeleted": removed, "SpaceReclaimed": reclaimed})


@_table.get("/volumes")
async def list_volumes(served: VolumeRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker volume ls``."""
    filters = Filters.of(request)
    filters.refuse_unknown("dangling", "driver", "label", "name")
    is_dangling = _is_true(filters, "dangling") if filters["dangling"] else None
    used = users_by_volume(served.containers())
    known = []
    for name in served.volumes.names():
        with suppress(NotFound):  # removed meanwhile
            known.append(shown_volume(served.volumes, name))
    others, warnings = await _of_plugins(served.volumes)
    names = {one["Name"] for one in known}
    listed = known + [one for one in others if one["Name"] not in names]
    found = [one for one in listed if _is_wanted(one, filters, used, is_dangling=is_dangling)]
    return json_response({"Volumes": found, "Warnings": warnings or None})


async def _of_plugins(volumes: Volumes) -> tuple[Sequence[dict[str, Any]], Sequence[str]]:
    """Return the volumes that plug-ins list, and warnings about plug-ins that fail."""
    found: list[dict[str, Any]] = []
    warnings: list[str] = []

    async def ask(driver: str) -> None:
        plugin = volumes.plugins.known(driver)
        try:
            listed = await plugin.list() if plugin is not None else ()
        except SkepError as error:
            warnings.append(f"list {driver}: {error}")
            return
        found.extend(_of_plugin(driver, plugin.scope, one) for one in listed if plugin is not None)

    async with asyncio.TaskGroup() as group:
        for driver in volumes.plugins.drivers:
            group.create_task(ask(driver), name=f"volumes-of-{driver[:32]}")
    return sorted(found, key=lambda one: str(one["Name"])), sorted(warnings)


def _of_plugin(driver: str, scope: str, volume: PluginVolume) -> dict[str, Any]:
    shown = {
        "CreatedAt": volume.created_at,
        "Driver": driver,
        "Labels": None,
        "Mountpoint": volume.mountpoint,
        "Name": volume.name,
        "Options": None,
        "Scope": scope,
    }
    return {**shown, "Status": volume.status} if volume.status else shown


@_table.get("/volumes/{name}")
async def inspect_volume(served: VolumeRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker volume inspect``."""
    return json_response(await inspected_volume(served.volumes, request.match_info["name"]))


@_table.delete("/volumes/{name}")
async def remove_volume(served: VolumeRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker volume rm``."""
    name, is_forced = request.match_info["name"], flag(request, "force")
    if not served.volumes.has(name):
        if is_forced:
            return web.Response(status=204)
        driver = (await _find_in_plugin(served.volumes, name))["Driver"]
        await served.volumes.create(name, driver)  # then it is removed like a volume that was created here
    await served.volumes.remove(name, served.containers, force=is_forced)
    return web.Response(status=204)


async def inspected_volume(volumes: Volumes, name: str) -> dict[str, Any]:
    """Return the response to ``docker volume inspect``.  For a plug-in volume, it includes the plug-in's description.

    Raises: NotFound; Unavailable: the plug-in does not respond.
    """
    if not volumes.has(name):
        return await _find_in_plugin(volumes, name)
    shown = shown_volume(volumes, name)
    if (driver := shown["Driver"]) == LOCAL:
        return shown
    try:
        plugin = await volumes.plugins.get(driver)
        volume = await plugin.get(name)
    except SkepError as error:
        reason = f'error while checking if volume "{name}" exists in driver "{driver}": {error}'
        raise Unavailable(f"get {name}: {reason}") from error
    if volume is None:
        raise NotFound(f"get {name}: no such volume")
    described = _of_plugin(driver, plugin.scope, volume)
    return {**described, "Labels": shown["Labels"], "Options": shown["Options"]}


async def _find_in_plugin(volumes: Volumes, name: str) -> dict[str, Any]:
    """Return a volume that was not created here.  Raises: NotFound."""
    listed, _ = await _of_plugins(volumes)
    found = next((one for one in listed if one["Name"] == name), None)
    if found is None:
        raise NotFound(f"get {name}: no such volume")
    return found


def _driver(volumes: Volumes, name: str) -> str:
    """Return the driver for display.  In a list, one volume's error must not affect the others."""
    try:
        return volumes.driver(name)
    except SkepError as error:
        log_error(error, "driver of a volume not shown", volume=name)
        return ""


def shown_volume(volumes: Volumes, name: str) -> dict[str, Any]:
    """Return ``docker volume inspect`` without calling a plug-in.  Raises: NotFound."""
    driver = _driver(volumes, name)
    plugin = volumes.plugins.known(driver)
    return {
        "CreatedAt": timestamp(volumes.created_ns(name) // SECOND_NS * SECOND_NS),
        "Driver": driver,
        "Labels": volumes.labels(name),
        "Mountpoint": str(volumes.path(name)),
        "Name": name,
        "Options": _options(volumes, name),
        "Scope": plugin.scope if plugin is not None else LOCAL,
    }


def _options(volumes: Volumes, name: str) -> Mapping[str, str] | None:
    """Return the options for display.  In a list, one volume's error must not affect the others."""
    try:
        return volumes.given_options(name)
    except SkepError as error:
        log_error(error, "options of a volume not shown", volume=name)
        return None


def check_volume(body: VolumeRequest, name: str) -> None:
    """Raise InvalidArgument for volumes that this node does not support."""
    if body.cluster_volume_spec is not None:
        raise InvalidArgument(f"create {name}: cluster volumes (CSI) need API version 1.42 or later")
    if body.driver in ("", LOCAL):
        check_local_options(name, body.driver_opts or {})


def _is_true(filters: Filters, name: str) -> bool:
    """Return a filter's truth value.  Raises: InvalidArgument: it is neither true nor false, or both."""
    given = {_TRUTHS.get(value) for value in filters[name]} or {False}
    if len(given) > 1 or None in given:
        raise InvalidArgument(f"invalid filter '{name}=[{' '.join(filters[name])}]'")
    return given == {True}


def _is_wanted(
    volume: Mapping[str, Any],
    filters: Filters,
    used: Mapping[str, Sequence[str]],
    *,
    is_dangling: bool | None,
) -> bool:
    """``is_dangling``: Whether unused or used volumes are wanted.  None for both."""
    name = volume["Name"]
    return (
        (not filters["name"] or any(part in name for part in filters["name"]))
        and filters.matches("driver", str(volume["Driver"]))
        and filters.matches_labels("label", volume["Labels"] or {})
        and is_dangling in (None, name not in used)
    )
