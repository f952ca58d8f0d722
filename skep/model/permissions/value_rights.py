"""Rules of ``model.permissions.field_rights`` for fields in which only some values need an administrator.

Each rule takes the value of a field and the whole spec, and yields descriptions of the parts that only an administrator
may set.  The page of rights in the reference shows the first line of its docstring.
"""

from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any, Final, TypeAlias

from skep.errors import SkepError
from skep.model.container import (
    HEALTH_INTERVAL_NS_MIN,
    AppArmorOpts,
    Mount,
    SeccompOpts,
    Ulimit,
)
from skep.model.network import (
    MTU_OPTION,
    OVERLAP_LABEL,
    IPAMConfig,
    subnet_of,
)
from skep.model.networks.addresses import is_local, is_machine_host
from skep.model.networks.data_planes import PLANE_OPTION
from skep.model.networks.overlays import ENCRYPTED_OPTION, VXLAN_OPTION
from skep.model.permissions.rights import rights_of, rights_text
from skep.model.service import (
    NetworkAttachmentConfig,
    ServiceSpec,
    TaskSpec,
)
from skep.model.values.encoding import ApiObject
from skep.model.values.images import registry_of
from skep.model.values.meta import Driver
from skep.model.values.times import SECOND_NS

SUBNET_BITS_MIN: Final = {4: 16, 6: 48}
"""Shortest prefix of a user's subnet by IP version. The default pools have 65,536 addresses each (10.x.0.0/16)."""
TMPFS_OPTIONS: Final = frozenset({"exec", "noexec"})
"""Source: moby 28, volume/mounts/linux_parser.go (validTmpfsOptions)."""
HOST_NETWORKS: Final = frozenset({"host", "bridge", "none"})
"""Networks of the machine that services may name."""


class Reach(Enum):
    """Largest area that a field or label affects."""

    CONTAINER = "container"
    """The containers of the service and its stack, within its quota."""
    NODE = "node"
    """The machine that runs the task."""
    CLUSTER = "cluster"
    """Other stacks, or what all stacks share."""


Why: TypeAlias = Callable[[Any, ApiObject], Iterator[str]]
"""A rule: takes a field's value and the spec that it is part of, and yields the parts that need an administrator."""


def anyone(_value: Any, _root: ApiObject) -> Iterator[str]:
    yield from ()  # reaches beyond the container, and another rule bounds it


def other_task(_value: Any, _root: ApiObject) -> Iterator[str]:
    """Anything."""
    yield "a task that is no container"


def image_registry(image: str, _root: ApiObject) -> Iterator[str]:
    """Images of a registry on the machine itself, such as `localhost:5000/x`."""
    yield from image_rights(image)


def image_rights(image: str) -> Iterator[str]:
    """Yield why only an administrator may name an image: the node would connect to itself."""
    if is_loopback_registry(image):
        yield f"an image of a registry on the machine itself ({image})"


def is_loopback_registry(image: str) -> bool:
    """Return whether the image's registry is an address of the node itself, in any spelling."""
    domain = registry_of(image).lower()
    host = domain[1:].partition("]")[0] if domain.startswith("[") else domain.partition(":")[0]
    return is_machine_host(host)


def name_servers(servers: tuple[str, ...], _root: ApiObject) -> Iterator[str]:
    """Addresses of the machine itself or of its links: the node asks name servers from its own namespace."""
    for server in servers:
        if is_local(server.lower()):
            yield f"a name server on the machine itself ({server})"


def mounts(mounts: tuple[Mount, ...], _root: ApiObject) -> Iterator[str]:
    """Types other than volume, tmpfs and cluster, and options of volume drivers."""
    for mount in mounts:
        if mount.type not in ("volume", "tmpfs", "cluster"):
            yield f"a {mount.type} mount of {mount.source}"
        options = mount.volume_options
        driver = options.driver_config if options is not None else None
        if driver is not None and (driver.options or driver.name not in ("", "local")):
            yield f"options of the driver of the volume {mount.source}"


