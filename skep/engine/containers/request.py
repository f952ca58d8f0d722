"""Request to create a container: the supported part of Docker's body of ``POST /containers/create``.

A client's body is decoded here.  Options that the engine does not support are refused by name and never ignored.
Clients send every option, even if the user has not set it, but then with a neutral value.  So an unsupported option is
refused only with another value.

Source: moby 20.10, api/types/container/config.go, host_config.go, api/types/network/network.go.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple

import msgspec

from skep.api.formats.bodies import from_builtins, parse
from skep.api.formats.gosyntax import BOOLEANS
from skep.api.http.versions import NEWEST, ApiVersion
from skep.engine.confinement import apparmor
from skep.engine.confinement.machine import MachineOptions
from skep.engine.containers.container import MountPoint
from skep.errors import InvalidArgument, Unimplemented
from skep.model.container import HealthConfig, Mount, Ulimit
from skep.model.networks.sandbox import EndpointConfig, PublishedPort
from skep.model.values.encoding import ApiObject, GoInt, Words
from skep.model.values.times import Nanoseconds

_WITH_PIDS_LIMIT = ApiVersion("1.40")
_V1_44 = ApiVersion("1.44")
_V1_48 = ApiVersion("1.48")
_V1_52 = ApiVersion("1.52")
_V1_55 = ApiVersion("1.55")
BODY_EMPTY = "Config cannot be empty in order to create a container"

_SECURITY_FLAGS: Final = {
    "no-new-privileges": "no-new-privileges=true",
    "writable-cgroups": "writable-cgroups=true",
    "disable": "label=disable",
}
"""Full form of options that may be written without a value."""


class LogOptions(ApiObject):
    """``--log-driver`` and ``--log-opt``."""

    __go_name__: ClassVar[str | None] = "container.LogConfig"

    type: str = ""
    config: Mapping[str, str] = {}


class RestartOptions(ApiObject):
    """``--restart``."""

    __go_name__: ClassVar[str | None] = "container.RestartPolicy"

    name: str = ""
    maximum_retry_count: GoInt = 0


class PortBinding(ApiObject):
    """The node's address and port for a published port.  If ``host_port`` is empty or 0, a free port is chosen."""

    __go_name__: ClassVar[str | None] = "nat.PortBinding"

    host_ip: str = msgspec.field(name="HostIp", default="")
    host_port: str = ""


class HostConfig(MachineOptions):
    """Options that depend on the host."""

    __go_name__: ClassVar[str | None] = "container.HostConfig"

    binds: tuple[str, ...] = ()
    log_config: LogOptions = LogOptions()
    network_mode: str = ""
    port_bindings: Mapping[str, tuple[PortBinding, ...] | None] = {}
    publish_all_ports: bool = False
    restart_policy: RestartOptions = RestartOptions()
    auto_remove: bool = False
    cap_add: Words = ()
    cap_drop: Words = ()
    dns: tuple[str, ...] = msgspec.field(name="Dns", default=())
    dns_options: tuple[str, ...] = msgspec.field(name="DnsOptions", default=())
    dns_search: tuple[str, ...] = msgspec.field(name="DnsSearch", default=())
    extra_hosts: tuple[str, ...] = ()
    group_add: tuple[str, ...] = ()
    oom_score_adj: GoInt = 0
    readonly_rootfs: bool = False
    security_opt: tuple[str, ...] = ()
    tmpfs: Mapping[str, str] = {}
    mounts: tuple[Mount, ...] = ()
    shm_size: int = 0
    sysctls: Mapping[str, str] = {}
    runtime: str = ""
    memory: int = 0
    memory_reservation: int = 0
    nano_cpus: int = msgspec.field(name="NanoCpus", default=0)
    pids_limit: int | None = None
    ulimits: tuple[Ulimit, ...] = ()
    init: bool | None = None
    volumes_from: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    volume_driver: str = ""
    console_size: tuple[int, ...] = ()
    """The terminal's first rows and columns."""


class UpdateRequest(HostConfig):
    """The body of ``POST /containers/{id}/update``.  Zero, null and an empty text leave a value unchanged."""

    __go_name__: ClassVar[str | None] = "container.UpdateConfig"


class EndpointIPAM(ApiObject):
    """Addresses that the user chose for an endpoint."""

    __go_name__: ClassVar[str | None] = "network.EndpointIPAMConfig"

    ipv4_address: str = msgspec.field(name="IPv4Address", default="")
    ipv6_address: str = msgspec.field(name="IPv6Address", default="")


