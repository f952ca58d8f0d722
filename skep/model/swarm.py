"""The cluster itself."""

from collections.abc import Mapping
from typing import ClassVar, Final

import msgspec

from skep.model.options.freezes import ChangeFreeze, MaintenanceWindow
from skep.model.values.encoding import ApiObject, GoInt, Uint32, Uint64, always
from skep.model.values.ids import ClusterId, NodeId
from skep.model.values.meta import Driver, TLSInfo, Version
from skep.model.values.times import SECOND_NS, ZERO_TIME, Nanoseconds, Timestamp

DEFAULT_POOL: Final = ("10.0.0.0/8",)
DEFAULT_SUBNET_SIZE: Final = 24
"""Source: the default of ``docker swarm init --default-addr-pool-mask-length``."""
DEFAULT_DATA_PATH_PORT: Final = 4789
"""Default UDP port of VXLAN, as in Docker."""
RENEW_WINDOW_LABEL = "skep.renew-window"
"""Cluster label with the time after its expiry in which a node's certificate may be renewed, as a Go duration.  ``0``
means never."""


class OrchestrationConfig(ApiObject):
    """Orchestration settings.

    ``task_history_retention_limit``: ended tasks kept per slot (``manager.orchestrator.reaper``).  A negative limit
    keeps all.
    """

    task_history_retention_limit: int | None = None


class RaftConfig(ApiObject):
    """Kept for clients that read it; etcd's timers are set in ``store/etcd/process/flags.py``."""

    snapshot_interval: Uint64 = 0
    keep_old_snapshots: Uint64 | None = None
    log_entries_for_slow_followers: Uint64 = 0
    election_tick: GoInt = always(0)
    heartbeat_tick: GoInt = always(0)


class DispatcherConfig(ApiObject):
    """Dispatcher settings.  ``heartbeat_period`` 0 means the default, 5 s."""

    heartbeat_period: Nanoseconds = 0


class ExternalCA(ApiObject):
    """A certificate authority outside the cluster, called by cfssl's protocol (``security.external``).

    ``ca_cert``: the root (PEM) with whose key it signs, or empty for the cluster's present root.
    """

    protocol: str = always("")
    url: str = always("")
    options: Mapping[str, str] = {}
    ca_cert: str = always("")


class CAConfig(ApiObject):
    """Settings of the certificate authority.  ``signing_ca_key`` is accepted, but neither stored here nor shown."""

    node_cert_expiry: Nanoseconds = 0
    external_cas: tuple[ExternalCA, ...] = msgspec.field(name="ExternalCAs", default=())
    signing_ca_cert: str = ""
    signing_ca_key: str = ""
    force_rotate: Uint64 = 0


class TaskDefaults(ApiObject):
    """Defaults for tasks.  ``log_driver``: log driver of services without one in their spec."""

    log_driver: Driver | None = None


class EncryptionConfig(ApiObject):
    """Encryption settings.  ``auto_lock_managers``: managers need the unlock key after a restart."""

    auto_lock_managers: bool = always(False)


class SwarmSpec(ApiObject):
    """The user's settings of the cluster."""

    __go_name__: ClassVar[str | None] = "swarm.Spec"

    name: str = ""
    labels: Mapping[str, str] = always({})
    orchestration: OrchestrationConfig = always(OrchestrationConfig())
    raft: RaftConfig = always(RaftConfig())
    dispatcher: DispatcherConfig = always(DispatcherConfig())
    ca_config: CAConfig = always(CAConfig())
    task_defaults: TaskDefaults = always(TaskDefaults())
    encryption_config: EncryptionConfig = always(EncryptionConfig())


class InitRequest(ApiObject):
    """Body of ``POST /swarm/init``.  ``availability`` is a string until it is validated (case-insensitive)."""

    listen_addr: str = ""
    advertise_addr: str = ""
    data_path_addr: str = ""
    data_path_port: Uint32 = 0
    force_new_cluster: bool = False
    spec: SwarmSpec = always(SwarmSpec())
    auto_lock_managers: bool = False
    availability: str = ""
    default_addr_pool: tuple[str, ...] = ()
    subnet_size: Uint32 = 0


