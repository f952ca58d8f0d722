"""Nodes: machines of the cluster."""

from collections.abc import Mapping
from enum import Enum

from msgspec.structs import replace

from skep.model.networks.paths import PathCheck
from skep.model.service import Platform, Resources
from skep.model.task import NetworkAttachment
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId, SessionId
from skep.model.values.meta import TLSInfo, Version
from skep.model.values.times import ZERO_TIME, Timestamp

RESPONSE_SECONDS_MAX = 5.0
"""Seconds that a node with a single manager waits for that manager's response."""


class NodeRole(Enum):
    """The requested role in a spec, or in a certificate the role that it was issued for."""

    __go_name__ = "swarm.NodeRole"

    WORKER = "worker"
    MANAGER = "manager"


class Availability(Enum):
    """Whether a node gets tasks.  ``PAUSE`` stops new ones.  ``DRAIN`` also moves its present tasks to other nodes."""

    __go_name__ = "swarm.NodeAvailability"

    ACTIVE = "active"
    PAUSE = "pause"
    DRAIN = "drain"


class NodeState(Enum):
    """A node's state.  Skep writes ``READY`` and ``DOWN`` only; the others are part of Docker's API."""

    UNKNOWN = "unknown"
    DOWN = "down"
    READY = "ready"
    DISCONNECTED = "disconnected"


class Reachability(Enum):
    """Reachability of a manager as seen by the leader."""

    UNKNOWN = "unknown"
    UNREACHABLE = "unreachable"
    REACHABLE = "reachable"


class NodeSpec(ApiObject):
    """The user's settings of a node."""

    name: str = ""
    labels: Mapping[str, str] = always({})
    role: NodeRole = always(NodeRole.WORKER)
    availability: Availability = always(Availability.ACTIVE)


class Topology(ApiObject):
    """A node's location for CSI volumes: values by the plugin's keys."""

    segments: Mapping[str, str] = {}


class CSIInfo(ApiObject):
    """A storage plugin's description of itself on this node."""

    plugin_name: str = ""
    node_id: str = ""
    max_volumes_per_node: int = 0
    accessible_topology: Topology | None = None


class EnginePlugin(ApiObject):
    """A plugin of a Docker Engine, for example ``Network`` and ``overlay``."""

    type: str = ""
    name: str = ""


class EngineDescription(ApiObject):
    """The engine's properties.  Its labels also carry reports of skep nodes (``model.options.labels``)."""

    engine_version: str = ""
    labels: Mapping[str, str] = {}
    plugins: tuple[EnginePlugin, ...] = ()


class NodeDescription(ApiObject):
    """The node's description of itself, sent when it registers."""

    hostname: str = ""
    platform: Platform = always(Platform())
    resources: Resources = always(Resources())
    engine: EngineDescription = always(EngineDescription())
    tls_info: TLSInfo = always(TLSInfo())
    csi_info: tuple[CSIInfo, ...] = ()


UNKNOWN_STATE = 'Node moved to "unknown" state due to leadership change in cluster'
"""SwarmKit's message of a node that has not yet connected to a new leader."""
_IN_PLAIN_WORDS = {UNKNOWN_STATE: "not heard from since the cluster has another leader"}


class NodeStatus(ApiObject):
    """A node's status.  ``addr``: source address of its session.  ``message``: reason why it is down, or empty."""

    state: NodeState = always(NodeState.UNKNOWN)
    message: str = ""
    addr: str = ""


class ManagerStatus(ApiObject):
    """A manager's status.

    Args:
        has_vote: False for a manager that is no longer a member after a restore or a forced new cluster.
        level: The newest feature level of the store that it supports. 0 means that it has not reported one, and counts
            as 1.
        peer_addr: ``ip:port`` of its etcd for the other managers, or empty if not reported.

    API responses do not show these three fields.
    """

    leader: bool = False
    reachability: Reachability = always(Reachability.UNKNOWN)
    addr: str = ""
    has_vote: bool = True
    level: int = 0
    peer_addr: str = ""


class SessionOwner(ApiObject):
    """The manager that owns the node's session.  A manager takes it by compare-and-swap, and every write of the session
    is conditional on it.
    """

    manager_id: NodeId = NodeId("")
    session_id: SessionId = SessionId("")
    contact_at: Timestamp | None = None
    """For an adopted session: a time at which the node was certainly in contact with the former owner."""


class IssuedSerial(ApiObject):
    """An issued certificate: its serial number in hexadecimal digits, and its expiry."""

    serial: str
    not_after: Timestamp


class NodeCertificate(ApiObject):
    """State of the node's certificate; the certificate itself is stored on the node."""

    role: NodeRole = NodeRole.WORKER
    state: str = ""
    """``issued``, or ``rotate`` if the node must renew it."""
    not_after: Timestamp = Timestamp("")
    """Expiry of the newest certificate."""
    issuer: str = ""
    """Digest of the public key that signed the newest certificate (``security.trust.issuer_digest``)."""
    serials: tuple[IssuedSerial, ...] = ()
    """Manager certificates that have not expired.  They are revoked when the node is demoted."""
    plane: str = ""
    """The kind under which the node joined: ``docker`` or ``skep`` (``model.networks.data_planes``).

    Empty if the node joined before this field existed.  Until it renews its certificate, its description decides.
    """
    last_not_after: Timestamp = Timestamp("")
    """The latest expiry of all its certificates.  An older certificate may expire last if the lifetime was shortened.
    """