def tmpfs_options(options: tuple[tuple[str, ...], ...], _root: ApiObject) -> Iterator[str]:
    """Options other than `exec` and `noexec`."""
    for option in options:
        if len(option) != 1 or option[0] not in TMPFS_OPTIONS:
            yield f"the tmpfs option {'='.join(option)}"


def ulimits(limits: tuple[Ulimit, ...], root: ApiObject) -> Iterator[str]:
    """See [ulimits](#ulimits)."""
    for limit in limits:
        bound = ULIMITS.get(limit.name)
        if bound is None or not bound(limit, root):
            yield f"the ulimit {limit.name}={limit.soft}:{limit.hard}"


def _nice(limit: Ulimit, _root: ApiObject) -> bool:
    """Above 20, which lets a process run before processes of the machine."""
    return all(0 <= one <= _NICE_OF_ALL for one in (limit.soft, limit.hard))


_NICE_OF_ALL: Final = 20
"""The limit that allows the nice value 0, which every process has.  Source: getrlimit(2), RLIMIT_NICE."""


def _rtprio(limit: Ulimit, _root: ApiObject) -> bool:
    """Above 0: cgroup limits do not bind realtime processes."""
    return limit.soft == limit.hard == 0


def _memlock(_limit: Ulimit, root: ApiObject) -> bool:
    """Without a memory limit of the service, in which locked memory counts."""
    resources = root.task_template.resources if isinstance(root, ServiceSpec) else None
    limits = resources.limits if resources is not None else None
    return limits is not None and limits.memory_bytes > 0


def _any_limit(_limit: Ulimit, _root: ApiObject) -> bool:
    return True


ULIMITS: Final[Mapping[str, Callable[[Ulimit, ApiObject], bool]]] = {
    **dict.fromkeys(
        ("core", "cpu", "data", "fsize", "locks", "nofile", "nproc", "rss", "rttime", "stack"), _any_limit
    ),
    "memlock": _memlock,
    "nice": _nice,
    "rtprio": _rtprio,
}
"""Whether users may set a ulimit.  msgqueue and sigpending are missing, because their memory belongs to the kernel and
is counted by user id, which containers share with the machine."""


def oom_score(score: int, _root: ApiObject) -> Iterator[str]:
    """Below 0."""
    if score < 0:
        yield "a lower score for the kernel's out-of-memory killer"


def capabilities(names: tuple[str, ...], _root: ApiObject) -> Iterator[str]:
    """Anything."""
    yield f"the capabilities {', '.join(names)}"


def security_options(_value: Any, _root: ApiObject) -> Iterator[str]:
    """Anything."""
    yield "security options"


def security_profile(options: SeccompOpts | AppArmorOpts, _root: ApiObject) -> Iterator[str]:
    """Other than the default."""
    if options.mode not in ("", "default"):
        yield "security options"


def health_interval(interval_ns: int, _root: ApiObject) -> Iterator[str]:
    """Below 1 s."""
    if 0 < interval_ns < HEALTH_INTERVAL_NS_MIN:
        yield f"a health check interval below {HEALTH_INTERVAL_NS_MIN // SECOND_NS} s"


def machine_networks(attachments: tuple[NetworkAttachmentConfig, ...], _root: ApiObject) -> Iterator[str]:
    """`host`, `bridge` and `none`, also by id."""
    for one in attachments:
        if one.target in HOST_NETWORKS:
            yield f"the machine's network {one.target}"


