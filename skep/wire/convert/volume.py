"""Cluster volumes as they are sent to nodes."""

from collections.abc import Mapping
from typing import Final

from skep.model.values.ids import VolumeId
from skep.model.volume import (
    AccessMode,
    TypeBlock,
    TypeMount,
    VolumeAssignment,
    VolumeScope,
    VolumeSecret,
    VolumeSharing,
)
from skep.wire import swarm_pb2 as pb
from skep.wire.convert.values import driver_from_pb, driver_to_pb

_Mode = pb.VolumeAccessMode
_SCOPES: Final[Mapping[VolumeScope, _Mode.Scope.ValueType]] = {
    VolumeScope.SINGLE: _Mode.SINGLE_NODE,
    VolumeScope.MULTI: _Mode.MULTI_NODE,
}
_SHARINGS: Final[Mapping[VolumeSharing, _Mode.Sharing.ValueType]] = {
    VolumeSharing.NONE: _Mode.NONE,
    VolumeSharing.READ_ONLY: _Mode.READ_ONLY,
    VolumeSharing.ONE_WRITER: _Mode.ONE_WRITER,
    VolumeSharing.ALL: _Mode.ALL,
}
_SCOPE_OF = {number: scope for scope, number in _SCOPES.items()}
_SHARING_OF = {number: sharing for sharing, number in _SHARINGS.items()}


def volume_to_pb(volume: VolumeAssignment) -> pb.VolumeAssignment:
    """Encode a volume in the form that SwarmKit's agents read."""
    mode = _Mode(scope=_SCOPES[volume.access_mode.scope], sharing=_SHARINGS[volume.access_mode.sharing])
    if (mount := volume.access_mode.mount_volume) is not None:
        mode.mount.CopyFrom(_Mode.MountVolume(fs_type=mount.fs_type, mount_flags=list(mount.mount_flags)))
    if volume.access_mode.block_volume is not None:
        mode.block.CopyFrom(_Mode.BlockVolume())
    return pb.VolumeAssignment(
        id=volume.id,
        volume_id=volume.volume_id,
        driver=driver_to_pb(volume.driver),
        volume_context=dict(volume.volume_context),
        publish_context=dict(volume.publish_context),
        access_mode=mode,
        secrets=[pb.VolumeSecret(key=one.key, secret=one.secret) for one in volume.secrets],
    )


def volume_from_pb(message: pb.VolumeAssignment) -> VolumeAssignment:
    """Convert a volume.  An unknown scope or sharing counts as the narrowest."""
    mode = message.access_mode
    kind = mode.WhichOneof("access_type")
    return VolumeAssignment(
        id=VolumeId(message.id),
        volume_id=message.volume_id,
        driver=driver_from_pb(message.driver),
        volume_context=dict(message.volume_context),
        publish_context=dict(message.publish_context),
        access_mode=AccessMode(
            scope=_SCOPE_OF.get(mode.scope, VolumeScope.SINGLE),
            sharing=_SHARING_OF.get(mode.sharing, VolumeSharing.NONE),
            mount_volume=TypeMount(fs_type=mode.mount.fs_type, mount_flags=tuple(mode.mount.mount_flags))
            if kind == "mount"
            else None,
            block_volume=TypeBlock() if kind == "block" else None,
        ),
        secrets=tuple(VolumeSecret(key=one.key, secret=one.secret) for one in message.secrets),
    )