class EndpointSettings(ApiObject):
    """Options of a container on one network."""

    __go_name__: ClassVar[str | None] = "network.EndpointSettings"

    ipam_config: EndpointIPAM | None = None
    aliases: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    mac_address: str = ""
    gw_priority: GoInt = 0
    driver_opts: Mapping[str, str] = {}


class NetworkingConfig(ApiObject):
    """``EndpointsConfig``: options by network name or id."""

    __go_name__: ClassVar[str | None] = "network.NetworkingConfig"

    endpoints_config: Mapping[str, EndpointSettings | None] = {}


class CreateRequest(ApiObject):
    """Docker's ``Config``, including ``HostConfig`` and ``NetworkingConfig``."""

    __go_name__: ClassVar[str | None] = "runconfig.ContainerConfigWrapper"

    hostname: str = ""
    user: str = ""
    attach_stdin: bool = False
    attach_stdout: bool = False
    attach_stderr: bool = False
    exposed_ports: Mapping[str, Any] = {}
    tty: bool = msgspec.field(name="Tty", default=False)
    open_stdin: bool = False
    stdin_once: bool = False
    env: tuple[str, ...] = ()
    cmd: Words = ()
    entrypoint: Words | None = None
    healthcheck: HealthConfig | None = None
    image: str = ""
    volumes: Mapping[str, Any] = {}
    working_dir: str = ""
    labels: Mapping[str, str] = {}
    stop_signal: str = ""
    stop_timeout: GoInt | None = None
    mac_address: str = ""
    host_config: HostConfig = HostConfig()
    networking_config: NetworkingConfig = NetworkingConfig()


class TaskOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Additions to the request for a task: values that the cluster assigns and that Docker's request has no fields
    for.
    """

    labels: Mapping[str, str] = {}
    """Labels that identify the task."""
    endpoints: tuple[EndpointConfig, ...] = ()
    ports: tuple[PublishedPort, ...] = ()
    mounts: tuple[MountPoint, ...] = ()
    """Files that the agent provides: secrets and configs."""
    hosts: tuple[str, ...] = ()
    """Lines of /etc/hosts: ``address name...``."""
    stop_grace_ns: Nanoseconds
    stack: str = ""
    """Stack of the task's service."""
    may_log_anywhere: bool = False
    """Whether an administrator chose the log driver (see ``LogConfig.is_restricted``)."""
    relabel: Mapping[str, str] = {}
    """Modes by target for ``ContainerConfig.relabel``."""


class ConnectRequest(ApiObject):
    """The body of ``POST /networks/{id}/connect``."""

    __go_name__: ClassVar[str | None] = "types.NetworkConnect"

    container: str = ""
    endpoint_config: EndpointSettings = EndpointSettings()


def read_create(body: bytes) -> CreateRequest:
    """Decode a client's request.

    Raises: InvalidArgument: it cannot be decoded, in Go's words; Unimplemented: an option is not supported.
    """
    value = parse(body)
    if not isinstance(value, dict):
        raise InvalidArgument(BODY_EMPTY)
    folded = {str(name).casefold(): one for name, one in value.items()}
    _check_config(value)
    _check_host(folded.get("hostconfig"))
    networking = folded.get("networkingconfig")
    endpoints = networking.get("EndpointsConfig") if isinstance(networking, dict) else None
    for endpoint in endpoints.values() if isinstance(endpoints, dict) else ():
        _check_endpoint(endpoint)
    return from_builtins(value, CreateRequest)


def create_warnings(request: CreateRequest, version: ApiVersion) -> list[str]:
    """Return the warnings about options of ``request`` that clients of API ``version`` expect from the server.

    Raises: InvalidArgument: the version no longer has an option.

    Source: moby, daemon/server/router/container/container_routes.go (handleVolumeDriverBC, handleMACAddressBC,
    handlePortBindingsBC).
    """
    if version >= _V1_52 and request.mac_address:
        raise InvalidArgument(
            "container-wide MAC address no longer supported; use endpoint-specific MAC address instead"
        )
    host, warnings = request.host_config, []
    if version >= _V1_44 and request.mac_address:
        warnings.append(
            "The container-wide MacAddress field is now deprecated. It should be specified in EndpointsConfig instead."
        )
    undecided = [
        mount
        for mount in host.mounts
        if mount.type == "volume"
        and not (
            mount.volume_options
            and mount.volume_options.driver_config
            and mount.volume_options.driver_config.name
        )
    ]
    if version >= _V1_48 and host.volume_driver and undecided:
        warnings.append(
            "WARNING: the container-wide volume-driver configuration is ignored for volumes specified via 'mount'. "
            "Use '--mount type=volume,volume-driver=...' instead"
        )
    unbound = [port for port, bindings in host.port_bindings.items() if not bindings]
    if version >= _V1_52 and unbound:
        warnings.append(
            f"Following container port(s) have an empty list of port-bindings: {', '.join(unbound)}. "
            "Such bindings will be discarded in a future version."
        )
    return warnings


