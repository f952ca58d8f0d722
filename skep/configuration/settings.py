"""Every setting once: its names in the three sources, its parser, whether a running node applies a change."""

from collections.abc import Callable
from typing import Any

import msgspec

from skep.configuration import values


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One setting.

    ``name`` is the flag without its dashes and the key in TOML; ``field`` of ``Configuration`` is the same with
    underscores unless given.  A setting that is a list has flags that may be repeated, each an item.
    """

    name: str
    help: str
    read: Callable[[Any], Any]
    field: str = ""
    key: str = ""
    """The key in TOML where it differs from the flag (lists are plural there)."""
    short: str = ""
    repeats: bool = False
    docker_key: str = ""
    """The key of Docker's ``daemon.json`` with the same meaning."""
    reloads: bool = False
    former: str = ""
    """Flag and key in earlier versions, which still work."""

    @property
    def attribute(self) -> str:
        """Its field of ``Configuration``."""
        return self.field or (self.key or self.name).replace("-", "_")

    @property
    def toml_key(self) -> str:
        """Its key in ``skep.toml``."""
        return self.key or self.name


SETTINGS = (
    Setting(
        name="data-dir",
        help="state of this node (/var/lib/skep)",
        read=values.absolute_path,
        docker_key="data-root",
    ),
    Setting(
        name="run-dir",
        help="sockets and everything that a reboot may lose (/run/skep)",
        read=values.absolute_path,
    ),
    Setting(
        name="host",
        short="-H",
        key="hosts",
        help="serve the API here: unix:///path, or tcp://address:port with TLS",
        read=values.hosts,
        repeats=True,
        docker_key="hosts",
    ),
    Setting(name="tls-cert", help="certificate of this server, for tcp:// hosts", read=values.existing_file),
    Setting(name="tls-key", help="key of that certificate", read=values.existing_file),
    Setting(
        name="tls-ca", help="authority that signs the certificates of clients", read=values.existing_file
    ),
    Setting(
        name="dashboard",
        help="address:port where users with a token open the dashboard in a browser, by TLS (none); managers only",
        read=values.listening_addr,
    ),
    Setting(
        name="dashboard-public",
        help="serve it on public addresses of this machine, too",
        read=values.boolean,
    ),
    Setting(
        name="engine-socket",
        help="the machine's Docker Engine, which gets what skep does not answer",
        read=values.socket_path,
    ),
    Setting(
        name="listen-addr",
        help="address or interface, with port, where a manager listens for nodes (0.0.0.0:2377)",
        read=values.address_and_port,
    ),
    Setting(
        name="peer-addr",
        help="port, or address and port, where this manager's etcd listens for the other managers "
        "(2378, or listen-addr's port + 10000 if that is not 2377)",
        read=values.peer_addr,
    ),
    Setting(
        name="advertise-addr",
        help="address or interface, with port, under which other nodes reach this one",
        read=values.address_and_port,
    ),
    Setting(
        name="manager",
        key="managers",
        help="address:port where a manager may be found when those known do not respond",
        read=values.managers,
        repeats=True,
    ),
    Setting(
        name="data-path-addr", help="address or interface for traffic of containers", read=values.address
    ),
    Setting(name="data-path-port", help="UDP port of that traffic (4789)", read=values.data_path_port),
    Setting(
        name="encryption",
        help="what encrypts overlay networks: auto (the kernel's WireGuard, else wireguard-go), kernel or wireguard-go",
        read=values.one_of("auto", "kernel", "wireguard-go"),
    ),
    Setting(
        name="wireguard-port",
        help="UDP port of encrypted networks, with the next one (data-path-port + 10: 4799 and 4800)",
        read=values.wireguard_port,
    ),
    Setting(
        name="image-gc-high",
        former="image-disk-high",
        help="percent of the images' disk from which on a node of a cluster removes images that it fetched and that "
        "nothing needs; 0: never (85)",
        read=values.percent,
        reloads=True,
    ),
    Setting(
        name="image-gc-low",
        former="image-disk-low",
        help="percent of the images' disk down to which they are removed (80)",
        read=values.percent,
        reloads=True,
    ),
    Setting(
        name="disk-pressure",
        former="disk-full",
        help="percent of the data directory's disk from which on the node gets no new tasks; 0: it always does (95)",
        read=values.percent,
        reloads=True,
    ),
    Setting(
        name="image-port",
        help="TCP port where other nodes fetch images from this one (2374, or a free one if that is taken)",
        read=values.port,
    ),
    Setting(
        name="metrics-addr",
        help="address:port where Prometheus reads /metrics and /sd by plain HTTP (none); not authenticated",
        read=values.listening_addr,
        docker_key="metrics-addr",
    ),
    Setting(
        name="metrics-host",
        key="metrics-hosts",
        help="DNS name under which metrics-addr is read, besides addresses and names without a registrable domain",
        read=values.host_names,
        repeats=True,
    ),
    Setting(
        name="trace-endpoint",
        help="URL of an OpenTelemetry collector that gets traces of services, http://collector:4318 (none)",
        read=values.http_url,
    ),
    Setting(name="debug", help="log more", read=values.boolean, docker_key="debug", reloads=True),
    Setting(name="log-format", help="text or json", read=values.one_of("text", "json")),
    Setting(
        name="label",
        key="labels",
        help="key=value that placement constraints see as engine.labels.key",
        read=values.labels,
        repeats=True,
        docker_key="labels",
        reloads=True,
    ),
    Setting(
        name="generic-resource",
        key="generic-resources",
        help="what services may reserve: gpu=4, or gpu=UUID1 for each unit",
        read=values.generic_resources,
        repeats=True,
        docker_key="node-generic-resources",
    ),
    Setting(
        name="allow",
        help="rights over this machine that services may have where the cluster allows them (all)",
        read=values.rights,
    ),
    Setting(
        name="cdi-spec-dir",
        key="cdi-spec-dirs",
        help="folder with descriptions of devices (/etc/cdi and /var/run/cdi)",
        read=values.directories,
        repeats=True,
        docker_key="cdi-spec-dirs",
    ),
    Setting(
        name="executor",
        help="oci: containers; process: plain commands, without images",
        read=values.one_of("oci", "process"),
    ),
    Setting(name="cgroup-parent", help="cgroup below which containers run (skep)", read=values.cgroup_parent),
    Setting(name="runc", help="OCI runtime (runc)", read=values.text),
    Setting(name="conmon", help="container monitor (conmon)", read=values.text),
    Setting(name="nft", help="nftables command (nft)", read=values.text),
    Setting(name="etcd-binary", help="etcd to run on a manager", read=values.existing_file),
    Setting(
        name="store-quota",
        help="largest file of a manager's store, the same on every manager (4GiB)",
        read=values.store_quota,
    ),
    Setting(
        name="insecure-registry",
        key="insecure-registries",
        help="registry or network that may be spoken to without TLS",
        read=values.registries,
        repeats=True,
        docker_key="insecure-registries",
        reloads=True,
    ),
    Setting(
        name="registry-mirror",
        key="registry-mirrors",
        help="copy of Docker Hub to ask first",
        read=values.mirrors,
        repeats=True,
        docker_key="registry-mirrors",
        reloads=True,
    ),
    Setting(
        name="credential-helper",
        key="credential-helpers",
        help="REGISTRY=NAME: docker-credential-NAME has the credentials for that registry",
        read=values.credential_helpers,
        repeats=True,
        reloads=True,
    ),
    Setting(
        name="log-driver",
        help="log driver of containers that name none (json-file)",
        read=values.log_driver,
        docker_key="log-driver",
    ),
    Setting(
        name="log-opt",
        key="log-opts",
        help="key=value for that driver",
        read=values.log_options,
        repeats=True,
        docker_key="log-opts",
    ),
    Setting(
        name="default-address-pool",
        key="default-address-pools",
        help="subnets of this node's networks: base=10.10.0.0/16,size=24",
        read=values.address_pools,
        repeats=True,
        docker_key="default-address-pools",
    ),
)
