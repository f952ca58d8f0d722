"""The configuration of one node, complete and valid."""

from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

import msgspec

from skep.errors import SkepError
from skep.model.addresses import joined
from skep.model.rights import ALL_RIGHTS, Right
from skep.model.service import GenericResource
from skep.model.swarm import DEFAULT_DATA_PATH_PORT
from skep.paths import DEFAULT_DATA, DEFAULT_RUN, Paths


class ConfigurationError(SkepError):
    """Invalid settings.  ``problems``: one sentence each, naming the setting's source and what to do."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class UnixHost(msgspec.Struct, frozen=True):
    """Serve the API on a unix socket."""

    path: Path

    def __str__(self) -> str:
        return f"unix://{self.path}"


class TcpHost(msgspec.Struct, frozen=True):
    """Serve the API over TLS to clients whose certificate the configured authority signed."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"tcp://{joined(self.address, self.port)}"


Host = UnixHost | TcpHost


class AddressPool(msgspec.Struct, frozen=True):
    """Subnets of ``size`` bits out of ``base`` for the networks of this node."""

    base: str
    size: int


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting of ``settings.SETTINGS``, with its default."""

    data_dir: Path = DEFAULT_DATA
    run_dir: Path = DEFAULT_RUN
    hosts: tuple[Host, ...] = ()
    """Empty: ``skep.sock`` in the run directory."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    dashboard: tuple[str, int] | None = None
    """Where browsers are served by TLS; None: nowhere."""
    dashboard_public: bool = False
    engine_socket: Path | None = None
    """The Docker Engine that gets what is not ours; None: such requests are refused."""

    listen_addr: str = ""
    peer_addr: str = ""
    """``:port`` or ``ip:port``; empty: ``reserved_ports.default_peer_addr``, or another one that is free.  It counts
    when a manager is made."""
    advertise_addr: str = ""
    data_path_addr: str = ""
    """Address or interface; these, but for ``peer_addr``, are what ``docker swarm init`` and ``join`` fall back to."""
    data_path_port: int = DEFAULT_DATA_PATH_PORT
    encryption: str = "auto"
    """What encrypts overlay networks: ``auto``, ``kernel`` or ``wireguard-go``."""
    wireguard_port: int = 0
    """UDP; the next one is used, too.  0: ten above the data path's."""
    image_gc_high: int = 85
    image_gc_low: int = 80
    """Percent of the images' disk: above the one, unused images that were fetched are removed down to the other."""
    disk_pressure: int = 95
    """Percent of the node's own disk from which on it gets no new tasks; 0: it always does."""
    image_port: int = 0
    """TCP, for other nodes that fetch images from this one.  0: 2374, or any free one if that is taken."""

    metrics_addr: tuple[str, int] | None = None
    """Address and port where Prometheus reads by plain HTTP, or None to serve metrics on the API's hosts only."""
    metrics_hosts: tuple[str, ...] = ()
    """DNS names under which ``metrics_addr`` is read, in lower case."""
    trace_endpoint: str = ""
    """URL of a collector of traces (OTLP over HTTP); empty: none."""

    managers: tuple[str, ...] = ()
    """Where managers may be found that are not where they were."""

    debug: bool = False
    log_format: str = "text"
    labels: Mapping[str, str] = {}
    generic_resources: tuple[GenericResource, ...] = ()

    allow: frozenset[Right] = ALL_RIGHTS
    """Rights over this machine that tasks may have, where the cluster allows them, too."""
    cdi_spec_dirs: tuple[Path, ...] = (Path("/etc/cdi"), Path("/var/run/cdi"))

    executor: str = "oci"
    cgroup_parent: str = "skep"
    runc: str = "runc"
    conmon: str = "conmon"
    nft: str = "nft"
    etcd_binary: Path | None = None
    """None: looked for beside the Python environment, then on the path."""
    store_quota: int = 4 * 1024**3
    """Bytes that the file of a manager's store may have."""

    insecure_registries: tuple[str, ...] = ()
    registry_mirrors: tuple[str, ...] = ()
    credential_helpers: Mapping[str, str] = {}
    """Registry -> NAME of the program ``docker-credential-NAME``."""
    log_driver: str = "json-file"
    log_opts: Mapping[str, str] = {}
    default_address_pools: tuple[AddressPool, ...] = ()

    @property
    def address_pools(self) -> tuple[tuple[IPv4Network | IPv6Network, int], ...]:
        """``default_address_pools`` as networks, each with the prefix length of its subnets."""
        return tuple((ip_network(pool.base), pool.size) for pool in self.default_address_pools)

    @property
    def paths(self) -> Paths:
        return Paths(self.data_dir, self.run_dir)

    @property
    def api_hosts(self) -> tuple[Host, ...]:
        """Where the API is served: ``hosts``, by default the node's unix socket."""
        return self.hosts or (UnixHost(self.paths.api_socket),)
