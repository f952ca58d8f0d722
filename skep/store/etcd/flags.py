"""The command line of a member.  Pure; one table per minor version of etcd."""

from pathlib import Path

import msgspec

MAX_OPERATIONS = 128
MAX_REQUEST_BYTES = 1_572_864
QUOTA_BYTES = 4 * 1024**3
HISTORY_REVISIONS = 20_000

SOLO_TIMERS_MS = (20, 100)
"""Heartbeat and election of a single voter: nobody can be late, and the election is what users wait for."""

TIMERS_MS = (100, 500)

SOLO_SNAPSHOT_COUNT = 1000
SNAPSHOT_COUNT = 10_000

SOLO_MEMORY_LIMIT = "64MiB"
"""For Go's collector.  A small raft log and this keep a single member's memory at a quarter."""

MANAGER_NAME = "swarm-manager"
"""The DNS name that certificates of managers, and no others, carry."""


class PeerFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Certificate, key and trusted roots for the connections between managers.

    The certificate must be good for both sides of a connection and name ``swarm-manager``.
    """

    certificate: Path
    key: Path
    roots: Path


class MemberSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One member.

    ``name``: the node's id, by which other members know it; ``directory``: 0700, its data and our files beside
    them; ``peer_listen``: ``ip:port``; ``cluster_token``: the cluster's id; ``is_solo``: it is the only voter.
    ``ready_s``: a single member that is not ready by then never will be.  ``is_fsync_off``: for tests.
    """

    name: str
    directory: Path
    socket: Path
    peer_listen: str
    peer_files: PeerFiles
    cluster_token: str
    is_solo: bool = True
    ready_s: float = 30.0
    is_fsync_off: bool = False
    is_debug: bool = False

    @property
    def data(self) -> Path:
        """etcd's own directory."""
        return self.directory / "data"

    @property
    def peer_url(self) -> str:
        """Where other members reach it: by name, so that addresses may change."""
        return f"https://{self.name}:{self.peer_listen.rpartition(':')[2]}"


def arguments(settings: MemberSettings, version: tuple[int, int, int]) -> list[str]:
    """etcd's arguments for a member that is alone in its cluster when it starts for the first time."""
    heartbeat_ms, election_ms = SOLO_TIMERS_MS if settings.is_solo else TIMERS_MS
    files = settings.peer_files
    flags = {
        "name": settings.name,
        "data-dir": settings.data,
        "listen-client-urls": f"unix://{settings.socket}",
        # Nothing dials it, and a path is refused here.
        "advertise-client-urls": f"unix://{settings.name}:1",
        "listen-peer-urls": f"https://{settings.peer_listen}",
        "initial-advertise-peer-urls": settings.peer_url,
        "initial-cluster": f"{settings.name}={settings.peer_url}",
        "initial-cluster-state": "new",
        "initial-cluster-token": settings.cluster_token,
        "peer-cert-file": files.certificate,
        "peer-key-file": files.key,
        "peer-trusted-ca-file": files.roots,
        "peer-client-cert-auth": "true",
        "peer-cert-allowed-hostname": MANAGER_NAME,
        "heartbeat-interval": heartbeat_ms,
        "election-timeout": election_ms,
        # Skep guards the quorum itself; etcd's check refuses joins while any manager is down.
        "strict-reconfig-check": "false",
        "quota-backend-bytes": QUOTA_BYTES,
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
    if settings.is_fsync_off:
        flags["unsafe-no-fsync"] = "true"
    return [f"--{name}={value}" for name, value in flags.items()]


def environment(settings: MemberSettings) -> dict[str, str]:
    """The whole environment of the process: nothing is inherited, since etcd takes ETCD_... for flags."""
    return {"GOMEMLIMIT": SOLO_MEMORY_LIMIT} if settings.is_solo else {}


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
