"""The command line of a member, with one table for each minor version of etcd.  Pure."""

from pathlib import Path

import msgspec

from skep.model.networks.addresses import parted
from skep.security.tls import MANAGER_NAME
from skep.store.etcd.peers import HOSTS_FILE, EtcdPeer, peer_url
from skep.store.space import QUOTA_BYTES

MAX_OPERATIONS = 1200
"""Maximum compares or writes of an entry, including nested ones.  A member checks this for its own manager's requests
only.
"""

MAX_REQUEST_BYTES = 1_572_864
"""Maximum request size, etcd's default of 1.5 MiB."""
HISTORY_REVISIONS = 20_000
"""Revisions of history that etcd keeps."""

TIMERS_MS = (100, 500)
"""Heartbeat and election timeout among several members."""

SOLO_TIMERS_MS = (1000, 5000)
"""The same for a single member, whose ticks serve nothing: 0.2 % of a processor less.

It does not wait for an election timeout (``campaign``), and restarts with the timers of several before another member
is added.
"""

SEALED_OFF_TIMERS_MS = (20, 100)
"""Heartbeat and election timeout of a member to which ``campaign`` cannot connect."""

SOLO_SNAPSHOT_COUNT = 1000
"""Raft entries between two snapshots of a single member.  They are in memory, and no other member needs them."""
SNAPSHOT_COUNT = 10_000
"""Raft entries between two snapshots of one of several members."""

SOLO_HEAP_GROWTH = "50"
"""GOGC: growth of the heap in percent until the next garbage collection.

With a small raft log it keeps a single member's memory small.  A limit in bytes would cause constant collections once
the keys alone exceed it."""


class PeerFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Certificate, key and trusted roots for the connections between managers.

    The certificate must be good for both sides of a connection and name ``swarm-manager``.
    """

    certificate: Path
    key: Path
    roots: Path
    revoked: Path | None = None
    """A certificate revocation list.  The file must exist, and is read at each handshake."""


class MemberSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one member.

    Attributes:
        name: The node's id, its name for other members.
        directory: Directory of mode 0700 with its data and Skep's files.
        peer_listen: ``ip:port`` for other members.
        cluster_token: The cluster's id.
        is_solo: Whether it is the only voter.
        joins: All members of the cluster that it joins at its first start, including itself.  Empty for a new cluster.
        has_hosts: Whether it resolves its peers with its own hosts file, which is in its directory.
        ready_s: Seconds after which a single member that is not ready has failed.
        timers_ms: Heartbeat and election timeout among several members.
        solo_timers_ms: The same for a single member.
        is_fsync_off: For tests.
    """

    name: str
    directory: Path
    socket: Path
    peer_listen: str
    peer_files: PeerFiles
    cluster_token: str
    is_solo: bool = True
    joins: tuple[EtcdPeer, ...] = ()
    has_hosts: bool = False
    quota_bytes: int = QUOTA_BYTES
    ready_s: float = 30.0
    timers_ms: tuple[int, int] = TIMERS_MS
    solo_timers_ms: tuple[int, int] = SOLO_TIMERS_MS
    is_fsync_off: bool = False
    is_debug: bool = False
    is_sealed_off: bool = False
    """Whether it is a temporary copy in its own network namespace.  It is not reachable, and treats its whole log as
    committed.

    Used for a snapshot of a member that has lost its peers.
    """

    @property
    def data(self) -> Path:
        """etcd's own directory."""
        return self.directory / "data"

    @property
    def peer_port(self) -> int:
        """The port for other members."""
        return int(parted(self.peer_listen)[1])

    @property
    def peer_url(self) -> str:
        """The URL for other members.  It contains the member's name, so that its address may change."""
        return peer_url(self.name, self.peer_port)

    @property
    def hosts(self) -> Path | None:
        """The file that is mounted on ``/etc/hosts`` in the member's mount namespace, or None."""
        return self.directory / HOSTS_FILE if self.has_hosts else None


def arguments(settings: MemberSettings, version: tuple[int, int, int]) -> list[str]:
    """Return etcd's arguments.  ``initial-...`` are used at the first start only."""
    heartbeat_ms, election_ms = _timers_ms(settings)
    files = settings.peer_files
    flags = {
        "name": settings.name,
        "data-dir": settings.data,
        "listen-client-urls": f"unix://{settings.socket}",
        # Required, but no client connects to it. etcd does not accept a path here.
        "advertise-client-urls": f"unix://{settings.name}:1",
        "listen-peer-urls": f"https://{settings.peer_listen}",
        "initial-advertise-peer-urls": settings.peer_url,
        "initial-cluster": _initial_cluster(settings),
        "initial-cluster-state": "existing" if settings.joins else "new",
        "initial-cluster-token": settings.cluster_token,
        "peer-cert-file": files.certificate,
        "peer-key-file": files.key,
        "peer-trusted-ca-file": files.roots,
        "peer-client-cert-auth": "true",
        "peer-cert-allowed-hostname": MANAGER_NAME,
        "heartbeat-interval": heartbeat_ms,
        "election-timeout": election_ms,
        # Skep checks the quorum itself.  etcd's check refuses joins while any manager is down.
        "strict-reconfig-check": "false",
        "quota-backend-bytes": settings.quota_bytes,
        "auto-compaction-mode": "revision",
        "auto-compaction-retention": HISTORY_REVISIONS,
        "snapshot-count": SOLO_SNAPSHOT_COUNT if settings.is_solo else SNAPSHOT_COUNT,
        "max-txn-ops": MAX_OPERATIONS,
        "max-request-bytes": MAX_REQUEST_BYTES,
        "enable-grpc-gateway": "false",
        "logger": "zap",
        "log-level": "info" if settings.is_debug else "warn",
        "log-outputs": "stderr",
        **_by_minor(version[1]),
    }
    if files.revoked is not None:
        flags["peer-crl-file"] = files.revoked
    if settings.is_sealed_off:
        flags |= {"force-new-cluster": "true", "listen-peer-urls": "https://0.0.0.0:2380"}
    if settings.is_fsync_off:
        flags["unsafe-no-fsync"] = "true"
    return [f"--{name}={value}" for name, value in flags.items()]


def _timers_ms(settings: MemberSettings) -> tuple[int, int]:
    if settings.is_sealed_off:
        return SEALED_OFF_TIMERS_MS
    return settings.solo_timers_ms if settings.is_solo else settings.timers_ms


def _initial_cluster(settings: MemberSettings) -> str:
    members = {peer.name: peer.url for peer in settings.joins} | {settings.name: settings.peer_url}
    return ",".join(f"{name}={url}" for name, url in sorted(members.items()))


def environment(settings: MemberSettings) -> dict[str, str]:
    """Return the whole environment of the process.  Nothing is inherited, since etcd reads ETCD_... variables as flags.

    Go's own resolver re-reads the hosts file when it changes.
    """
    resolver = {"GODEBUG": "netdns=go"} if settings.has_hosts else {}
    return ({"GOGC": SOLO_HEAP_GROWTH} if settings.is_solo else {}) | resolver


def _by_minor(minor: int) -> dict[str, str]:
    if minor == 5:
        return {
            "experimental-peer-skip-client-san-verification": "true",
            "experimental-initial-corrupt-check": "true",
            "experimental-compact-hash-check-enabled": "true",
        }
    return {
        "peer-skip-client-san-verification": "true",
        "feature-gates": "InitialCorruptCheck=true,CompactHashCheck=true",
    }