_LOG_CONTAINER: Final = frozenset(
    {
        *("labels", "labels-regex", "env", "env-regex", "tag", "max-size", "max-file", "compress"),
        *("mode", "max-buffer-size", "cache-disabled", "cache-max-size", "cache-max-file", "cache-compress"),
        *("cache-labels", "cache-labels-regex", "cache-env", "cache-env-regex", "cache-tag"),
        *("fluentd-async", "fluentd-async-connect", "fluentd-async-reconnect-interval"),
        *("fluentd-buffer-limit", "fluentd-max-retries", "fluentd-request-ack", "fluentd-retry-wait"),
        *("fluentd-sub-second-precision", "fluentd-write-timeout", "fluentd-read-timeout"),
        *("gelf-compression-level", "gelf-compression-type"),
        *("gelf-tcp-max-reconnect", "gelf-tcp-reconnect-delay"),
        *("splunk-token", "splunk-source", "splunk-sourcetype", "splunk-index", "splunk-caname"),
        *("splunk-insecureskipverify", "splunk-format", "splunk-verify-connection", "splunk-gzip"),
        *("splunk-gzip-level", "splunk-index-acknowledgment"),
        *("syslog-facility", "syslog-tls-skip-verify", "syslog-format"),
    }
)
_LOG_ADDRESSES: Final = frozenset({"fluentd-address", "gelf-address", "syslog-address", "splunk-url"})
_LOG_FILES: Final = frozenset({"splunk-capath", "syslog-tls-ca-cert", "syslog-tls-cert", "syslog-tls-key"})
"""Options that name a file, which the node reads as root."""

LOG_OPTIONS: Final[Mapping[str, Reach]] = {
    **dict.fromkeys(sorted(_LOG_CONTAINER), Reach.CONTAINER),
    **dict.fromkeys(sorted(_LOG_ADDRESSES | _LOG_FILES), Reach.NODE),
}
"""Options of all log drivers."""


def log_driver(driver: Driver, _root: ApiObject) -> Iterator[str]:
    """Unix sockets, and options of the class node that name a file."""
    for name, value in driver.options.items():
        if name in _LOG_CONTAINER or not value:
            continue
        if name in _LOG_FILES or (name in _LOG_ADDRESSES and _is_unix(value)):
            yield f"a file of its machine (log option {name})"
        elif name not in _LOG_ADDRESSES:
            yield f"the log option {name}"


def _is_unix(address: str) -> bool:
    """Return whether an address names a Unix socket.  URL parsers skip spaces and control characters, so this does."""
    scheme = "".join(filter(str.isalnum, address.lower().partition(":")[0]))
    return scheme.startswith("unix")


NETWORK_OPTIONS: Final[Mapping[str, Reach]] = {
    ENCRYPTED_OPTION: Reach.CONTAINER,
    MTU_OPTION: Reach.CONTAINER,
    PLANE_OPTION: Reach.CONTAINER,
    VXLAN_OPTION: Reach.CLUSTER,
    OVERLAP_LABEL: Reach.CLUSTER,
}
"""Driver options of networks. VXLAN ids are shared by all networks."""


def network_driver(driver: Driver, _root: ApiObject) -> Iterator[str]:
    """Drivers other than overlay, and options of the class cluster."""
    if driver.name != "overlay":
        yield "a network that is no overlay, or the ingress network"
    for name in driver.options:
        if NETWORK_OPTIONS.get(name) is not Reach.CONTAINER:
            yield f"the network option {name}"


def ingress(_value: bool, _root: ApiObject) -> Iterator[str]:
    """Anything."""
    yield "a network that is no overlay, or the ingress network"


def address_driver(driver: Driver, _root: ApiObject) -> Iterator[str]:
    """Drivers other than the default, and options."""
    if driver.name not in ("", "default"):
        yield f"the address driver {driver.name}"
    for name in driver.options:
        yield f"the option {name} of the address driver"


def subnets(configs: tuple[IPAMConfig, ...], _root: ApiObject) -> Iterator[str]:
    """Subnets wider than /16, with IPv6 wider than /48."""
    for config in configs:
        if not config.subnet:
            continue
        try:
            subnet = subnet_of(config)
        except ValueError:
            continue  # refused, in the engine's words
        if subnet.prefixlen < SUBNET_BITS_MIN[subnet.version]:
            yield f"a subnet wider than /{SUBNET_BITS_MIN[subnet.version]} ({config.subnet})"


def machine_rights(_value: str, root: ApiObject) -> Iterator[str]:
    """Anything but `skep.api=read`."""
    template = root.task_template if isinstance(root, ServiceSpec) else TaskSpec()
    try:
        if kinds := rights_of(template.container_spec).kinds:
            yield f"rights over its machine ({rights_text(kinds)})"
    except SkepError as error:
        yield f"labels that cannot be read ({error})"
