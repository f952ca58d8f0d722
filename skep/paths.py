"""Where a node keeps what it has on disk: one property per path.

The data directory outlives a reboot, the run directory lies on tmpfs and does not.  Sockets are never below the
data directory: a socket's path has at most 107 bytes.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec

DEFAULT_DATA = Path("/var/lib/skep")
DEFAULT_RUN = Path("/run/skep")
SOCKET_PATH_BYTES_MAX = 107


class Paths(msgspec.Struct, frozen=True):
    """The two directories of one node.  Reading a path creates nothing."""

    data: Path
    run: Path

    # --- data directory ---------------------------------------------------------------------------------------

    @property
    def data_lock(self) -> Path:
        """Held by the node process that uses this data directory."""
        return self.data / "lock"

    @property
    def format(self) -> Path:
        """The number of the layout of the data directory."""
        return self.data / "format"

    @property
    def node_json(self) -> Path:
        """This node as a member of its cluster; absent outside of any."""
        return self.data / "node.json"

    @property
    def certificates(self) -> Path:
        """Directory of the node's certificate and the root certificates."""
        return self.data / "certificates"

    @property
    def node_key(self) -> Path:
        """Private key of the node's certificate."""
        return self.certificates / "swarm-node.key"

    @property
    def tasks(self) -> Path:
        """Directory of the assigned tasks."""
        return self.data / "tasks"

    @property
    def networks(self) -> Path:
        """Directory of what the node has chosen for its networks, and of saved tables."""
        return self.data / "networks"

    @property
    def kept_tables(self) -> Path:
        """The network tables of this node as received last, for the next start."""
        return self.networks / "tables"

    @property
    def images(self) -> Path:
        """Directory of images and layers."""
        return self.data / "images"

    @property
    def containers(self) -> Path:
        """Directory of the containers."""
        return self.data / "containers"

    @property
    def written(self) -> Mapping[str, Path]:
        """Directories that new tasks need space in, by purpose; each may be a file system of its own."""
        return {
            "data": self.data,
            "images": self.images,
            "containers": self.containers,
            "volumes": self.volumes,
        }

    @property
    def processes(self) -> Path:
        """State of tasks that are plain commands (executor process)."""
        return self.data / "processes"

    @property
    def volumes(self) -> Path:
        """Directory of the volumes."""
        return self.data / "volumes"

    @property
    def cluster_volumes(self) -> Path:
        """Directory where cluster volumes are mounted, and of what is known of them."""
        return self.data / "csi"

    @property
    def manager(self) -> Path:
        """State of the manager on this node; absent on a worker."""
        return self.data / "manager"

    @property
    def removed_manager(self) -> Path:
        """What was ``manager`` until the node stopped being one; it is being removed."""
        return self.data / "manager.removed"

    @property
    def manager_config(self) -> Path:
        """What the node process writes for the manager process."""
        return self.manager / "config.json"

    @property
    def manager_keys(self) -> Path:
        """Directory of the manager's secret keys."""
        return self.manager / "keys"

    @property
    def root_ca_key(self) -> Path:
        """Only between init and the first transaction; afterwards the key lies wrapped in the store."""
        return self.manager_keys / "root-ca.key"

    @property
    def wrapping_key(self) -> Path:
        """Opens the data keys that lie wrapped in the store."""
        return self.manager_keys / "wrapping.key"

    @property
    def lock_key(self) -> Path:
        """Exists while autolock is on: encrypts ``locked_files``, and is itself encrypted with the unlock key."""
        return self.manager_keys / "lock.key"

    @property
    def locked_files(self) -> tuple[Path, ...]:
        """What autolock protects."""
        return (self.wrapping_key, self.node_key)

    @property
    def etcd(self) -> Path:
        """Data directory of etcd."""
        return self.manager / "etcd"

    @property
    def joining_mark(self) -> Path:
        """Exists from the admission of this manager until it has its vote; contains why it has none."""
        return self.etcd / "joining"

    @property
    def recovery(self) -> Path:
        """The request to recover the cluster on this manager alone, until it is done."""
        return self.manager / "recovery.json"

    @property
    def recovery_snapshot(self) -> Path:
        """The snapshot from which that starts."""
        return self.manager / "recovery.snapshot"

    @property
    def incarnation(self) -> Path:
        """The incarnation of the cluster that this manager served last, and a later one that it received."""
        return self.manager / "incarnation.json"

    # --- run directory ----------------------------------------------------------------------------------------

    @property
    def csi_sockets(self) -> Path:
        """Where the sockets of CSI drivers are."""
        return self.run / "csi"

    @property
    def features(self) -> Path:
        """Features of this machine, as detected at the start; an orderly stop removes it."""
        return self.run / "features.json"

    @property
    def etcd_version(self) -> Path:
        """The version of this machine's etcd, as it reported last."""
        return self.run / "etcd-version.json"

    @property
    def last_seen(self) -> Path:
        """When a manager last responded to this node."""
        return self.run / "last-heard.json"

    @property
    def api_socket(self) -> Path:
        """Of the node process."""
        return self.run / "skep.sock"

    @property
    def manager_socket(self) -> Path:
        """Where the manager process takes connections from the node process."""
        return self.run / "manager.sock"

    @property
    def handover_socket(self) -> Path:
        """Where the node process passes clients' connections to the manager process."""
        return self.run / "handover.sock"

    @property
    def manager_waiting(self) -> Path:
        """Exists while the manager waits for a quorum and so serves no request."""
        return self.run / "manager.waiting"

    @property
    def store_full(self) -> Path:
        """Exists while the manager's store waits for disk space; contains how much."""
        return self.run / "manager.full"

    @property
    def etcd_socket(self) -> Path:
        """For etcd's clients on this machine."""
        return self.run / "etcd.sock"

    @property
    def net_socket(self) -> Path:
        """For requests to the net process."""
        return self.run / "net.sock"

    @property
    def log_settings(self) -> Path:
        """Log settings of manager and net (``logs.LogSettings``)."""
        return self.run / "logs.json"

    @property
    def net_ports(self) -> Path:
        """The ports that the net process holds, for the one that follows it after a crash."""
        return self.run / "net-ports.json"

    @property
    def tables(self) -> Path:
        """Network tables as the net process reads them, a file per network."""
        return self.run / "tables"

    @property
    def names(self) -> Path:
        """What the net process serves in each container's namespace, for the one that follows it."""
        return self.run / "names"

    @property
    def tunnels(self) -> Path:
        """Where the namespace of the tunnels of encrypted networks is pinned."""
        return self.run / "tunnels"

    @property
    def wireguard_keys(self) -> Path:
        """The node's own WireGuard key pairs: on tmpfs, root's."""
        return self.run / "wireguard.keys"

    @property
    def relays(self) -> Path:
        """The published ports that the net process serves itself."""
        return self.run / "ingress" / "relays.json"

    @property
    def netns(self) -> Path:
        """Where network namespaces are pinned."""
        return self.run / "netns"

    @property
    def overlays(self) -> Path:
        """The namespaces of overlay networks; containers' are in ``netns``."""
        return self.run / "overlays"

    @property
    def probes(self) -> Path:
        """The namespace of the probes between nodes."""
        return self.run / "probes"

    @property
    def measured_paths(self) -> Path:
        """Results of the probes, for the next process."""
        return self.run / "paths.msgpack"

    @property
    def runc(self) -> Path:
        """State directory of runc."""
        return self.run / "runc"

    @property
    def bundles(self) -> Path:
        """What runc and conmon need of running containers."""
        return self.run / "bundles"

    @property
    def secrets(self) -> Path:
        """Secrets of running tasks: on tmpfs, so that no reboot finds them."""
        return self.run / "secrets"

    @property
    def tls(self) -> Path:
        """Directory of the certificates that etcd reads."""
        return self.run / "tls"

    @property
    def open_lock_key(self) -> Path:
        """The lock key in clear: on tmpfs, while the node is unlocked."""
        return self.run / "lock.key"

    def pid_file(self, process: str) -> Path:
        """Pid and start time of a detached process: ``manager`` or ``net``."""
        return self.run / f"{process}.pid"

    def last_words(self, process: str) -> Path:
        """Why a detached process ended, in a sentence, if it could write it."""
        return self.run / f"{process}.end"

    def lock_file(self, process: str) -> Path:
        """Held by a detached process while it runs."""
        return self.run / f"{process}.lock"
