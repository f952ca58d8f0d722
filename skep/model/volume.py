"""Cluster volumes: storage that a CSI driver creates, and publishes on the nodes whose tasks mount it.

Names and values are the same as in Docker's ``ClusterVolume``.

Source: moby, api/types/volume/cluster_volume.go; swarmkit, api/objects.proto (Volume).
"""

from collections.abc import Mapping
from enum import Enum
from typing import ClassVar

import msgspec

from skep.model.node import Topology
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId, VolumeId
from skep.model.values.meta import Driver, Version
from skep.model.values.times import ZERO_TIME, Timestamp

NOT_PUBLISHED = "it is not published on this node"
"""Part of the error of a task that waited for a volume in vain.  The manager adds the reason, unknown to the node."""

GROUP_PREFIX = "group:"
"""Prefix of a mount's source that stands for any volume of a group."""


ENTRIES_BYTES_MAX = 960 << 10
"""Bytes of all entries of a volume: together they are one part of the object, which is limited to 1 MiB."""
_ENTRY_BYTES_MAX = 12 << 10
"""Bytes reserved for an entry until its driver has responded."""
_WORDS_BYTES = 700
"""Bytes reserved for a later message in an entry."""


class VolumeScope(Enum):
    """Whether a volume may be on one node or on several nodes at a time."""

    __go_name__ = "volume.Scope"

    SINGLE = "single"
    MULTI = "multi"


class VolumeSharing(Enum):
    """Sharing of a volume between tasks: none, all read, one writes, or all write."""

    __go_name__ = "volume.SharingMode"

    NONE = "none"
    READ_ONLY = "readonly"
    ONE_WRITER = "onewriter"
    ALL = "all"


class VolumeAvailability(Enum):
    """Availability of a volume.  Paused: no new tasks.  Drained: its tasks are stopped, and it is unpublished."""

    __go_name__ = "volume.Availability"

    ACTIVE = "active"
    PAUSE = "pause"
    DRAIN = "drain"


class PublishState(Enum):
    """State of a volume on one node.

    In ``PENDING`` the controller may have received its call already, in ``PENDING_NODE_UNPUBLISH`` the node's driver.
    """

    PENDING = "pending-publish"
    PUBLISHED = "published"
    PENDING_NODE_UNPUBLISH = "pending-node-unpublish"
    PENDING_UNPUBLISH = "pending-controller-unpublish"


class TypeMount(ApiObject):
    """A volume with a file system."""

    __go_name__: ClassVar[str | None] = "volume.TypeMount"

    fs_type: str = ""
    mount_flags: tuple[str, ...] = ()


class TypeBlock(ApiObject):
    """A block device."""

    __go_name__: ClassVar[str | None] = "volume.TypeBlock"


class AccessMode(ApiObject):
    """Use of a volume by nodes and tasks."""

    __go_name__: ClassVar[str | None] = "volume.AccessMode"

    scope: VolumeScope = always(VolumeScope.SINGLE)
    sharing: VolumeSharing = always(VolumeSharing.NONE)
    mount_volume: TypeMount | None = None
    block_volume: TypeBlock | None = None


class TopologyRequirement(ApiObject):
    """Topologies from which a volume must be accessible, and preferred topologies."""

    __go_name__: ClassVar[str | None] = "volume.TopologyRequirement"

    requisite: tuple[Topology, ...] = ()
    preferred: tuple[Topology, ...] = ()


class CapacityRange(ApiObject):
    """Requested capacity in bytes, with 0 for no bound."""

    __go_name__: ClassVar[str | None] = "volume.CapacityRange"

    required_bytes: int = always(0)
    limit_bytes: int = always(0)


class VolumeSecret(ApiObject):
    """A secret for the driver, which receives its data as ``key``.  ``secret``: its id, or in requests its name."""

    __go_name__: ClassVar[str | None] = "volume.Secret"

    key: str = always("")
    secret: str = always("")


class ClusterVolumeSpec(ApiObject):
    """The user's settings of a cluster volume, except name, labels and driver."""

    __go_name__: ClassVar[str | None] = "volume.ClusterVolumeSpec"

    group: str = ""
    access_mode: AccessMode | None = None
    accessibility_requirements: TopologyRequirement | None = None
    capacity_range: CapacityRange | None = None
    secrets: tuple[VolumeSecret, ...] = ()
    availability: VolumeAvailability | None = None