def read_update(body: bytes, version: ApiVersion = NEWEST) -> UpdateRequest:
    """Decode a client's update.

    Raises: as ``read_create``.  Docker ignores options that it cannot change; Skep refuses them.

    Source: moby, api/server/router/container/container_routes.go (postContainerUpdate).
    """
    value = parse(body)
    for name, _ in _given(value):
        if name not in _UPDATE_OPTIONS:
            raise Unimplemented(f"docker update cannot change {_FLAGS.get(name, name)}: omit it")
    request = from_builtins(value, UpdateRequest)
    # Older clients always send a number.
    return request if version >= _WITH_PIDS_LIMIT else msgspec.structs.replace(request, pids_limit=None)


DEVICE_LIMITS: Final[Mapping[str, str]] = {
    "blkioweightdevice": "blkio_weight_device",
    "blkiodevicereadbps": "blkio_device_read_bps",
    "blkiodevicewritebps": "blkio_device_write_bps",
    "blkiodevicereadiops": "blkio_device_read_iops",
    "blkiodevicewriteiops": "blkio_device_write_iops",
}
"""Limits of single block devices by their names in requests, in lower case."""


def cleared_limits(body: bytes, version: ApiVersion) -> Collection[str]:
    """Return the limits of block devices that an update clears by an empty list, by their names in lower case.

    Before API 1.55, an update ignored an empty list.
    """
    value = parse(body)
    if version < _V1_55 or not isinstance(value, dict):
        return ()
    return [
        name for key, one in value.items() if (name := str(key).casefold()) in DEVICE_LIMITS and one == []
    ]


def read_connect(body: bytes) -> ConnectRequest:
    """Decode a client's request to connect a network.  Raises: as ``read_create``."""
    value = parse(body)
    if isinstance(value, dict):
        _check_endpoint(value.get("EndpointConfig"))
    return from_builtins(value, ConnectRequest)


_HOST_OPTIONS: Final = frozenset(
    {
        *(
            "binds",
            "logconfig",
            "networkmode",
            "portbindings",
            "publishallports",
            "restartpolicy",
            "autoremove",
        ),
        *("capadd", "capdrop", "dns", "dnsoptions", "dnssearch", "extrahosts", "groupadd", "oomscoreadj"),
        *("readonlyrootfs", "securityopt", "tmpfs", "mounts", "shmsize", "sysctls", "memory"),
        *(
            "memoryreservation",
            "nanocpus",
            "cpuperiod",
            "cpuquota",
            "pidslimit",
            "ulimits",
            "init",
            "runtime",
        ),
        *(
            "volumesfrom",
            "links",
            "privileged",
            "devices",
            "devicecgrouprules",
            "devicerequests",
            "pidmode",
            "ipcmode",
        ),
        *("utsmode", "usernsmode", "cgroupnsmode", "cpushares", "cpusetcpus", "cpusetmems", "blkioweight"),
        *("blkioweightdevice", "blkiodevicereadbps", "blkiodevicewritebps", "blkiodevicereadiops"),
        *("blkiodevicewriteiops", "memoryswap", "memoryswappiness", "oomkilldisable", "annotations"),
        *("maskedpaths", "readonlypaths", "cgroupparent"),
        # Only clients use the first.
        *("containeridfile", "consolesize"),
    }
)
_UPDATE_OPTIONS: Final = frozenset(
    {
        *("memory", "memoryreservation", "memoryswap", "nanocpus", "cpuperiod", "cpuquota", "cpushares"),
        *("cpusetcpus", "cpusetmems", "blkioweight", "pidslimit", "restartpolicy"),
    }
)
_CONFIG_OPTIONS: Final = frozenset(
    {
        *("hostname", "user", "attachstdin", "attachstdout", "attachstderr", "exposedports", "tty"),
        *(
            "openstdin",
            "stdinonce",
            "env",
            "cmd",
            "entrypoint",
            "healthcheck",
            "image",
            "volumes",
            "workingdir",
        ),
        *("labels", "stopsignal", "stoptimeout", "hostconfig", "networkingconfig", "macaddress"),
        # Fields of images.  ``docker build`` reads them, but they do not matter for running a container.
        *("onbuild", "shell", "argsescaped"),
    }
)
ENDPOINT_SYSCTLS: Final = "com.docker.network.endpoint.sysctls"
_ENDPOINT_OPTIONS: Final = frozenset(
    {
        *("ipamconfig", "aliases", "links", "macaddress", "gwpriority"),
        # Fields that an engine sets.  Clients that copy a response send them back.
        *(
            "networkid",
            "endpointid",
            "gateway",
            "ipaddress",
            "ipprefixlen",
            "ipv6gateway",
            "globalipv6address",
        ),
        *("globalipv6prefixlen", "dnsnames"),
    }
)
_NOTHING: Final[tuple[Any, ...]] = (None, "", 0, False, [], {})
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "isolation": (None, "", "default"),
    "volumedriver": (None, "", "local"),
    "memoryswappiness": (None, -1),
}
_FLAGS: Final[Mapping[str, str]] = {
    "volumedriver": "--volume-driver",
    "links": "--link",
    "cpurealtimeperiod": "--cpu-rt-period",
    "cpurealtimeruntime": "--cpu-rt-runtime",
    "kernelmemory": "--kernel-memory",
    "storageopt": "--storage-opt",
    "isolation": "--isolation",
    "domainname": "--domainname",
    "driveropts": "--network driver-opt",
    "linklocalips": "--link-local-ip",
}


