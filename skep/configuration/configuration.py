"""The complete, valid configuration of one node."""

from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

import msgspec

from skep.errors import SkepError
from skep.model.networks.addresses import joined
from skep.model.permissions.rights import ALL_RIGHTS, Right
from skep.model.service import GenericResource
from skep.model.swarm import DEFAULT_DATA_PATH_PORT
from skep.paths import DEFAULT_DATA, DEFAULT_RUN, Paths


class ConfigurationError(SkepError):
    """Invalid settings.  Each of ``problems`` is a sentence that names the setting's source and the remedy."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class UnixHost(msgspec.Struct, frozen=True):
    """A unix socket on which the API is served."""

    path: Path

    def __str__(self) -> str:
        return f"unix://{self.path}"


class TcpHost(msgspec.Struct, frozen=True):
    """An address where the API is served over TLS to clients whose certificate the configured authority signed."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"tcp://{joined(self.address, self.port)}"


Host = UnixHost | TcpHost


class AddressPool(msgspec.Struct, frozen=True):
    """A range ``base`` that is divided into subnets with a prefix of ``size`` bits for the networks of this node."""

    base: str
    size: int


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting of ``settings.SETTINGS``, with its default."""

    data_dir: Path = DEFAULT_DATA
    run_dir: Path = DEFAULT_RUN
    hosts: tuple[Host, ...] = ()
    """If empty, the API is served on ``skep.sock`` in the run directory."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    dashboard: tuple[str, int] | None = None
    """Address and port where browsers are served over TLS, or None to serve none."""
    dashboard_public: bool = False
    engine_socket: Path | None = None
    """Socket of the Docker Engine that receives requests Skep does not serve, or None to refuse them."""

    listen_addr: str = ""
    peer_addr: str = ""
    """``:port`` or ``ip:port``.  By default ``reserved_ports.default_peer_addr``, or another free port.  Read only when
    the node becomes a manager.
    """
    advertise_addr: str = ""
    data_path_addr: str = ""
    """Address or interface.  ``docker swarm init`` and ``join`` use ``listen_addr``, ``advertise_addr`` and this one by
    default.
    """
    data_path_port: int = DEFAULT_DATA_PATH_PORT
    encryption: str = "auto"
    """The encryption of overlay networks: ``auto``, ``kernel`` or ``wireguard-go``."""
    wireguard_port: int = 0
    """The first of two consecutive UDP ports.  0 means ``data_path_port`` + 10."""
    behind_nat: str = ""
    """Name of the NAT that this node is behind, ``no``, or empty to let managers find out."""
    image_gc_high: int = 85
    image_gc_low: int = 80
    """Disk usage in percent.  Above ``image_gc_high``, the node removes unused pulled images until ``image_gc_low`` is
    reached.
    """
    disk_pressure: int = 95
    """Usage of the data directory's disk in percent at which the node gets no new tasks, or 0 to turn this limit off.
    """
    image_port: int = 0
    """TCP port where other nodes fetch images from this one.  0 chooses 2374, or any free port if 2374 is taken."""

    metrics_addr: tuple[str, int] | None = None
    """Address and port where Prometheus reads by plain HTTP, or None to serve metrics on the API's hosts only."""
    metrics_hosts: tuple[str, ...] = ()
    """DNS names under which ``metrics_addr`` is read, in lower case."""
    trace_endpoint: str = ""
    """URL of a trace collector (OTLP over HTTP), or empty to send no traces."""

    managers: tuple[str, ...] = ()
    """Addresses where the node looks for managers if none of the managers it knows responds."""

    debug: bool = False
    log_format: str = "text"
    labels: Mapping[str, str] = {}
    generic_resources: tuple[GenericResource, ...] = ()

    allow: frozenset[Right] = ALL_RIGHTS
    """Rights over this machine that tasks may have if the cluster allows them too."""
    cdi_spec_dirs: tuple[Path, ...] = (Path("/etc/cdi"), Path("/var/run/cdi"))
    selinux_enabled: bool = False
    """Whether containers get SELinux labels.  Without effect on a machine without SELinux, as in Docker."""

    userns_remap: str = ""
    """User whose subordinate ids the users of containers are on this machine, as ``user_remap.resolve`` takes it.
    Empty to map no users."""
    executor: str = "oci"
    cgroup_parent: str = "skep"
    runtime: str = "auto"
    """OCI runtime of containers that request none: ``runc``, ``crun``, or ``auto``."""
    runc: str = "runc"
    crun: str = "crun"
    conmon: str = "conmon"
    nft: str = "nft"
    etcd_binary: Path | None = None
    """If None, the node searches etcd next to the Python environment, then on ``PATH``."""
    store_quota: int = 4 * 1024**3
    """Largest size of a manager's store file in bytes."""
    acme_dns_hook: Path | None = None
    """Program that a manager runs to write DNS records for certificates (DNS-01), or None."""

    insecure_registries: tuple[str, ...] = ()
    registry_mirrors: tuple[str, ...] = ()
    credential_helpers: Mapping[str, str] = {}
    """The NAME in ``docker-credential-NAME``, by registry."""
    log_driver: str = "json-file"
    log_opts: Mapping[str, str] = {}
    default_address_pools: tuple[AddressPool, ...] = ()

    @property
    def address_pools(self) -> tuple[tuple[IPv4Network | IPv6Network, int], ...]:
        """Return ``default_address_pools`` as networks, each with the prefix length of its subnets."""
        return tuple((ip_network(pool.base), pool.size) for pool in self.default_address_pools)

    @property
    def paths(self) -> Paths:
        return Paths(self.data_dir, self.run_dir)

    @property
    def api_hosts(self) -> tuple[Host, ...]:
        """Return the hosts where the API is served: ``hosts``, or the node's unix socket by default."""
        return self.hosts or (UnixHost(self.paths.api_socket),)
