"""Every call of the protocol, with its path, its messages, and its authorization.

Servers and clients use the same entries, so both sides are checked against the same types.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, TypeAlias, TypeVar

from google.protobuf.message import Message

from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as swarm

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)

REQUEST_BYTES_MAX = 64 * 1024
"""Maximum bytes of most requests: a few ids and words."""
DESCRIPTION_BYTES_MAX = 1024 * 1024
"""Maximum bytes of a request that describes a node, with its labels, its networks and the findings on its paths."""
TUNNEL_PIECE_BYTES_MAX = 160 * 1024
"""Maximum bytes of a tunnel message: 64 KiB of data, or the head of a request."""
MESSAGE_BYTES_MAX = 4 * 1024 * 1024
"""Maximum bytes of a message with collected statuses or log lines.  SwarmKit's limit for every message."""


class MethodAccess(Enum):
    """The callers that may make a call, determined by the certificate of the connection."""

    OPEN = auto()
    """Any caller, with or without a certificate, so that a machine can become a node."""
    NODE = auto()
    """Every node of this cluster."""
    MANAGER = auto()
    """Managers of this cluster."""
    MANAGER_OR_UNKNOWN = auto()
    """Managers, and for a few seconds any caller that has a manager's certificate but is missing in the store.

    A manager that joined after the backup from which the store was restored is missing there.  It may read, but its
    messages are not trusted.
    """


@dataclass(frozen=True)
class _Method(Generic[Q, A]):
    path: str
    request: type[Q]
    reply: type[A]
    access: MethodAccess = MethodAccess.NODE
    request_bytes_max: int = REQUEST_BYTES_MAX
    """Maximum request size.  A manager refuses a larger request as soon as it has read the announced length."""


class UnaryMethod(_Method[Q, A]):
    """A call with one request and one reply."""


class ServerStreaming(_Method[Q, A]):
    """A call with one request and any number of replies."""


class ClientStreaming(_Method[Q, A]):
    """A call with any number of requests and one reply."""


class BothStream(_Method[Q, A]):
    """A call with any number of requests and replies, independent of each other."""


Method: TypeAlias = UnaryMethod[Q, A] | ServerStreaming[Q, A] | ClientStreaming[Q, A] | BothStream[Q, A]

_SWARM = "/docker.swarmkit.v1."

