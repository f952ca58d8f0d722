"""Calls of one CSI driver, with deadlines and checks of its responses."""

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from google.protobuf.message import Message

from skep.csi import csi_pb2 as pb
from skep.errors import ResourceExhausted, SkepError, Unavailable
from skep.model.node import CSIInfo, Topology
from skep.model.task_end import printable
from skep.model.volume import (
    AccessMode,
    CapacityRange,
    TypeMount,
    Volume,
    VolumeAssignment,
    VolumeInfo,
    VolumeScope,
    VolumeSharing,
)
from skep.rpc.client import Bounds, ClientConnection
from skep.rpc.errors import peer_errors
from skep.rpc.headers import request_block

A = TypeVar("A", bound=Message)

CALL_S: Final = 30.0
"""Timeout in seconds of a call that changes something, such as attaching a disk.  A call that times out is retried."""
LOOK_S: Final = 5.0
"""Timeout in seconds of a read-only call."""
CALLS_MAX: Final = 8
"""Maximum number of concurrent calls to one driver.  A driver that hangs then blocks only its own volumes."""
ID_BYTES_MAX: Final = 256
"""Maximum size of a volume id or node id."""
MAP_BYTES_MAX: Final = 8 * 1024
"""Maximum size of a driver's map, counting keys and values.  The map is stored with the volume."""
TOPOLOGIES_MAX: Final = 64
"""Maximum number of a volume's topologies, which are stored with it."""
MESSAGE_CHARACTERS_MAX: Final = 500
"""Longer error texts of a driver are cut, because they become an object's status."""
SECRET_CHARACTERS_MIN: Final = 4
"""Shorter secrets, such as ``yes``, are not masked, because they occur in many words."""
_BOUNDS = Bounds(stream_window=256 * 1024, connection_window=1024 * 1024, message=256 * 1024)
_NAME = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9.]{0,61}[A-Za-z0-9])?")
# Source: csi.proto: PluginCapability and the RPC types of both services.
_CONTROLLER, _CREATES, _PUBLISHES, _STAGES = 1, 1, 2, 1

_MODES: Final[Mapping[tuple[VolumeScope, VolumeSharing], int]] = {
    (VolumeScope.SINGLE, VolumeSharing.NONE): 1,
    (VolumeScope.SINGLE, VolumeSharing.ONE_WRITER): 1,
    (VolumeScope.SINGLE, VolumeSharing.ALL): 1,
    (VolumeScope.SINGLE, VolumeSharing.READ_ONLY): 2,
    (VolumeScope.MULTI, VolumeSharing.READ_ONLY): 3,
    (VolumeScope.MULTI, VolumeSharing.ONE_WRITER): 4,
    (VolumeScope.MULTI, VolumeSharing.ALL): 5,
}
"""Source: swarmkit, internal/csi/capability/capability.go."""


class UnusableResponse(SkepError):
    """The driver's response contradicts the request, or cannot be used."""


class Abilities(msgspec.Struct, frozen=True):
    """The optional calls that a driver supports."""

    creates: bool = False
    publishes: bool = False


