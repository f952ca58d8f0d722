"""Cluster volumes: storage that a CSI driver makes, and publishes on the nodes whose tasks mount it.

Names and values are those of Docker's ``ClusterVolume``.

Source: moby, api/types/volume/cluster_volume.go; swarmkit, api/objects.proto (Volume).
"""

from collections.abc import Mapping
from enum import Enum
from typing import ClassVar

import msgspec

from skep.model.encoding import ApiObject, always
from skep.model.ids import NodeId, VolumeId
from skep.model.meta import Driver, Version
from skep.model.node import Topology
from skep.model.times import ZERO_TIME, Timestamp

NOT_PUBLISHED = "it is not published on this node"
"""In the error of a task that waited for it in vain; the manager adds the reason, which the node does not have."""

GROUP_PREFIX = "group:"
"""Of a mount's source: any volume of that group."""


ENTRIES_BYTES_MAX = 960 << 10
"""Of all entries of a volume: they are one part of the object, of at most 1 MiB."""
_ENTRY_BYTES_MAX = 12 << 10
"""Of an entry whose driver has not answered yet."""
_WORDS_BYTES = 700
"""Of a later message in an entry."""


class VolumeScope(Enum):
    """On how many nodes at a time a volume may be."""

    __go_name__ = "volume.Scope"

    SINGLE = "single"
    MULTI = "multi"


class VolumeSharing(Enum):
    """How tasks may share a volume: not at all, all reading, one of them writing, all writing."""

    __go_name__ = "volume.SharingMode"

    NONE = "none"
    READ_ONLY = "readonly"
    ONE_WRITER = "onewriter"
    ALL = "all"


class VolumeAvailability(Enum):
    """Pause: no new tasks; drain: its tasks end, and it is unpublished."""

    __go_name__ = "volume.Availability"

    ACTIVE = "active"
    PAUSE = "pause"
    DRAIN = "drain"


class PublishState(Enum):
    """Of a volume on one node.  The first may have reached the driver's controller, the third the node's driver."""

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
    """How nodes and tasks use a volume."""

    __go_name__: ClassVar[str | None] = "volume.AccessMode"

    scope: VolumeScope = always(VolumeScope.SINGLE)
    sharing: VolumeSharing = always(VolumeSharing.NONE)
    mount_volume: TypeMount | None = None
    block_volume: TypeBlock | None = None


class TopologyRequirement(ApiObject):
    """Where a volume must be accessible, and where it had best be."""

    __go_name__: ClassVar[str | None] = "volume.TopologyRequirement"

    requisite: tuple[Topology, ...] = ()
    preferred: tuple[Topology, ...] = ()


class CapacityRange(ApiObject):
    """In bytes; 0: no bound."""

    __go_name__: ClassVar[str | None] = "volume.CapacityRange"

    required_bytes: int = always(0)
    limit_bytes: int = always(0)


class VolumeSecret(ApiObject):
    """The driver gets the data of the secret (``secret``: its id; in requests also its name) under ``key``."""

    __go_name__: ClassVar[str | None] = "volume.Secret"

    key: str = always("")
    secret: str = always("")


class ClusterVolumeSpec(ApiObject):
    """What a client asks for, beside name, labels and driver."""

    __go_name__: ClassVar[str | None] = "volume.ClusterVolumeSpec"

    group: str = ""
    access_mode: AccessMode | None = None
    accessibility_requirements: TopologyRequirement | None = None
    capacity_range: CapacityRange | None = None
    secrets: tuple[VolumeSecret, ...] = ()
    availability: VolumeAvailability | None = None


class VolumeSpec(ApiObject):
    """A volume as its user specifies it."""

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
    """A volume as its driver has made it; ``capacity_bytes`` 0: the driver does not say."""

    capacity_bytes: int = 0
    volume_context: Mapping[str, str] = {}
    volume_id: str = ""
    accessible_topology: tuple[Topology, ...] = ()


class PublishStatus(ApiObject):
    """A volume on one node.

    What comes after ``publish_context`` is not in Docker's API.
    """

    node_id: NodeId
    state: PublishState = PublishState.PENDING
    publish_context: Mapping[str, str] = {}
    driver_node_id: str = ""
    """The node's id in the driver."""
    is_closing: bool = False
    """While it is published: no task gets it on that node any more, which was not sent to the node yet."""
    is_doubtful: bool = False
    """The node may have it mounted in any state: what is stored is older than what was done (``steps.doubted``)."""
    message: str = ""

    @property
    def may_be_published(self) -> bool:
        """Whether the driver may have published the volume there: it is called by its own id of the node only."""
        return self.state is not PublishState.PENDING or bool(self.driver_node_id)

    @property
    def takes_tasks(self) -> bool:
        """Whether further tasks may have the volume on that node."""
        return self.state in (PublishState.PENDING, PublishState.PUBLISHED) and not self.is_closing


class Volume(ApiObject):
    """A cluster volume.

    Writers: API: ``spec``, ``pending_delete``; leader: ``info``, ``is_creating``, ``message``; leader, and from
    ``PENDING_NODE_UNPUBLISH`` to ``PENDING_UNPUBLISH`` the owner of the node's session: ``publish_status``.
    """

    id: VolumeId
    version: Version = always(Version())
    created_at: Timestamp = always(ZERO_TIME)
    updated_at: Timestamp = always(ZERO_TIME)
    spec: VolumeSpec = always(VolumeSpec())
    pending_delete: bool = False
    is_creating: bool = False
    """Whether the driver may have made it without ``info`` of it: written before the call."""
    info: VolumeInfo | None = None
    message: str = ""
    """Why it is not created, or not deleted; empty: nothing is wrong."""
    publish_status: tuple[PublishStatus, ...] = ()
    """By id of the node; it says where the volume may be: an entry is written before it is published there."""

    def status_on(self, node_id: NodeId) -> PublishStatus | None:
        """Its status on a node; None: it is not there."""
        return next((one for one in self.publish_status if one.node_id == node_id), None)


def room_for_nodes(volume: Volume) -> int:
    """On how many more nodes it can be published."""
    return max(0, (ENTRIES_BYTES_MAX - sum(map(entry_bytes, volume.publish_status))) // _ENTRY_BYTES_MAX)


def entry_bytes(status: PublishStatus) -> int:
    """How large it may become."""
    if status.state is PublishState.PENDING:
        return _ENTRY_BYTES_MAX
    return len(msgspec.json.encode(status)) + _WORDS_BYTES


class VolumeAssignment(ApiObject):
    """What a node needs to use a volume: sent with its tasks, never the volume itself."""

    id: VolumeId
    volume_id: str = ""
    driver: Driver = always(Driver())
    volume_context: Mapping[str, str] = {}
    publish_context: Mapping[str, str] = {}
    access_mode: AccessMode = always(AccessMode())
    secrets: tuple[VolumeSecret, ...] = ()


def fits_topology(node: Topology | None, accessible: tuple[Topology, ...]) -> bool:
    """Whether a node lies in one of the places from which a volume is accessible; what is not known fits.

    Source: swarmkit, manager/scheduler/topology.go (IsInTopology).
    """
    if node is None or not accessible:
        return True
    return any(
        all(node.segments.get(key) == value for key, value in place.segments.items()) for place in accessible
    )
