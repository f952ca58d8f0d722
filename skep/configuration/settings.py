"""The settings: names in the three sources, parser, and which changes a running node applies (SIGHUP)."""

from collections.abc import Callable
from typing import Any

import msgspec

from skep.configuration import values
from skep.configuration.configuration import Configuration


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One setting.

    ``name`` is the flag without its dashes and the key in TOML.  ``field``, the attribute of ``Configuration``, is the
    same with underscores by default.  The flag of a list may be repeated, once per item.
    """

    name: str
    help: str
    read: Callable[[Any], Any]
    field: str = ""
    key: str = ""
    """The key in TOML if it differs from the flag (lists are plural there)."""
    short: str = ""
    repeats: bool = False
    docker_key: str = ""
    """The key of Docker's ``daemon.json`` with the same meaning."""
    reloads: bool = False
    former: str = ""
    """Flag and key in earlier versions, which still work."""

    @property
    def attribute(self) -> str:
        """Return the attribute of ``Configuration`` that holds this setting."""
        return self.field or (self.key or self.name).replace("-", "_")

    @property
    def toml_key(self) -> str:
        """Return the setting's key in ``skep.toml``."""
        return self.key or self.name


SETTINGS = (
    Setting(
        name="data-dir",
        help="directory for this node's state (/var/lib/skep)",
        read=values.absolute_path,
        docker_key="data-root",
    ),
    Setting(
        name="run-dir",
        help="directory for sockets and other files that a reboot may remove (/run/skep)",
        read=values.absolute_path,
    ),
    Setting(
        name="host",
        short="-H",
        key="hosts",
        help="address to serve the API at: unix:///path, or tcp://address:port with TLS",
        read=values.hosts,
        repeats=True,
        docker_key="hosts",
    ),
    Setting(name="tls-cert", help="server certificate for tcp:// hosts", read=values.existing_file),
    Setting(name="tls-key", help="key of the server certificate", read=values.existing_file),
    Setting(name="tls-ca", help="CA that signs client certificates", read=values.existing_file),
    Setting(
        name="dashboard",
        help="address:port where users with a token open the dashboard in a browser over TLS (none). Only on managers",
        read=values.listening_addr,
    ),
    Setting(
        name="dashboard-public",
        help="also serve the dashboard on public addresses",
        read=values.boolean,
    ),
    Setting(
        name="engine-socket",
        help="socket of the machine's Docker Engine, which gets the requests that Skep does not serve",
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
        help="address:port of a manager to try when the known ones do not respond",
        read=values.managers,
        repeats=True,
    ),
    Setting(name="data-path-addr", help="address or interface for container traffic", read=values.address),
    Setting(name="data-path-port", help="UDP port of container traffic (4789)", read=values.data_path_port),
    Setting(
        name="encryption",
        help="encryption of overlay networks: auto (the kernel's WireGuard, else wireguard-go), kernel or wireguard-go",
        read=values.one_of("auto", "kernel", "wireguard-go"),
    ),
    Setting(
        name="wireguard-port",
        help="first of two UDP ports of encrypted networks, three below the port of tunnels through NAT "
        "(data-path-port + 10: 4799 and 4800, and 4802)",
        read=values.wireguard_port,
    ),
    Setting(
        name="behind-nat",
        help="name of the NAT that this node is behind, the same on all nodes behind it, no, or auto to let managers "
        "find out (auto)",
        read=values.nat,
    ),
    Setting(
        name="image-gc-high",
        former="image-disk-high",
        help="disk usage in percent at which a cluster node starts to remove unused images, or 0 for never (85)",
        read=values.percent,
        reloads=True,
    ),
    Setting(
        name="image-gc-low",
        former="image-disk-low",
        help="disk usage in percent at which image removal stops (80)",
        read=values.percent,
        reloads=True,
    ),
    Setting(
        name="disk-pressure",
        former="disk-full",
        help="usage of the data directory's disk in percent at which the node gets no new tasks, or 0 for never (95)",
        read=values.percent,
        reloads=True,
    ),
    Setting(
        name="image-port",
        help="TCP port where other nodes pull images from this one (2374, or a free one if that is taken)",
        read=values.port,
    ),
    Setting(
        name="metrics-addr",
        help="address:port where Prometheus reads /metrics and /sd over plain HTTP, without authentication (none)",
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
    Setting(name="debug", help="enable debug logs", read=values.boolean, docker_key="debug", reloads=True),
    Setting(name="log-format", help="log format: text or json", read=values.one_of("text", "json")),
    Setting(
        name="label",
        key="labels",
        help="label key=value, which placement constraints see as engine.labels.key",
        read=values.labels,
        repeats=True,
        docker_key="labels",
        reloads=True,
    ),
    Setting(
        name="generic-resource",
        key="generic-resources",
        help="resource that services can reserve: gpu=4, or gpu=UUID1 for each unit",
        read=values.generic_resources,
        repeats=True,
        docker_key="node-generic-resources",
    ),
    Setting(
        name="allow",
        help="rights on this machine that services can get if the cluster allows them (all)",
        read=values.rights,
    ),
    Setting(
        name="cdi-spec-dir",
        key="cdi-spec-dirs",
        help="directory with CDI device specs (/etc/cdi and /var/run/cdi)",
        read=values.directories,
        repeats=True,
        docker_key="cdi-spec-dirs",
    ),
    Setting(
        name="userns-remap",
        help="user whose subordinate ids containers' users get: default, USER, USER:GROUP, UID or UID:GID (none)",
        read=values.text,
        docker_key="userns-remap",
    ),
    Setting(
        name="executor",
        help="task executor: oci for containers, process for plain processes without images",
        read=values.one_of("oci", "process"),
    ),
    Setting(name="cgroup-parent", help="parent cgroup of containers (skep)", read=values.cgroup_parent),
    Setting(
        name="runtime",
        help="OCI runtime: runc, crun or auto (crun on cgroup v2 if possible)",
        read=values.one_of("auto", "runc", "crun"),
    ),
    Setting(name="runc", help="program of the runtime runc (runc)", read=values.text),
    Setting(name="crun", help="program of the runtime crun (crun)", read=values.text),
    Setting(name="conmon", help="container monitor (conmon)", read=values.text),
    Setting(name="nft", help="nftables command (nft)", read=values.text),
    Setting(name="etcd-binary", help="etcd binary to run on a manager", read=values.existing_file),
    Setting(
        name="acme-dns-hook",
        help="program of a manager that writes DNS records for certificates, as root",
        read=values.existing_file,
    ),
    Setting(
        name="store-quota",
        help="maximum file size of the manager store, the same on every manager (4GiB)",
        read=values.store_quota,
    ),
    Setting(
        name="insecure-registry",
        key="insecure-registries",
        help="registry or network to reach without TLS",
        read=values.registries,
        repeats=True,
        docker_key="insecure-registries",
        reloads=True,
    ),
    Setting(
        name="registry-mirror",
        key="registry-mirrors",
        help="mirror of Docker Hub to try first",
        read=values.mirrors,
        repeats=True,
        docker_key="registry-mirrors",
        reloads=True,
    ),
    Setting(
        name="credential-helper",
        key="credential-helpers",
        help="credential helper of a registry: REGISTRY=NAME runs docker-credential-NAME",
        read=values.credential_helpers,
        repeats=True,
        reloads=True,
    ),
    Setting(
        name="selinux-enabled",
        help="label containers on a machine with SELinux",
        read=values.boolean,
        docker_key="selinux-enabled",
    ),
    Setting(
        name="log-driver",
        help="default log driver of containers (json-file)",
        read=values.log_driver,
        docker_key="log-driver",
    ),
    Setting(
        name="log-opt",
        key="log-opts",
        help="option of the default log driver: key=value",
        read=values.log_options,
        repeats=True,
        docker_key="log-opts",
    ),
    Setting(
        name="default-address-pool",
        key="default-address-pools",
        help="address pool of this node's networks: base=10.10.0.0/16,size=24",
        read=values.address_pools,
        repeats=True,
        docker_key="default-address-pools",
    ),
)


class Reload(msgspec.Struct, frozen=True):
    """A running configuration with the changes that need no restart applied, and the names of the changed settings."""

    configuration: Configuration
    reloaded: tuple[str, ...]
    needs_restart: tuple[str, ...]


def reload(running: Configuration, written: Configuration) -> Reload:
    """Compare the running configuration with the written one.  Names are in the order of ``SETTINGS``."""
    changed = [
        setting
        for setting in SETTINGS
        if getattr(running, setting.attribute) != getattr(written, setting.attribute)
    ]
    taken = [setting for setting in changed if setting.reloads]
    return Reload(
        msgspec.structs.replace(running, **{s.attribute: getattr(written, s.attribute) for s in taken}),
        tuple(setting.toml_key for setting in taken),
        tuple(setting.toml_key for setting in changed if not setting.reloads),
    )
