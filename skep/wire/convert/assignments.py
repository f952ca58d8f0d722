"""Assignments: the tasks of a node, with their secrets, configs and cluster volumes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.model.assignment import AssignmentSet, ConfigFile, SecretFile
from skep.model.task import Trust
from skep.model.values.ids import ConfigId, SecretId, TaskId, VolumeId
from skep.model.volume import (
    AccessMode,
    TypeBlock,
    TypeMount,
    VolumeAssignment,
    VolumeScope,
    VolumeSecret,
    VolumeSharing,
)
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.convert.task import registry_auth_of, task_from_pb, task_to_pb
from skep.wire.convert.values import driver_from_pb, driver_to_pb


def changes_to_pb(change: AssignmentSet) -> list[pb.AssignmentChange]:
    """Return one entry for each object.  The message around the entries holds ``complete`` and ``revision``."""
    return [
        *(_put(pb.Assignment(secret=_secret_to_pb(secret))) for secret in change.secrets),
        *(_put(pb.Assignment(config=_config_to_pb(config))) for config in change.configs),
        *(
            _put(pb.Assignment(task=task_to_pb(task, change.registry_auths.get(task.task.id, ""))))
            for task in change.tasks
        ),
        *(_remove(pb.Assignment(task=pb.Task(id=id))) for id in change.removed_tasks),
        *(_remove(pb.Assignment(secret=pb.Secret(id=id))) for id in change.removed_secrets),
        *(_remove(pb.Assignment(config=pb.Config(id=id))) for id in change.removed_configs),
        *(_put(pb.Assignment(volume=volume_to_pb(volume))) for volume in change.volumes),
        *(_remove(pb.Assignment(volume=volume_to_pb(volume))) for volume in change.removed_volumes),
    ]


def assignments_from_pb(
    message: pb.AssignmentsMessage, revision: int = 0, trusted: Mapping[TaskId, Trust] | None = None
) -> AssignmentSet:
    """Convert a message.

    Args:
        trusted: The node's rights for tasks of the message.  Tasks that are not listed have none.  None if the manager
            is a Docker Engine, which does not know these rights.  The node then allows everything for all tasks.

    Raises:
        InvalidArgument: A number is undefined.
    """
    unlisted = Trust(logs=True, logins=True) if trusted is None else Trust()
    trusted = trusted or {}
    updated = [change.assignment for change in message.changes if change.action == _UPDATE]
    removed = [change.assignment for change in message.changes if change.action == _REMOVE]
    if len(updated) + len(removed) != len(message.changes):
        raise InvalidArgument("unknown assignment action")
    tasks = _items(updated, "task")
    auths = {TaskId(item.task.id): registry_auth_of(item.task) for item in tasks}
    return AssignmentSet(
        complete=message.type == pb.AssignmentsMessage.COMPLETE,
        revision=revision,
        tasks=tuple(
            replace(task_from_pb(item.task), trust=trusted.get(TaskId(item.task.id), unlisted))
            for item in tasks
        ),
        removed_tasks=tuple(TaskId(item.task.id) for item in _items(removed, "task")),
        secrets=tuple(_secret_from_pb(item.secret) for item in _items(updated, "secret")),
        removed_secrets=tuple(SecretId(item.secret.id) for item in _items(removed, "secret")),
        configs=tuple(_config_from_pb(item.config) for item in _items(updated, "config")),
        removed_configs=tuple(ConfigId(item.config.id) for item in _items(removed, "config")),
        volumes=tuple(volume_from_pb(item.volume) for item in _items(updated, "volume")),
        removed_volumes=tuple(volume_from_pb(item.volume) for item in _items(removed, "volume")),
        registry_auths={id: auth for id, auth in auths.items() if auth},
    )


def revised_from_pb(revised: skep.RevisedAssignments) -> AssignmentSet:
    """Convert a message.  Raises InvalidArgument for undefined numbers."""
    logs, logins = frozenset(revised.trusted_logs), frozenset(revised.trusted_logins)
    trusted = {TaskId(id): Trust(logs=id in logs, logins=id in logins) for id in logs | logins}
    return assignments_from_pb(revised.message, revised.revision, trusted if revised.decides_trust else None)


_UPDATE = pb.AssignmentChange.UPDATE
_REMOVE = pb.AssignmentChange.REMOVE


def _items(assignments: Iterable[pb.Assignment], kind: str) -> Sequence[pb.Assignment]:
    return [assignment for assignment in assignments if assignment.WhichOneof("item") == kind]


def _put(assignment: pb.Assignment) -> pb.AssignmentChange:
    return pb.AssignmentChange(assignment=assignment, action=_UPDATE)


def _remove(assignment: pb.Assignment) -> pb.AssignmentChange:
    return pb.AssignmentChange(assignment=assignment, action=_REMOVE)


def _secret_to_pb(secret: SecretFile) -> pb.Secret:
    message = pb.Secret(
        id=secret.id, spec=pb.SecretSpec(annotations=pb.Annotations(name=secret.name), data=secret.data)
    )
    if secret.templating is not None:
        message.spec.templating.CopyFrom(driver_to_pb(secret.templating))
    return message


def _secret_from_pb(message: pb.Secret) -> SecretFile:
    spec = message.spec
    return SecretFile(
        id=SecretId(message.id),
        name=spec.annotations.name,
        data=spec.data,
        templating=driver_from_pb(spec.templating) if spec.HasField("templating") else None,
    )


def _config_to_pb(config: ConfigFile) -> pb.Config:
    message = pb.Config(
        id=config.id, spec=pb.ConfigSpec(annotations=pb.Annotations(name=config.name), data=config.data)
    )
    if config.templating is not None:
        message.spec.templating.CopyFrom(driver_to_pb(config.templating))
    return message


def _config_from_pb(message: pb.Config) -> ConfigFile:
    spec = message.spec
    return ConfigFile(
        id=ConfigId(message.id),
        name=spec.annotations.name,
        data=spec.data,
        templating=driver_from_pb(spec.templating) if spec.HasField("templating") else None,
    )


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
