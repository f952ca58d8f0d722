"""Nodes: machines of the cluster."""

from collections.abc import Mapping
from enum import Enum

from msgspec.structs import replace

from skep.model.encoding import ApiObject, always
from skep.model.ids import NodeId, SessionId
from skep.model.meta import TLSInfo, Version
from skep.model.paths import PathCheck
from skep.model.service import Platform, Resources
from skep.model.task import NetworkAttachment
from skep.model.times import ZERO_TIME, Timestamp

ANSWER_SECONDS_MAX = 5.0
"""How long a node waits for an answer of a manager where there is no other to go to."""


class NodeRole(Enum):
    __go_name__ = "swarm.NodeRole"

    WORKER = "worker"
    MANAGER = "manager"


class Availability(Enum):
    __go_name__ = "swarm.NodeAvailability"

    ACTIVE = "active"
    PAUSE = "pause"
    DRAIN = "drain"


class NodeState(Enum):
    UNKNOWN = "unknown"
    DOWN = "down"
    READY = "ready"
    DISCONNECTED = "disconnected"


class Reachability(Enum):
    UNKNOWN = "unknown"
    UNREACHABLE = "unreachable"
    REACHABLE = "reachable"


class NodeSpec(ApiObject):
    """What the user decides about a node."""

    name: str = ""
    labels: Mapping[str, str] = always({})
    role: NodeRole = always(NodeRole.WORKER)
    availability: Availability = always(Availability.ACTIVE)


class Topology(ApiObject):
    segments: Mapping[str, str] = {}


class CSIInfo(ApiObject):
    """What a storage plugin says of itself on this node."""

    plugin_name: str = ""
    node_id: str = ""
    max_volumes_per_node: int = 0
    accessible_topology: Topology | None = None


class EnginePlugin(ApiObject):
    type: str = ""
    name: str = ""


class EngineDescription(ApiObject):
    engine_version: str = ""
    labels: Mapping[str, str] = {}
    plugins: tuple[EnginePlugin, ...] = ()


class NodeDescription(ApiObject):
    """What the node says of itself when it registers."""

    hostname: str = ""
    platform: Platform = always(Platform())
    resources: Resources = always(Resources())
    engine: EngineDescription = always(EngineDescription())
    tls_info: TLSInfo = always(TLSInfo())
    csi_info: tuple[CSIInfo, ...] = ()


class NodeStatus(ApiObject):
    state: NodeState = always(NodeState.UNKNOWN)
    message: str = ""
    addr: str = ""


class ManagerStatus(ApiObject):
    """``has_vote``: false for a manager that a restore or a forced new cluster left behind.

    ``level``: the newest level of the stored data that it knows; 0: it is of a version that does not say, and knows 1.
    ``peer_addr``: ``ip:port`` where the other managers reach its etcd; empty: it does not say.
    The three are left out of answers.
    """

    leader: bool = False
    reachability: Reachability = always(Reachability.UNKNOWN)
    addr: str = ""
    has_vote: bool = True
    level: int = 0
    peer_addr: str = ""


class NodeSession(ApiObject):
    """Which manager holds the node's session.  Taken by compare-and-swap; every write made for it names it."""

    manager_id: NodeId = NodeId("")
    session_id: SessionId = SessionId("")


class IssuedSerial(ApiObject):
    """One certificate that was issued: its serial number in hexadecimal digits, and when it expires."""

    serial: str
    not_after: Timestamp


class NodeCertificate(ApiObject):
    """State of the node's certificate; the certificate itself stays with the node."""

    role: NodeRole = NodeRole.WORKER
    state: str = ""
    """issued, or rotate: the node is asked to renew."""
    not_after: Timestamp = Timestamp("")
    """When the newest one expires."""
    issuer: str = ""
    """Digest of the public key that signed the newest one (``security.trust.issuer_digest``)."""
    serials: tuple[IssuedSerial, ...] = ()
    """Manager certificates that have not expired: those that have to be taken back when it is no manager any more."""
    plane: str = ""
    """Which kind of node it joined as, and stays: ``docker`` or ``skep`` (``model.planes``).

    Empty: it joined when that was not kept yet, and is what it says to be until it renews.
    """
    last_not_after: Timestamp = Timestamp("")
    """When the last of all that were issued to it expires: not the newest, once the lifetime was shortened."""


class FailingPath(ApiObject):
    """Another node that this one does not reach by one of the ways there are.  Names are as of when it was found."""

    peer: NodeId
    hostname: str = ""
    check: str = ""
    """What was tried: a ``PathCheck``, or what a later version tries."""
    port: str = ""
    """``4789/udp``"""

    @property
    def words(self) -> str:
        """``w2 4789/udp (overlay)``"""
        return f"{self.hostname or self.peer} {self.port} ({self.check})"


class CutOff(ApiObject):
    """Tasks on networks that need this way between nodes are not placed on the node."""

    check: str
    """As of a ``FailingPath``."""
    port: str = ""
    peers: tuple[str, ...] = ()
    """Host names of nodes that it does not reach, or that do not reach it; the first few."""
    others: int = 0
    """How many more there are."""

    @property
    def networks(self) -> str:
        """``overlay networks``: those that need this way."""
        return "encrypted overlay networks" if self.check == PathCheck.ENCRYPTED else "overlay networks"

    @property
    def words(self) -> str:
        """``4789/udp fails between this node and w2, w3 and 5 others``"""
        more = f" and {self.others} other{'s' if self.others > 1 else ''}" if self.others else ""
        return f"{self.port} fails between this node and {', '.join(self.peers)}{more}"


class Node(ApiObject):
    """A machine of the cluster.

    Writers: API: ``spec``; owner of the session: ``description``, ``status``, ``silent_*``, and as parts of their
    own ``load`` and ``failing_paths``; whoever takes it: ``session``; CA: ``certificate``; leader: ``attachments``,
    ``cut_off``; that manager itself: ``manager_status``, ``peer_roots``.
    What follows ``manager_status`` is internal and left out of API answers.
    """

    id: NodeId
    version: Version = always(Version())
    created_at: Timestamp = always(ZERO_TIME)
    updated_at: Timestamp = always(ZERO_TIME)
    spec: NodeSpec = always(NodeSpec())
    description: NodeDescription = always(NodeDescription())
    status: NodeStatus = always(NodeStatus())
    load: float | None = None
    """Share of the node in use, 0 to 1, as it measured and as far as it matters to placement; None: it has not said.
    Not in Docker's answers."""
    manager_status: ManagerStatus | None = None
    session: NodeSession | None = None
    certificate: NodeCertificate | None = None
    attachments: tuple[NetworkAttachment, ...] = ()
    peer_roots: str = ""
    """Of a manager: digest of the roots that its etcd has trusted since its last start."""
    silent_since: Timestamp | None = None
    """Of a node that is down: when it was last heard, on its judge's clock."""
    silent_together: bool = False
    """Of a node that is down: whether its judge had missed heartbeats of others then, too."""
    failing_paths: tuple[FailingPath, ...] = ()
    """What it said of its ways to others, as far as it fails; the first few, by peer and check."""
    cut_off: tuple[CutOff, ...] = ()
    """What of that makes it the node to avoid, so that those that are left reach each other; by check."""

    @property
    def is_reachable_manager(self) -> bool:
        """Whether it is a manager that the leader hears."""
        status = self.manager_status
        return status is not None and status.reachability is Reachability.REACHABLE


def differ_in_load_alone(one: Node, other: Node) -> bool:
    """Whether the load is all that has changed: news for the choice of nodes and for nothing else."""
    return one.load != other.load and replace(one, load=other.load) == other