class JoinRequest(ApiObject):
    """Body of ``POST /swarm/join``."""

    listen_addr: str = ""
    advertise_addr: str = ""
    data_path_addr: str = ""
    remote_addrs: tuple[str, ...] = ()
    join_token: str = ""
    availability: str = ""


class UnlockRequest(ApiObject):
    """Body of ``POST /swarm/unlock``, and response of ``GET /swarm/unlockkey``."""

    unlock_key: str = always("")


class JoinTokens(ApiObject):
    """``SWMTKN-1-<digest of the root>-<secret>``, one per role."""

    worker: str = always("")
    manager: str = always("")


class RootRotation(ApiObject):
    """The root to which a cluster rotates (PEM); its key is a ``Payload``."""

    root: str
    cross_signed: str
    """The new root, cross-signed by the old one: sent with every certificate until all nodes have a new one."""


FROZEN: Final = "replacement of tasks is frozen"
"""Words in a node's status message, and in the errors of its tasks, while managers replace no tasks of lost nodes.

The nodes' ``/info`` recognizes the reason by them.
"""


class Freeze(ApiObject):
    """Disruption mode: task replacement is suspended, because too many nodes failed at once."""

    since: Timestamp
    nodes: tuple[NodeId, ...] = ()
    """The nodes that are down since then."""
    ready_before: int = 0
    """Number of nodes that were ready a minute before."""
    down_before: Mapping[NodeId, Timestamp] = {}
    """Time of the last heartbeat of each node that was down before.  Other nodes failed with them or later."""

    def includes(self, node_id: NodeId, silent_since: Timestamp | None) -> bool:
        """Return whether a node that is down failed with the others or during the freeze."""
        return self.down_before.get(node_id) != (silent_since or "")

    @property
    def cause(self) -> str:
        """Return how many nodes went down."""
        return f"{len(self.nodes)} of {self.ready_before} nodes went down at once"


class Swarm(ApiObject):
    """The cluster.

    The API writes ``spec``.  The CA writes ``join_tokens``, ``tls_info``, ``root_rotation_in_progress`` and
    ``rotation``.  The leader writes ``freeze``, which the API may end.  The API writes ``change_freezes``,
    ``window`` and ``stack_windows``, and the leader ends freezes that are over, and opens and closes windows.  The init
    of the cluster writes all other fields.

    There is exactly one object, whose id is the cluster's.  While the root is rotated, ``tls_info`` trusts the old root
    and names the new one as issuer.  API responses do not have ``rotation``, ``freeze``,
    ``change_freezes``, ``window`` and ``stack_windows``.
    """

    id: ClusterId
    version: Version = always(Version())
    created_at: Timestamp = always(ZERO_TIME)
    updated_at: Timestamp = always(ZERO_TIME)
    spec: SwarmSpec = always(SwarmSpec())
    tls_info: TLSInfo = always(TLSInfo())
    root_rotation_in_progress: bool = always(False)
    default_addr_pool: tuple[str, ...] = always(DEFAULT_POOL)
    subnet_size: Uint32 = always(DEFAULT_SUBNET_SIZE)
    data_path_port: Uint32 = always(DEFAULT_DATA_PATH_PORT)
    join_tokens: JoinTokens = always(JoinTokens())
    rotation: RootRotation | None = None
    freeze: Freeze | None = None
    change_freezes: Mapping[str, ChangeFreeze] = {}
    """Freezes in force by their scope, which is a stack, or empty for the cluster."""
    window: MaintenanceWindow | None = None
    stack_windows: Mapping[str, MaintenanceWindow] = {}
    """Maintenance windows of stacks by their stack."""
    damage: str = ""
    """The parts that cannot be read; in responses only, not in Docker's API."""


DEFAULT_SWARM_SPEC = SwarmSpec(
    name="default",
    orchestration=OrchestrationConfig(task_history_retention_limit=5),
    raft=RaftConfig(
        snapshot_interval=10000,
        keep_old_snapshots=0,
        log_entries_for_slow_followers=500,
        election_tick=10,
        heartbeat_tick=1,
    ),
    dispatcher=DispatcherConfig(heartbeat_period=1 * SECOND_NS),
    ca_config=CAConfig(node_cert_expiry=90 * 24 * 3600 * SECOND_NS),
)