def _check_host(host: Any) -> None:
    """Check ``host``, the JSON of ``HostConfig``.  Raises: Unimplemented."""
    for name, _ in _given(host):
        if name not in _HOST_OPTIONS:
            raise refused(name)


def _check_config(config: Any) -> None:
    """Check ``config``, the whole JSON.  Raises: Unimplemented."""
    for name, _ in _given(config):
        if name not in _CONFIG_OPTIONS:
            raise refused(name)


def _check_endpoint(endpoint: Any) -> None:
    """Check ``endpoint``, the JSON of one network.  Raises: Unimplemented."""
    for name, value in _given(endpoint):
        if name == "driveropts" and isinstance(value, dict) and value.keys() == {ENDPOINT_SYSCTLS}:
            continue
        if name not in _ENDPOINT_OPTIONS:
            raise refused(name)
        if name == "ipamconfig":
            for inner, _ in _given(value):
                if inner not in ("ipv4address", "ipv6address"):
                    raise refused(inner)


def refused(name: str) -> Unimplemented:
    """Return the error for an unsupported option, by its field name in lower case or its flag."""
    return Unimplemented(
        f"Skep's own containers do not support {_FLAGS.get(name, name)}: omit it, or give skep a Docker "
        "Engine (--engine-socket) for plain containers"
    )


def _given(value: Any) -> list[tuple[str, Any]]:
    """Return the fields whose value is not neutral, with their names in lower case."""
    if not isinstance(value, dict):
        return []
    found = []
    for name, one in value.items():
        folded = str(name).casefold()
        if not any(one == nothing for nothing in _NEUTRAL.get(folded, _NOTHING)):
            found.append((folded, one))
    return found


class SecurityOptions(NamedTuple):
    """Parsed ``--security-opt`` options."""

    seccomp: str = "default"
    apparmor: str = "default"
    no_new_privileges: bool = False
    label_options: tuple[str, ...] = ()


def security_options(options: Sequence[str]) -> SecurityOptions:
    """Parse security options.  Raises: InvalidArgument; Unimplemented: an option is not supported.

    Source: moby, daemon/daemon_unix.go (parseSecurityOpt).
    """
    found = SecurityOptions()
    for given in options:
        option = _SECURITY_FLAGS.get(given, given)
        name, separator, value = option.partition("=" if "=" in option else ":")
        if not separator:
            raise InvalidArgument(f'invalid --security-opt 1: "{given}"')
        match name, BOOLEANS.get(value):
            case "no-new-privileges", bool() as is_on:
                found = found._replace(no_new_privileges=is_on)
            case "seccomp", _:
                found = found._replace(seccomp="default" if value in ("", "builtin") else value)
            case "apparmor", _:
                found = found._replace(
                    apparmor="default" if value in ("", apparmor.DEFAULT_PROFILE) else value
                )
            case "label", _:
                found = found._replace(label_options=(*found.label_options, value))
            case "writable-cgroups", True:
                raise refused(f"--security-opt {name}")
            case "writable-cgroups", False:
                pass
            case _:
                raise InvalidArgument(f'invalid --security-opt 2: "{given}"')
    return found