class FailingPath(ApiObject):
    """A failing check from this node to another one, with names at the time of the check."""

    peer: NodeId
    hostname: str = ""
    check: str = ""
    """A ``PathCheck``, or a check of a later version."""
    port: str = ""
    """``4789/udp``"""

    @property
    def summary(self) -> str:
        """``w2 4789/udp (overlay)``"""
        return f"{self.hostname or self.peer} {self.port} ({self.check})"


class CutOff(ApiObject):
    """A failing check because of which a node gets no tasks on the networks that depend on it."""

    check: str
    """A check as in ``FailingPath``."""
    port: str = ""
    peers: tuple[str, ...] = ()
    """Host names of the first few nodes to or from which the check fails."""
    others: int = 0
    """The number of other such nodes."""

    @property
    def networks(self) -> str:
        """Return the networks that need this check, for messages: ``overlay networks``."""
        return "encrypted overlay networks" if self.check == PathCheck.ENCRYPTED else "overlay networks"

    @property
    def summary(self) -> str:
        """``4789/udp fails between this node and w2, w3 and 5 others``"""
        more = f" and {self.others} other{'s' if self.others > 1 else ''}" if self.others else ""
        return f"{self.port} fails between this node and {', '.join(self.peers)}{more}"


class Node(ApiObject):
    """A machine of the cluster.

    The API writes ``spec``.  The session's owner writes ``description``, ``status``, ``silent_*``, and as separate
    parts ``load`` and ``failing_paths``.  A new owner of the session writes ``session``, the CA ``certificate``, the
    leader ``attachments`` and ``cut_off``, and the manager on this node ``manager_status`` and ``peer_roots``. Fields
    after ``manager_status`` are internal and not in API responses, except ``silent_since`` of a node that is down.
    """

    id: NodeId
    version: Version = always(Version())
    created_at: Timestamp = always(ZERO_TIME)
    updated_at: Timestamp = always(ZERO_TIME)
    spec: NodeSpec = always(NodeSpec())
    description: NodeDescription = always(NodeDescription())
    status: NodeStatus = always(NodeStatus())
    load: float | None = None
    """Measured utilization, 0 to 1, rounded as placement needs it, or None if not reported.  Not in Docker's API."""
    manager_status: ManagerStatus | None = None
    session: SessionOwner | None = None
    certificate: NodeCertificate | None = None
    attachments: tuple[NetworkAttachment, ...] = ()
    peer_roots: str = ""
    """For a manager: digest of the roots that its etcd trusts since its last start."""
    silent_since: Timestamp | None = None
    """For a node that is down: time of its last heartbeat, by the clock of the manager that marked it down."""
    silent_together: bool = False
    """For a node that is down: whether other nodes, on any manager, missed their heartbeats at the same time."""
    failing_paths: tuple[FailingPath, ...] = ()
    """The first few failing checks from this node to others, sorted by peer and check."""
    cut_off: tuple[CutOff, ...] = ()
    """Failing checks because of which placement avoids this node, sorted by check.  The remaining nodes all reach each
    other.
    """

    @property
    def shown_name(self) -> str:
        """Name of the node for people: its host name, or its id before it has reported one."""
        return self.description.hostname or self.id

    @property
    def has_joined_as_manager(self) -> bool:
        """Return whether the node is a manager that has finished joining."""
        status = self.manager_status
        return status is not None and status.reachability is not Reachability.UNKNOWN

    @property
    def is_reachable_manager(self) -> bool:
        """Return whether the node is a manager that the leader reaches."""
        status = self.manager_status
        return status is not None and status.reachability is Reachability.REACHABLE


def is_lost(node: Node | None) -> bool:
    """Return whether no further report can be expected from this node: it is down or removed."""
    return node is None or node.status.state is NodeState.DOWN


def takes_tasks(node: Node) -> bool:
    """Return whether the node takes new tasks: it is ready, and neither paused nor drained."""
    return node.status.state is NodeState.READY and node.spec.availability is Availability.ACTIVE


def differ_in_load_alone(one: Node, other: Node) -> bool:
    """Return whether two states of a node differ in their load only, which concerns nothing but placement."""
    return one.load != other.load and replace(one, load=other.load) == other


def plain_message(message: str, silent_since: str = "") -> str:
    """Return the message of a node's status in plain words.

    ``silent_since`` is the RFC 3339 time of its last heartbeat if it is down.
    """
    for text, words in _IN_PLAIN_WORDS.items():
        message = message.replace(text, words)
    # A manager that has taken over a session knows only since when it has heard nothing.
    heard = f"not heard since {silent_since[:10]} {silent_since[11:19]} UTC" if silent_since else ""
    return "; ".join(filter(None, (message, heard)))
