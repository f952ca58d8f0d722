"""Operations on cluster volumes.

Source: swarmkit, manager/controlapi/volume.go; moby, daemon/cluster/volumes.go.
"""

from msgspec.structs import replace

from skep.errors import FailedPrecondition, InvalidArgument, NotFound, OutOfSequence
from skep.model.secret import Secret
from skep.model.task import Task
from skep.model.values.ids import IdSource, VolumeId
from skep.model.values.meta import Version
from skep.model.values.times import Timestamp
from skep.model.volume import (
    AccessMode,
    CapacityRange,
    ClusterVolumeSpec,
    TopologyRequirement,
    Volume,
    VolumeScope,
    VolumeSecret,
    VolumeSharing,
    VolumeSpec,
)
from skep.store.interface import Transaction, View
from skep.store.level import CLUSTER_VOLUMES

NAME_BYTES_MAX = 128
"""CSI's limit for strings, which also applies to the name of a volume."""
_MAP_BYTES_MAX = 4096
"""CSI's limit for maps, and for all mount flags together."""


def create_volume(tx: Transaction, spec: VolumeSpec, *, new_id: IdSource, now: Timestamp) -> Volume:
    """Create a volume.  Its driver creates it afterwards.

    Raises:
        InvalidArgument: The spec cannot work, or a secret does not exist.
        AlreadyExists: The name is taken.
        FailedPrecondition: A manager is too old for cluster volumes.
    """
    _check_spec(spec)
    if tx.level < CLUSTER_VOLUMES:
        raise FailedPrecondition("cluster volumes need managers of this version: upgrade the others first")
    spec = replace(spec, secrets=_with_ids(tx, spec.secrets))
    return tx.put(Volume(id=VolumeId(new_id()), created_at=now, spec=spec))


def update_volume(tx: Transaction, id: VolumeId, asked: ClusterVolumeSpec | None, version: int) -> Volume:
    """Change the availability, the only part of a volume that Docker's API changes.

    Raises:
        NotFound: The volume does not exist.
        OutOfSequence: The volume is at another version.
        InvalidArgument: Another field would change.
    """
    volume = tx.get(Volume, id)
    if volume.version != Version(index=version):
        raise OutOfSequence
    if asked is None:
        return volume
    _check_unchanged(volume.spec, asked)
    availability = asked.availability or volume.spec.availability
    return tx.put(replace(volume, spec=replace(volume.spec, availability=availability)))


def _check_unchanged(spec: VolumeSpec, asked: ClusterVolumeSpec) -> None:
    """Check that no other field changes.  Omitted fields are unchanged.  Raises: InvalidArgument, in SwarmKit's words.

    The docker command sends back all fields that it has received.  Docker's daemon ignores them, so a larger capacity
    would seem to be accepted.
    """
    none_required, no_range = TopologyRequirement(), CapacityRange()
    for name, given, kept in (
        ("Group", asked.group, spec.group),
        (
            "AccessibilityRequirements",
            asked.accessibility_requirements,
            spec.accessibility_requirements or none_required,
        ),
        ("AccessMode", asked.access_mode, spec.access_mode),
        ("Secrets", asked.secrets, spec.secrets),
        ("CapacityRange", asked.capacity_range, spec.capacity_range or no_range),
    ):
        if given and given != kept:
            raise InvalidArgument(f"{name} cannot be updated")


def remove_volume(tx: Transaction, id: VolumeId, *, force: bool) -> None:
    """Let the driver delete an unused volume.  With ``force``, forget the volume without calling its driver.

    Raises:
        NotFound: The volume does not exist.
        FailedPrecondition: The volume is in use.
    """
    volume = tx.get(Volume, id)
    if force:
        tx.delete(Volume, id)
    elif volume.publish_status or _users(tx, id):
        raise FailedPrecondition("volume is still in use")
    else:
        tx.put(replace(volume, pending_delete=True))


def _users(tx: View, id: VolumeId) -> bool:
    """Return whether a task that has not ended has the volume."""
    return any(
        attachment.id == id
        for task in tx.find(Task)
        if task.volumes and not task.status.state.is_terminal
        for attachment in task.volumes
    )


def _check_spec(spec: VolumeSpec) -> None:
    """Check a volume's spec.  Raises: InvalidArgument."""
    if not spec.name:
        raise InvalidArgument("meta: name must be provided")
    if len(spec.name.encode()) > NAME_BYTES_MAX or not spec.name.isprintable():
        raise InvalidArgument(f"the name of a volume can have at most {NAME_BYTES_MAX} bytes, all printable")
    if not spec.driver.name:
        raise InvalidArgument("driver must be specified")
    if sum(len(key) + len(value) for key, value in spec.driver.options.items()) > _MAP_BYTES_MAX:
        raise InvalidArgument(f"the driver's options have more than {_MAP_BYTES_MAX} bytes")
    _check_access(spec.access_mode)
    _check_capacity(spec.capacity_range or CapacityRange())
    keys = [one.key for one in spec.secrets]
    if len(set(keys)) < len(keys):
        raise InvalidArgument("two secrets of the volume have the same key")


def _check_access(mode: AccessMode) -> None:
    if (mode.mount_volume is None) == (mode.block_volume is None):
        raise InvalidArgument("Volume AccessMode must specify either Mount or Block access type")
    if mode.mount_volume is not None and sum(map(len, mode.mount_volume.mount_flags)) > _MAP_BYTES_MAX:
        raise InvalidArgument(f"the mount flags have more than {_MAP_BYTES_MAX} bytes")
    if mode.scope is VolumeScope.MULTI and mode.sharing is VolumeSharing.NONE:
        # CSI does not define this mode, so every driver would refuse it later.
        raise InvalidArgument("scope multi needs --sharing readonly, onewriter or all")


def _check_capacity(capacity: CapacityRange) -> None:
    required, limit = capacity.required_bytes, capacity.limit_bytes
    if min(required, limit) < 0 or max(required, limit) >= 2**63:
        raise InvalidArgument("a capacity is a number of bytes, 0 or more")
    if limit and limit < required:
        raise InvalidArgument(f"the limit of {limit} bytes is below the required {required} bytes")


def _with_ids(tx: Transaction, secrets: tuple[VolumeSecret, ...]) -> tuple[VolumeSecret, ...]:
    """Replace the secrets' names by ids.  Raises: InvalidArgument, naming all that do not exist."""
    found, missing = [], []
    for one in secrets:
        try:
            found.append(replace(one, secret=tx.resolve(Secret, one.secret).id))
        except NotFound:
            missing.append(one.secret)
    if missing:
        noun = "secret" if len(missing) == 1 else "secrets"
        raise InvalidArgument(f"{noun} not found: {', '.join(missing)}")
    return tuple(found)