class VolumeSpec(ApiObject):
    """The user's spec of a volume."""

    name: str = ""
    labels: Mapping[str, str] = always({})
    driver: Driver = always(Driver())
    group: str = ""
    access_mode: AccessMode = always(AccessMode())
    accessibility_requirements: TopologyRequirement | None = None
    capacity_range: CapacityRange | None = None
    secrets: tuple[VolumeSecret, ...] = ()
    availability: VolumeAvailability = always(VolumeAvailability.ACTIVE)


class VolumeInfo(ApiObject):
    """A volume as created by its driver.  ``capacity_bytes`` is 0 if the driver does not report it."""

    capacity_bytes: int = 0
    volume_context: Mapping[str, str] = {}
    volume_id: str = ""
    accessible_topology: tuple[Topology, ...] = ()


class PublishStatus(ApiObject):
    """A volume's status on one node.

    The fields after ``publish_context`` are not in Docker's API.
    """

    node_id: NodeId
    state: PublishState = PublishState.PENDING
    publish_context: Mapping[str, str] = {}
    driver_node_id: str = ""
    """The node's id in the driver."""
    is_closing: bool = False
    """Whether no further task may get it on that node, although it is published and the node was not told yet."""
    is_doubtful: bool = False
    """Whether the node's mounts are unknown, as the stored state is older than the last call (``steps.doubted``)."""
    message: str = ""

    @property
    def may_be_published(self) -> bool:
        """Return whether the driver may have published the volume there.

        The driver is called only once ``driver_node_id`` is stored.
        """
        return self.state is not PublishState.PENDING or bool(self.driver_node_id)

    @property
    def takes_tasks(self) -> bool:
        """Return whether further tasks may have the volume on that node."""
        return self.state in (PublishState.PENDING, PublishState.PUBLISHED) and not self.is_closing


class Volume(ApiObject):
    """A cluster volume.

    The API writes ``spec`` and ``pending_delete``.  The leader writes ``info``, ``is_creating``, ``message`` and
    ``publish_status``.  The owner of the node's session changes ``publish_status`` from ``PENDING_NODE_UNPUBLISH`` to
    ``PENDING_UNPUBLISH``.
    """

    id: VolumeId
    version: Version = always(Version())
    created_at: Timestamp = always(ZERO_TIME)
    updated_at: Timestamp = always(ZERO_TIME)
    spec: VolumeSpec = always(VolumeSpec())
    pending_delete: bool = False
    is_creating: bool = False
    """Whether the driver may have created it although ``info`` is unset.  Written before the call to the driver."""
    info: VolumeInfo | None = None
    message: str = ""
    """Reason why the volume could not be created or deleted.  Empty without an error."""
    publish_status: tuple[PublishStatus, ...] = ()
    """Nodes where the volume may be, in the order of their ids.  An entry is written before the volume is published."""

    def status_on(self, node_id: NodeId) -> PublishStatus | None:
        """Return its status on a node, or None if it is not there."""
        return next((one for one in self.publish_status if one.node_id == node_id), None)


def room_for_nodes(volume: Volume) -> int:
    """Return the number of further nodes on which the volume can be published."""
    return max(0, (ENTRIES_BYTES_MAX - sum(map(entry_bytes, volume.publish_status))) // _ENTRY_BYTES_MAX)


def entry_bytes(status: PublishStatus) -> int:
    """Return the number of bytes to which the entry may grow."""
    if status.state is PublishState.PENDING:
        return _ENTRY_BYTES_MAX
    return len(msgspec.json.encode(status)) + _WORDS_BYTES


class VolumeAssignment(ApiObject):
    """The data that a node needs to use a volume, sent with its tasks instead of the volume itself."""

    id: VolumeId
    volume_id: str = ""
    driver: Driver = always(Driver())
    volume_context: Mapping[str, str] = {}
    publish_context: Mapping[str, str] = {}
    access_mode: AccessMode = always(AccessMode())
    secrets: tuple[VolumeSecret, ...] = ()


def fits_topology(node: Topology | None, accessible: tuple[Topology, ...]) -> bool:
    """Return whether a node's topology matches one from which a volume is accessible.  Unknown topologies match.

    Source: swarmkit, manager/scheduler/topology.go (IsInTopology).
    """
    if node is None or not accessible:
        return True
    return any(
        all(node.segments.get(key) == value for key, value in place.segments.items()) for place in accessible
    )