class CsiDriver:
    """A driver that listens on a socket of this machine.  Every call raises a ``SkepError`` with the driver's words."""

    def __init__(self, name: str, socket: Path) -> None:
        self.name = name
        self.socket = socket
        self._calls = asyncio.Semaphore(CALLS_MAX)
        self._abilities: Abilities | None = None
        self._stages: bool | None = None

    # --- controller -----------------------------------------------------------------------------------------------

    async def create(self, volume: Volume, secrets: Mapping[str, str]) -> VolumeInfo:
        """Create the volume, or find it by its name.  Raises: UnusableResponse: it is not as requested."""
        spec = volume.spec
        if not (await self._known_abilities()).creates:
            return VolumeInfo(volume_id=spec.name)  # without CreateVolume it exists, and its name is its id
        request = pb.CreateVolumeRequest(
            name=spec.name,
            volume_capabilities=[capability_of(spec.access_mode)],
            parameters=dict(spec.driver.options),
            secrets=dict(secrets),
        )
        if (capacity := spec.capacity_range) is not None:
            request.capacity_range.required_bytes = capacity.required_bytes
            request.capacity_range.limit_bytes = capacity.limit_bytes
        if (where := spec.accessibility_requirements) is not None:
            request.accessibility_requirements.requisite.extend(map(_topology_to_pb, where.requisite))
            request.accessibility_requirements.preferred.extend(map(_topology_to_pb, where.preferred))
        response = await self.call("Controller/CreateVolume", request, pb.CreateVolumeResponse)
        return checked_info(response.volume)

    async def delete(self, volume_id: str, secrets: Mapping[str, str]) -> None:
        """Delete the volume.  Idempotent."""
        if (await self._known_abilities()).creates:
            request = pb.DeleteVolumeRequest(volume_id=volume_id, secrets=dict(secrets))
            await self.call("Controller/DeleteVolume", request, pb.DeleteVolumeResponse)

    async def publish(
        self, volume: Volume, driver_node_id: str, secrets: Mapping[str, str]
    ) -> Mapping[str, str]:
        """Make the volume available on a node.  Return the context for the node's driver."""
        assert volume.info is not None, "only a created volume is published"
        if not (await self._known_abilities()).publishes:
            return {}
        request = pb.ControllerPublishVolumeRequest(
            volume_id=volume.info.volume_id,
            node_id=driver_node_id,
            volume_capability=capability_of(volume.spec.access_mode),
            readonly=False,
            secrets=dict(secrets),
            volume_context=dict(volume.info.volume_context),
        )
        response = await self.call(
            "Controller/ControllerPublishVolume", request, pb.ControllerPublishVolumeResponse
        )
        return _checked_map("publish context", response.publish_context)

    async def unpublish(self, volume_id: str, driver_node_id: str, secrets: Mapping[str, str]) -> None:
        """Undo ``publish``.  Idempotent."""
        if (await self._known_abilities()).publishes:
            request = pb.ControllerUnpublishVolumeRequest(
                volume_id=volume_id, node_id=driver_node_id, secrets=dict(secrets)
            )
            await self.call(
                "Controller/ControllerUnpublishVolume", request, pb.ControllerUnpublishVolumeResponse
            )

    # --- node -----------------------------------------------------------------------------------------------------

    async def node_info(self) -> CSIInfo:
        """Return the driver's description of this node."""
        info = await self.call("Node/NodeGetInfo", pb.NodeGetInfoRequest(), pb.NodeGetInfoResponse, LOOK_S)
        if not 0 < len(info.node_id.encode()) <= ID_BYTES_MAX:
            raise UnusableResponse(f"driver {self.name} returned no usable id for this node")
        has_place = info.HasField("accessible_topology")
        return CSIInfo(
            plugin_name=self.name,
            node_id=info.node_id,
            max_volumes_per_node=max(0, info.max_volumes_per_node),
            accessible_topology=_topology_from_pb(info.accessible_topology) if has_place else None,
        )

    async def node_publish(
        self, volume: VolumeAssignment, staging: Path, target: Path, secrets: Mapping[str, str]
    ) -> None:
        """Mount the volume, or create its device, at ``target``, through ``staging`` if the driver has that step."""
        common: dict[str, Any] = {
            "volume_id": volume.volume_id,
            "publish_context": dict(volume.publish_context),
            "staging_target_path": "",
            "volume_capability": capability_of(volume.access_mode),
            "secrets": dict(secrets),
            "volume_context": dict(volume.volume_context),
        }
        if await self._has_staging():
            common["staging_target_path"] = str(staging)
            await self.call(
                "Node/NodeStageVolume", pb.NodeStageVolumeRequest(**common), pb.NodeStageVolumeResponse
            )
        request = pb.NodePublishVolumeRequest(
            target_path=str(target),
            readonly=volume.access_mode.sharing is VolumeSharing.READ_ONLY,
            **common,
        )
        await self.call("Node/NodePublishVolume", request, pb.NodePublishVolumeResponse)

    async def node_unpublish(self, volume_id: str, staging: Path, target: Path) -> None:
        """Undo ``node_publish``, even a partial one."""
        request = pb.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=str(target))
        await self.call("Node/NodeUnpublishVolume", request, pb.NodeUnpublishVolumeResponse)
        if await self._has_staging():
            unstage = pb.NodeUnstageVolumeRequest(volume_id=volume_id, staging_target_path=str(staging))
            await self.call("Node/NodeUnstageVolume", unstage, pb.NodeUnstageVolumeResponse)

    # --- internal -------------------------------------------------------------------------------------------------

    async def _known_abilities(self) -> Abilities:
        if self._abilities is None:
            await self._probe()
            plugin = await self.call(
                "Identity/GetPluginCapabilities",
                pb.GetPluginCapabilitiesRequest(),
                pb.GetPluginCapabilitiesResponse,
                LOOK_S,
            )
            found = frozenset[int]()
            if any(one.service.type == _CONTROLLER for one in plugin.capabilities):
                controller = await self.call(
                    "Controller/ControllerGetCapabilities",
                    pb.ControllerGetCapabilitiesRequest(),
                    pb.ControllerGetCapabilitiesResponse,
                    LOOK_S,
                )
                found = frozenset(one.rpc.type for one in controller.capabilities)
            self._abilities = Abilities(_CREATES in found, _PUBLISHES in found)
        return self._abilities

    async def _has_staging(self) -> bool:
        if self._stages is None:
            await self._probe()
            response = await self.call(
                "Node/NodeGetCapabilities",
                pb.NodeGetCapabilitiesRequest(),
                pb.NodeGetCapabilitiesResponse,
                LOOK_S,
            )
            self._stages = any(one.rpc.type == _STAGES for one in response.capabilities)
        return self._stages

    async def _probe(self) -> None:
        response = await self.call("Identity/Probe", pb.ProbeRequest(), pb.ProbeResponse, LOOK_S)
        if response.HasField("ready") and not response.ready.value:
            raise Unavailable(f"driver {self.name} is not ready")

    async def call(self, method: str, request: Message, reply: type[A], deadline_s: float = CALL_S) -> A:
        try:
            async with asyncio.timeout(deadline_s):
                await self._calls.acquire()
        except TimeoutError as error:
            raise Unavailable(f"driver {self.name}: {CALLS_MAX} other calls did not end in time") from error
        try:
            return await call(self.socket, method, request, reply, deadline_s)
        except SkepError as error:
            said = _for_users(str(error), getattr(request, "secrets", {}).values())
            words = f"driver {self.name}: {method.partition('/')[2]}: {said}"
            kind = ResourceExhausted if isinstance(error, ResourceExhausted) else type(error)
            raise kind(words[:MESSAGE_CHARACTERS_MAX]) from error
        finally:
            self._calls.release()