GET_ROOT_CA_CERTIFICATE = UnaryMethod(
    f"{_SWARM}CA/GetRootCACertificate",
    swarm.GetRootCACertificateRequest,
    swarm.GetRootCACertificateResponse,
    MethodAccess.OPEN,
)
GET_UNLOCK_KEY = UnaryMethod(
    f"{_SWARM}CA/GetUnlockKey", swarm.GetUnlockKeyRequest, swarm.GetUnlockKeyResponse, MethodAccess.MANAGER
)
ISSUE_NODE_CERTIFICATE = UnaryMethod(
    f"{_SWARM}NodeCA/IssueNodeCertificate",
    swarm.IssueNodeCertificateRequest,
    swarm.IssueNodeCertificateResponse,
    MethodAccess.OPEN,
)
NODE_CERTIFICATE_STATUS = UnaryMethod(
    f"{_SWARM}NodeCA/NodeCertificateStatus",
    swarm.NodeCertificateStatusRequest,
    swarm.NodeCertificateStatusResponse,
    MethodAccess.OPEN,
)
SESSION = ServerStreaming(
    f"{_SWARM}Dispatcher/Session",
    swarm.SessionRequest,
    swarm.SessionMessage,
    request_bytes_max=DESCRIPTION_BYTES_MAX,
)
HEARTBEAT = UnaryMethod(f"{_SWARM}Dispatcher/Heartbeat", swarm.HeartbeatRequest, swarm.HeartbeatResponse)
ASSIGNMENTS = ServerStreaming(
    f"{_SWARM}Dispatcher/Assignments", swarm.AssignmentsRequest, swarm.AssignmentsMessage
)
UPDATE_TASK_STATUS = UnaryMethod(
    f"{_SWARM}Dispatcher/UpdateTaskStatus",
    swarm.UpdateTaskStatusRequest,
    swarm.UpdateTaskStatusResponse,
    request_bytes_max=MESSAGE_BYTES_MAX,
)
UPDATE_VOLUME_STATUS = UnaryMethod(
    f"{_SWARM}Dispatcher/UpdateVolumeStatus",
    swarm.UpdateVolumeStatusRequest,
    swarm.UpdateVolumeStatusResponse,
    request_bytes_max=DESCRIPTION_BYTES_MAX,
)
LISTEN_SUBSCRIPTIONS = ServerStreaming(
    f"{_SWARM}LogBroker/ListenSubscriptions", swarm.ListenSubscriptionsRequest, swarm.SubscriptionMessage
)
PUBLISH_LOGS = ClientStreaming(
    f"{_SWARM}LogBroker/PublishLogs",
    swarm.PublishLogsMessage,
    swarm.PublishLogsResponse,
    request_bytes_max=MESSAGE_BYTES_MAX,
)
ATTACH_NETWORK = UnaryMethod(
    f"{_SWARM}ResourceAllocator/AttachNetwork", swarm.AttachNetworkRequest, swarm.AttachNetworkResponse
)
DETACH_NETWORK = UnaryMethod(
    f"{_SWARM}ResourceAllocator/DetachNetwork", swarm.DetachNetworkRequest, swarm.DetachNetworkResponse
)
HEARTBEATS = BothStream("/skep.v1.NodeLink/Heartbeats", skep.Heartbeat, skep.HeartbeatPeriod)
REVISED_ASSIGNMENTS = ServerStreaming(
    "/skep.v1.NodeLink/Assignments", swarm.AssignmentsRequest, skep.RevisedAssignments
)
SKEP_ISSUE_NODE_CERTIFICATE = UnaryMethod(
    "/skep.v1.NodeCA/IssueNodeCertificate",
    swarm.IssueNodeCertificateRequest,
    swarm.IssueNodeCertificateResponse,
    MethodAccess.OPEN,
)
ADD_MEMBER = UnaryMethod(
    "/skep.v1.Managers/AddMember", skep.AddMemberRequest, skep.AddMemberResponse, MethodAccess.MANAGER
)
RESIGN = UnaryMethod(
    "/skep.v1.Managers/Resign", skep.ResignRequest, skep.ResignResponse, MethodAccess.MANAGER
)
STORE_SPACE = UnaryMethod(
    "/skep.v1.Managers/StoreSpace", skep.StoreSpaceRequest, skep.StoreSpaceResponse, MethodAccess.MANAGER
)
ANNOUNCE = UnaryMethod(
    "/skep.v1.Managers/Announce", skep.AnnounceRequest, skep.AnnounceResponse, MethodAccess.MANAGER
)
PROMOTE_MEMBER = UnaryMethod(
    "/skep.v1.Managers/PromoteMember",
    skep.PromoteMemberRequest,
    skep.PromoteMemberResponse,
    MethodAccess.MANAGER,
)
KEEP_WRAPPING_KEY = UnaryMethod(
    "/skep.v1.Managers/KeepWrappingKey",
    skep.KeepWrappingKeyRequest,
    skep.KeepWrappingKeyResponse,
    MethodAccess.MANAGER,
)
PINGS = BothStream("/skep.v1.ManagerLink/Pings", skep.Ping, skep.Ping, MethodAccess.MANAGER_OR_UNKNOWN)
AWAIT_TABLES = UnaryMethod(
    "/skep.v1.ManagerLink/AwaitTables",
    skep.AwaitTablesRequest,
    skep.AwaitTablesResponse,
    MethodAccess.MANAGER,
)
RELAY_LOGS = ServerStreaming(
    "/skep.v1.ManagerLink/RelayLogs",
    skep.LogRelay,
    skep.RelayedLogs,
    MethodAccess.MANAGER,
    request_bytes_max=MESSAGE_BYTES_MAX,
)
NETWORKS = BothStream(
    "/skep.v1.NodeLink/Networks",
    skep.AppliedTables,
    skep.NetworkTables,
    request_bytes_max=DESCRIPTION_BYTES_MAX,
)
PATHS = BothStream(
    "/skep.v1.NodeLink/Paths", skep.ProbeUpdate, skep.ProbeOrder, request_bytes_max=DESCRIPTION_BYTES_MAX
)
ADDRESSES = BothStream("/skep.v1.NodeLink/Addresses", skep.AddressReport, skep.AddressOrders)
WAKE = UnaryMethod("/skep.v1.NodeLink/Wake", skep.WakeRequest, skep.WakeResponse)
RELAY_DIAGNOSTICS = BothStream(
    "/skep.v1.ManagerLink/RelayExaminations",
    skep.DiagnosticsRelay,
    skep.RelayedDiagnostics,
    MethodAccess.MANAGER,
)
COLLECT_USAGES = ServerStreaming(
    "/skep.v1.ManagerLink/CollectUsages", skep.CollectUsagesRequest, skep.TaskUsages, MethodAccess.MANAGER
)
SIGN_EXTERNALLY = UnaryMethod(
    "/skep.v1.ManagerLink/SignExternally",
    skep.SignExternallyRequest,
    skep.SignExternallyResponse,
    MethodAccess.MANAGER,
)
REPORT_STATUSES = UnaryMethod(
    "/skep.v1.NodeLink/ReportStatuses",
    skep.ReportedStatuses,
    swarm.UpdateTaskStatusResponse,
    request_bytes_max=MESSAGE_BYTES_MAX,
)
DESCRIBE = UnaryMethod(
    "/skep.v1.NodeLink/Describe",
    skep.DescribeRequest,
    skep.DescribeResponse,
    request_bytes_max=DESCRIPTION_BYTES_MAX,
)
RENEW_EXPIRED = UnaryMethod(
    "/skep.v1.NodeCA/RenewExpired", skep.RenewExpiredRequest, skep.RenewExpiredResponse, MethodAccess.OPEN
)
READ = ServerStreaming("/skep.v1.ClusterReads/Read", skep.ReadRequest, skep.ReadPiece)
FIND_IMAGE = UnaryMethod("/skep.v1.ImageDirectory/FindImage", skep.FindImageRequest, skep.FindImageResponse)
CHECK_NODE = UnaryMethod("/skep.v1.ImageDirectory/CheckNode", skep.CheckNodeRequest, skep.CheckNodeResponse)
NEEDED_IMAGES = UnaryMethod(
    "/skep.v1.ImageDirectory/NeededImages", skep.NeededImagesRequest, skep.NeededImagesResponse
)
IMAGE_MANIFEST = UnaryMethod(
    "/skep.v1.Images/Manifest", skep.ImageManifestRequest, skep.ImageManifestResponse
)
IMAGE_BLOB = ServerStreaming("/skep.v1.Images/Blob", skep.ImageBlobRequest, skep.ImageBlobPiece)
TUNNEL_ORDERS = BothStream("/skep.v1.NodeLink/TunnelOrders", skep.TunnelUpdate, skep.TunnelOrder)
TUNNEL = BothStream(
    "/skep.v1.NodeLink/Tunnel",
    skep.TunnelPiece,
    skep.TunnelPiece,
    request_bytes_max=TUNNEL_PIECE_BYTES_MAX,
)
RELAY_TUNNEL = BothStream(
    "/skep.v1.ManagerLink/RelayTunnel",
    skep.TunnelPiece,
    skep.TunnelPiece,
    MethodAccess.MANAGER,
    request_bytes_max=TUNNEL_PIECE_BYTES_MAX,
)
