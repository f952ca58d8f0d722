"""Local volumes of this node in the Engine API: those that services made.

Source: moby 20.10, api/server/router/volume/volume_routes.go, volume/service/{service,store}.go.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from aiohttp import web

from skep.api.server import Filters, Routes, flag, json_answer
from skep.errors import AlreadyExists, NotFound
from skep.model.times import timestamp
from skep.node.mounts.volumes import Volumes
from skep.node.oci.container import Container

Listing = Callable[[], Collection[Container]]
"""Gives every container of this node, as what uses volumes."""


def volume_routes(volumes: Volumes, containers: Listing) -> Routes:
    """``/volumes``: list, inspect, remove."""
    table = Routes()

    @table.get("/volumes")
    async def list_volumes(request: web.Request) -> web.StreamResponse:
        filters = Filters.of(request)
        filters.refuse_unknown("dangling", "driver", "label", "name")
        used = users_by_volume(containers())
        found = [answer(volumes, name) for name in volumes.names() if _is_wanted(name, filters, used)]
        return json_answer({"Volumes": found, "Warnings": None})

    @table.get("/volumes/{name}")
    async def inspect_volume(request: web.Request) -> web.StreamResponse:
        return json_answer(answer(volumes, _known(volumes, request.match_info["name"])))

    @table.delete("/volumes/{name}")
    async def remove_volume(request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name not in volumes.names() and flag(request, "force"):
            return web.Response(status=204)
        if users := users_by_volume(containers()).get(_known(volumes, name)):
            raise AlreadyExists(f"remove {name}: volume is in use - [{', '.join(users)}]")
        await volumes.remove(name)
        return web.Response(status=204)

    return table


def users_by_volume(containers: Collection[Container]) -> Mapping[str, Sequence[str]]:
    """Volume name -> ids of the containers that mount it, running or not."""
    users: dict[str, list[str]] = {}
    for container in containers:
        for name in sorted({mount.name for mount in container.config.mounts if mount.name}):
            users.setdefault(name, []).append(container.id)
    return users


def answer(volumes: Volumes, name: str) -> dict[str, Any]:
    """``docker volume inspect``."""
    return {
        "CreatedAt": timestamp(volumes.created_ns(name) // _SECOND_NS * _SECOND_NS),
        "Driver": "local",
        "Labels": None,
        "Mountpoint": str(volumes.path(name)),
        "Name": name,
        "Options": None,
        "Scope": "local",
    }


_SECOND_NS = 1_000_000_000


def _known(volumes: Volumes, name: str) -> str:
    if name not in volumes.names():
        raise NotFound(f"get {name}: no such volume")
    return name


def _is_wanted(name: str, filters: Filters, used: Mapping[str, Sequence[str]]) -> bool:
    is_dangling = "true" if name not in used else "false"
    return (
        (not filters["name"] or any(part in name for part in filters["name"]))
        and filters.matches("driver", "local")
        and filters.matches_labels("label", {})
        and (not filters["dangling"] or filters["dangling"][0].replace("1", "true") == is_dangling)
    )