async def call(socket: Path, method: str, request: Message, reply: type[A], deadline_s: float) -> A:
    """Call a driver on a new connection: calls are rare, and a restarted driver needs no special case.

    Raises: SkepError.
    """
    loop = asyncio.get_running_loop()
    with peer_errors("the driver"):
        async with asyncio.timeout(deadline_s):
            _, connection = await loop.create_unix_connection(lambda: ClientConnection(_BOUNDS), str(socket))
            try:
                with connection.stream() as stream:
                    block = request_block(f"/csi.v1.{method}", deadline_s)
                    stream.begin(block, request.SerializeToString(), is_last=True)
                    return reply.FromString(await stream.only_message())
            finally:
                connection.abort()  # a closed connection would stay open as long as the driver does not read


def is_name(name: str) -> bool:
    """Return whether CSI allows ``name`` as a driver name."""
    return _NAME.fullmatch(name) is not None


def capability_of(mode: AccessMode) -> pb.VolumeCapability:
    """Return how the volume is used, as a CSI capability."""
    access = pb.VolumeCapability.AccessMode(mode=_MODES.get((mode.scope, mode.sharing), 0))
    if mode.block_volume is not None:
        return pb.VolumeCapability(block=pb.VolumeCapability.BlockVolume(), access_mode=access)
    mount = mode.mount_volume or TypeMount()
    return pb.VolumeCapability(
        mount=pb.VolumeCapability.MountVolume(fs_type=mount.fs_type, mount_flags=list(mount.mount_flags)),
        access_mode=access,
    )


def checked_info(volume: pb.Volume) -> VolumeInfo:
    """Return the volume's description.  Raises: UnusableResponse."""
    if not 0 < len(volume.volume_id.encode()) <= ID_BYTES_MAX:
        raise UnusableResponse("the driver returned no usable volume id")
    if volume.capacity_bytes < 0 or len(volume.accessible_topology) > TOPOLOGIES_MAX:
        raise UnusableResponse("the driver described the volume with invalid numbers")
    return VolumeInfo(
        capacity_bytes=volume.capacity_bytes,
        volume_context=_checked_map("volume context", volume.volume_context),
        volume_id=volume.volume_id,
        accessible_topology=tuple(map(_topology_from_pb, volume.accessible_topology)),
    )


def discrepancy(volume: Volume, info: VolumeInfo) -> str:
    """Return a sentence about how a created volume differs from its spec, or an empty string."""
    wanted, has = volume.spec.capacity_range or CapacityRange(), info.capacity_bytes
    if has and has < wanted.required_bytes:
        return f"the driver made it with {has} bytes: {wanted.required_bytes} are required"
    if wanted.limit_bytes and has > wanted.limit_bytes:
        return f"the driver made it with {has} bytes: the limit is {wanted.limit_bytes}"
    where = volume.spec.accessibility_requirements
    places: Sequence[Topology] = where.requisite if where is not None else ()
    if places and info.accessible_topology and not any(map(places.__contains__, info.accessible_topology)):
        return "the driver created it outside the required topologies"
    return ""


def _checked_map(what: str, given: Mapping[str, str]) -> Mapping[str, str]:
    if sum(len(key.encode()) + len(value.encode()) for key, value in given.items()) > MAP_BYTES_MAX:
        raise UnusableResponse(f"the driver's {what} has more than {MAP_BYTES_MAX} bytes")
    return dict(sorted(given.items()))


def _for_users(words: str, secrets: Iterable[str]) -> str:
    """Remove secrets and control characters from a driver's words.

    Some drivers repeat their request, and docker prints errors of tasks unfiltered.
    """
    for secret in sorted((one.strip() for one in secrets), key=len, reverse=True):
        if len(secret) >= SECRET_CHARACTERS_MIN:
            words = words.replace(secret, "***")
    return printable(" ".join(words.split()))


def _topology_to_pb(topology: Topology) -> pb.Topology:
    return pb.Topology(segments=dict(topology.segments))


def _topology_from_pb(message: pb.Topology) -> Topology:
    return Topology(segments=_checked_map("topology", message.segments))
