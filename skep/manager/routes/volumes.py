"""``/skep/cluster/volumes``: cluster volumes.  The node process merges them into its ``/volumes``, as Docker does.

Source: moby, daemon/server/router/volume/volume_routes.go, daemon/cluster/convert/volume.go.
"""

from collections.abc import Mapping
from typing import Any

from aiohttp import web
from msgspec import to_builtins

from skep.api.http.server import Filters, Routes, flag, json_response, read_json
from skep.errors import InvalidArgument
from skep.manager.control import volumes as control
from skep.manager.routes.access import current_view, manager_of, version_parameter
from skep.model.node import Node
from skep.model.values.encoding import ApiObject
from skep.model.values.meta import Driver
from skep.model.values.times import Timestamp
from skep.model.volume import (
    ClusterVolumeSpec,
    PublishStatus,
    Volume,
    VolumeAvailability,
    VolumeSpec,
)
from skep.store.interface import View

routes = Routes()
PATH = "/skep/cluster/volumes"
FILTERS = ("dangling", "driver", "label", "name")


class CreateBody(ApiObject):
    """Body of ``POST /volumes/create`` for a cluster volume."""

    __go_name__ = "volume.CreateOptions"

    name: str = ""
    driver: str = ""
    driver_opts: Mapping[str, str] | None = None
    labels: Mapping[str, str] | None = None
    cluster_volume_spec: ClusterVolumeSpec | None = None

    @property
    def spec(self) -> VolumeSpec:
        """Return the spec.  Raises: InvalidArgument: the access mode is missing."""
        asked = self.cluster_volume_spec or ClusterVolumeSpec()
        if asked.access_mode is None:
            raise InvalidArgument("AccessMode must not be nil")
        return VolumeSpec(
            name=self.name,
            labels=self.labels or {},
            driver=Driver(name=self.driver, options=self.driver_opts or {}),
            group=asked.group,
            access_mode=asked.access_mode,
            accessibility_requirements=asked.accessibility_requirements,
            capacity_range=asked.capacity_range,
            secrets=asked.secrets,
            availability=asked.availability or VolumeAvailability.ACTIVE,
        )


class _UpdateBody(ApiObject):
    """Body of ``PUT /volumes/{name}``."""

    __go_name__ = "volume.UpdateOptions"

    spec: ClusterVolumeSpec | None = None


@routes.get(PATH)
async def list_volumes(request: web.Request) -> web.StreamResponse:
    """List the volumes that match the filters."""
    filters = Filters.of(request)
    filters.refuse_unknown(*FILTERS)
    view = await current_view(request)
    found = sorted((one for one in view.find(Volume) if _fits(one, filters)), key=lambda one: one.spec.name)
    return json_response([shown_volume(one, view) for one in found])


@routes.post(f"{PATH}/create")
async def create_volume(request: web.Request) -> web.StreamResponse:
    """Create a volume.  Its driver creates it afterwards."""
    manager = manager_of(request)
    body = await read_json(request, CreateBody)
    await manager.require_room(creates=True)
    volume = await manager.update(control.create_volume, body.spec, new_id=manager.new_id, now=manager.now())
    return json_response(shown_volume(volume, manager.store.view()), 201)


@routes.get(PATH + "/{name}")
async def inspect_volume(request: web.Request) -> web.StreamResponse:
    """Show one volume, by name or id."""
    view = await current_view(request)
    return json_response(shown_volume(view.resolve(Volume, request.match_info["name"]), view))


@routes.put(PATH + "/{name}")
async def update_volume(request: web.Request) -> web.StreamResponse:
    """Serve ``docker volume update``."""
    version = version_parameter(request, "swarm object")
    body = await read_json(request, _UpdateBody)
    volume = (await current_view(request)).resolve(Volume, request.match_info["name"])
    await manager_of(request).update(control.update_volume, volume.id, body.spec, version)
    return web.Response()


@routes.delete(PATH + "/{name}")
async def remove_volume(request: web.Request) -> web.StreamResponse:
    """Serve ``docker volume rm``."""
    volume = (await current_view(request)).resolve(Volume, request.match_info["name"])
    await manager_of(request).update(control.remove_volume, volume.id, force=flag(request, "force"))
    return web.Response(status=204)


def shown_volume(volume: Volume, view: View) -> dict[str, Any]:
    """Return a volume as Docker shows it.  ``Status`` adds why it is not in its desired state, which Docker does not
    show.
    """
    spec = volume.spec
    cluster: dict[str, Any] = {
        "ID": volume.id,
        "Version": {"Index": volume.version.index},
        "CreatedAt": volume.created_at,
        "UpdatedAt": volume.updated_at,
        "Spec": to_builtins(
            ClusterVolumeSpec(
                group=spec.group,
                access_mode=spec.access_mode,
                accessibility_requirements=spec.accessibility_requirements,
                capacity_range=spec.capacity_range,
                secrets=spec.secrets,
                availability=spec.availability,
            )
        ),
    }
    if volume.publish_status:
        cluster["PublishStatus"] = [_shown_status(one) for one in volume.publish_status]
    if volume.info is not None:
        cluster["Info"] = to_builtins(volume.info)
    shown = {
        "ClusterVolume": cluster,
        "CreatedAt": _go_time(volume.created_at),
        "Driver": spec.driver.name,
        "Labels": dict(spec.labels) or None,
        "Mountpoint": "",
        "Name": spec.name,
        "Options": dict(spec.driver.options) or None,
        "Scope": "global",
    }
    status = status_of(volume, view)
    return {**shown, "Status": status} if status else shown


def status_of(volume: Volume, view: View) -> dict[str, Any]:
    """Return why a volume is not in its desired state, in sentences."""
    status: dict[str, Any] = {}
    if volume.pending_delete:
        status["State"] = "to be deleted by its driver"
    elif volume.info is None:
        status["State"] = "to be created by its driver"
    if volume.message:
        status["Message"] = volume.message
    nodes = {_name(one, view): one.message for one in volume.publish_status if one.message}
    return {**status, "Nodes": nodes} if nodes else status


def _name(status: PublishStatus, view: View) -> str:
    node = view.lookup(Node, status.node_id)
    return (node.description.hostname if node is not None else "") or status.node_id


def _shown_status(status: PublishStatus) -> dict[str, Any]:
    shown: dict[str, Any] = {"NodeID": status.node_id, "State": status.state.value}
    return {**shown, "PublishContext": dict(status.publish_context)} if status.publish_context else shown


def _go_time(at: Timestamp) -> str:
    """Return ``2026-01-02 15:04:05.123 +0000 UTC``, the format of Go's ``Time.String`` that Docker shows here."""
    day, _, rest = at.removesuffix("Z").partition("T")
    return f"{day} {rest.rstrip('0').rstrip('.') if '.' in rest else rest} +0000 UTC"


def _fits(volume: Volume, filters: Filters) -> bool:
    is_dangling = "false" if volume.publish_status else "true"
    dangling = [value.replace("1", "true").replace("0", "false") for value in filters["dangling"]]
    return (
        (not filters["name"] or any(part in volume.spec.name for part in filters["name"]))
        and filters.matches("driver", volume.spec.driver.name)
        and filters.matches_labels("label", volume.spec.labels)
        and (not dangling or dangling[0] == is_dangling)
    )
