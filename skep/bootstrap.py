"""Files with which the node process starts its manager process: written by the node, read by the manager at each start.

The module is below both, so that they do not import each other.
"""

from pathlib import Path
from typing import Literal

import msgspec

from skep.errors import FailedPrecondition
from skep.linux.files import replace_file
from skep.model.networks.addresses import host_of, joined, next_port, parted
from skep.model.node import Availability
from skep.model.swarm import DEFAULT_DATA_PATH_PORT, DEFAULT_POOL, DEFAULT_SUBNET_SIZE, SwarmSpec
from skep.model.values.ids import ClusterId, NodeId
from skep.model.values.times import Timestamp
from skep.model.values.unknown import leniently
from skep.paths import Paths

REMOVED = 3
"""Exit code of a manager process whose etcd member was removed by the other managers."""

FUTILE = 4
"""Exit code of a manager process that would fail again in the same way.  Its last error text has the remedy."""

STARVED = 5
"""Exit code of a manager process that lacks a machine resource (files, memory).  A later start may succeed."""


class Bootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a new cluster, from ``POST /swarm/init``."""

    spec: SwarmSpec
    default_addr_pool: tuple[str, ...] = DEFAULT_POOL
    subnet_size: int = DEFAULT_SUBNET_SIZE
    data_path_port: int = DEFAULT_DATA_PATH_PORT
    availability: Availability = Availability.ACTIVE


class ManagerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one manager, stored as JSON below its data directory.

    ``listen_addr`` and ``advertise_addr`` are ``ip:port`` of the gRPC server.
    ``bootstrap`` stays in the file, but is used only while the store is empty.
    """

    data_dir: str
    run_dir: str
    node_id: NodeId
    cluster_id: ClusterId
    listen_addr: str
    advertise_addr: str
    hostname: str
    peer_addr: str = ""
    """``ip:port`` where its etcd listens for other managers.  Empty in files of early versions, which means the port
    after ``listen_addr``'s."""
    bootstrap: Bootstrap | None = None
    managers: tuple[str, ...] = ()
    """``ip:port`` of managers to join.  Empty if this manager creates the cluster."""
    look_at: tuple[str, ...] = ()
    """``ip:port`` of managers from the configuration, used when the known addresses do not respond."""
    store_quota: int = 4 * 1024**3
    """Size limit of etcd's file in bytes.  The default is ``store.space.QUOTA_BYTES``."""
    trace_endpoint: str = ""
    """URL of a trace collector (OTLP over HTTP).  Empty for no traces."""
    etcd_binary: str = ""
    """Path of etcd.  Empty for the etcd that set-up installed, or the first on ``$PATH``."""
    acme_dns_hook: str = ""
    """Path of the program that writes DNS records for certificates.  Empty for none."""

    @property
    def paths(self) -> Paths:
        """The manager's paths on disk."""
        return Paths(Path(self.data_dir), Path(self.run_dir))

    @property
    def peer_listen(self) -> str:
        """``ip:port`` where its etcd listens for the other managers."""
        return self.peer_addr or next_port(self.listen_addr)

    @property
    def peer_advertised(self) -> str:
        """``ip:port`` where the other managers reach its etcd."""
        return joined(host_of(self.advertise_addr), parted(self.peer_listen)[1])


def load(path: Path) -> ManagerConfig:
    """Read a manager's settings.  Raises: FailedPrecondition: missing or damaged, with the next step."""
    try:
        return leniently(path.read_bytes(), ManagerConfig)
    except FileNotFoundError:
        raise FailedPrecondition(f"{path} is missing: this node was not set up as a manager") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FailedPrecondition(
            f"{path} is damaged ({error}): restore it from a backup, or leave the swarm and join again"
        ) from error


def encode(config: ManagerConfig) -> bytes:
    """Return the file's content for ``config``."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """A request to recover this manager as the only one of its cluster (``manager.storage.recovery``), and its
    progress.
    """

    stage: Literal["wanted", "restored"] = "wanted"
    is_bare: bool = False
    """Whether the snapshot is a database file without its hash."""
    lost_at: Timestamp = Timestamp("")
    """When this manager lost contact with a quorum.  Empty if it is unknown, as after a restore from a backup."""


def load_recovery(paths: Paths) -> Recovery | None:
    """Return the pending recovery, or None.  Raises: FailedPrecondition: the file is damaged."""
    try:
        return msgspec.json.decode(paths.recovery.read_bytes(), type=Recovery)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FailedPrecondition(
            f"{paths.recovery} is damaged: run docker swarm init --force-new-cluster or skep restore again"
        ) from error


def save_recovery(paths: Paths, recovery: Recovery) -> None:
    """Write the request.  It replaces an earlier one."""
    replace_file(paths.recovery, msgspec.json.encode(recovery) + b"\n", mode=0o600)
