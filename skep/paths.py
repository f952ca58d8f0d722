"""A node's paths on disk, one property per path.

The data directory survives a reboot, the run directory is on tmpfs and does not.  Sockets are never below the data
directory, because a socket's path has at most 107 bytes.
"""

import stat
from collections.abc import Mapping
from pathlib import Path

import msgspec

DEFAULT_DATA = Path("/var/lib/skep")
DEFAULT_RUN = Path("/run/skep")
SOCKET_PATH_BYTES_MAX = 107
"""Source: sun_path of sockaddr_un, without the byte that ends it."""


class Paths(msgspec.Struct, frozen=True):
    """The two directories of one node.  Reading a path creates no file."""

    data: Path
    run: Path

    # --- data directory ---------------------------------------------------------------------------------------

    @property
    def data_lock(self) -> Path:
        """Lock held by the node process that uses this data directory."""
        return self.data / "lock"

    @property
    def format(self) -> Path:
        """Layout version of the data directory."""
        return self.data / "format"

    @property
    def node_json(self) -> Path:
        """This node's cluster membership.  Missing outside of clusters."""
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
        """Directory of the node's choices for its networks, and of saved tables."""
        return self.data / "networks"

    @property
    def kept_tables(self) -> Path:
        """Last received network tables of this node, for the next start."""
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
        """Directories that new tasks need space in, by purpose.  Each may be a separate file system."""
        return {
            "data": self.data,
            "images": self.images,
            "containers": self.containers,
            "volumes": self.volumes,
        }

    @property
    def processes(self) -> Path:
        """State of tasks that are plain commands (for the ``process`` executor)."""
        return self.data / "processes"

    @property
    def volumes(self) -> Path:
        """Directory of the volumes."""
        return self.data / "volumes"

    @property
    def cluster_volumes(self) -> Path:
        """Directory of mounted cluster volumes, and of their state."""
        return self.data / "csi"

    @property
    def manager(self) -> Path:
        """State of the manager on this node.  Missing on a worker."""
        return self.data / "manager"

    @property
    def removed_manager(self) -> Path:
        """The former ``manager`` directory of a demoted node, during its removal."""
        return self.data / "manager.removed"

    @property
    def manager_config(self) -> Path:
        """Settings that the node process writes for the manager process."""
        return self.manager / "config.json"

    @property
    def manager_keys(self) -> Path:
        """Directory of the manager's secret keys."""
        return self.manager / "keys"

    @property
    def root_ca_key(self) -> Path:
        """The root CA key between init and the first transaction.  Afterwards the key is wrapped in the store."""
        return self.manager_keys / "root-ca.key"

    @property
    def wrapping_key(self) -> Path:
        """Key that decrypts the data keys wrapped in the store."""
        return self.manager_keys / "wrapping.key"

    @property
    def lock_key(self) -> Path:
        """Exists while autolock is on.  Encrypts ``locked_files``, and is itself encrypted with the unlock key."""
        return self.manager_keys / "lock.key"

    @property
    def locked_files(self) -> tuple[Path, ...]:
        """Files that autolock protects."""
        return (self.wrapping_key, self.node_key)

    @property
    def etcd(self) -> Path:
        """Data directory of etcd."""
        return self.manager / "etcd"

    @property
    def joining_mark(self) -> Path:
        """Exists from this manager's admission until it is a voter.  Contains the reason why it is not."""
        return self.etcd / "joining"

    @property
    def recovery(self) -> Path:
        """The request to recover the cluster on this manager alone, until it is done."""
        return self.manager / "recovery.json"

    @property
    def recovery_snapshot(self) -> Path:
        """The snapshot from which the recovery starts."""
        return self.manager / "recovery.snapshot"

    @property
    def incarnation(self) -> Path:
        """The incarnation of the cluster that this manager served last, and a later incarnation that it received."""
        return self.manager / "incarnation.json"

    # --- run directory ----------------------------------------------------------------------------------------

    @property
    def csi_sockets(self) -> Path:
        """Directory of the CSI drivers' sockets."""
        return self.run / "csi"

    @property
    def features(self) -> Path:
        """Features of this machine, as detected at the start.  An orderly stop removes it."""
        return self.run / "features.json"

    @property
    def etcd_version(self) -> Path:
        """Last reported version of this machine's etcd."""
        return self.run / "etcd-version.json"

    @property
    def last_seen(self) -> Path:
        """Time at which a manager last responded to this node."""
        return self.run / "last-heard.json"

    @property
    def api_socket(self) -> Path:
        """API socket of the node process."""
        return self.run / "skep.sock"

    @property
    def manager_socket(self) -> Path:
        """Socket on which the manager process accepts connections from the node process."""
        return self.run / "manager.sock"

    @property
    def handover_socket(self) -> Path:
        """Socket through which the node process passes clients' connections to the manager process."""
        return self.run / "handover.sock"

    @property
    def manager_waiting(self) -> Path:
        """Exists while the manager waits for a quorum and therefore serves no requests."""
        return self.run / "manager.waiting"

    @property
    def store_full(self) -> Path:
        """Exists while the manager's store waits for disk space.  Contains the required amount."""
        return self.run / "manager.full"

    @property
    def etcd_socket(self) -> Path:
        """Socket for etcd's clients on this machine."""
        return self.run / "etcd.sock"

    @property
    def net_socket(self) -> Path:
        """Socket for requests to the net process."""
        return self.run / "net.sock"

    @property
    def log_settings(self) -> Path:
        """Log settings of manager and net (``logs.LogSettings``)."""
        return self.run / "logs.json"

    @property
    def net_ports(self) -> Path:
        """Ports held by the net process, for its successor after a crash."""
        return self.run / "net-ports.json"

    @property
    def tables(self) -> Path:
        """Network tables for the net process, one file per network."""
        return self.run / "tables"

    @property
    def names(self) -> Path:
        """Names that the net process serves in each container's namespace, for its successor."""
        return self.run / "names"

    @property
    def tunnels(self) -> Path:
        """Directory where the namespace of encrypted networks' tunnels is pinned."""
        return self.run / "tunnels"

    @property
    def wireguard_keys(self) -> Path:
        """The node's own WireGuard key pairs, on tmpfs and only for root."""
        return self.run / "wireguard.keys"

    @property
    def nat_key(self) -> Path:
        """The node's own WireGuard key for tunnels through NAT, on tmpfs and only for root."""
        return self.run / "nat.key"

    @property
    def relays(self) -> Path:
        """The published ports that the net process serves itself."""
        return self.run / "ingress" / "relays.json"

    @property
    def netns(self) -> Path:
        """Directory where network namespaces are pinned."""
        return self.run / "netns"

    @property
    def overlays(self) -> Path:
        """Namespaces of overlay networks.  Containers' namespaces are in ``netns``."""
        return self.run / "overlays"

    @property
    def probes(self) -> Path:
        """Namespace of the probes between nodes."""
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
        """Files that runc and conmon need for running containers."""
        return self.run / "bundles"

    @property
    def secrets(self) -> Path:
        """Secrets of running tasks, on tmpfs, so that they do not survive a reboot."""
        return self.run / "secrets"

    @property
    def tls(self) -> Path:
        """Directory of the certificates that etcd reads."""
        return self.run / "tls"

    @property
    def open_lock_key(self) -> Path:
        """The unencrypted lock key, on tmpfs, while the node is unlocked."""
        return self.run / "lock.key"

    @property
    def keys_guard(self) -> Path:
        """Locked by the process that replaces ``locked_files`` or the node's certificate."""
        return self.run / "keys.guard"

    def pid_file(self, process: str) -> Path:
        """Return the file with pid and start time of a detached process: ``manager`` or ``net``."""
        return self.run / f"{process}.pid"

    def last_words(self, process: str) -> Path:
        """Return the file with a sentence about why a detached process ended, if it could write it."""
        return self.run / f"{process}.end"

    def lock_file(self, process: str) -> Path:
        """Return the lock file that a detached process holds while it runs."""
        return self.run / f"{process}.lock"


def why_open_to_others(program: Path) -> str:
    """Return why others than root may replace the program at an absolute path, with the next step, or an empty text.

    In a directory like ``/tmp``, others can replace only what belongs to them.  Links count, because
    their targets are not checked.  Raises: OSError.
    """
    for part in (program, *program.parents):
        found = part.lstat()
        is_sticky = stat.S_ISDIR(found.st_mode) and bool(found.st_mode & stat.S_ISVTX)
        is_open = bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)) and not is_sticky
        if found.st_uid != 0 or is_open or stat.S_ISLNK(found.st_mode):
            return (
                f"others than root may change {part}: "
                "let it belong to root, and remove write permissions of others and links"
            )
    return ""
