"""The body of ``POST /containers/create``, as far as this node acts on it; what else it says is ``options.py``'s.

Source: moby 20.10, api/types/container/config.go, host_config.go, api/types/network/network.go.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from skep.api.bodies import from_builtins, parse
from skep.engine.plain.options import check_config, check_endpoint, check_host
from skep.errors import InvalidArgument
from skep.model.container import HealthConfig, Mount, Ulimit
from skep.model.encoding import ApiObject, GoInt

BODY_EMPTY = "Config cannot be empty in order to create a container"


class LogBody(ApiObject):
    __go_name__: ClassVar[str | None] = "container.LogConfig"

    type: str = ""
    config: Mapping[str, str] = {}


class RestartBody(ApiObject):
    __go_name__: ClassVar[str | None] = "container.RestartPolicy"

    name: str = ""
    maximum_retry_count: GoInt = 0


class PortBinding(ApiObject):
    __go_name__: ClassVar[str | None] = "nat.PortBinding"

    host_ip: str = msgspec.field(name="HostIp", default="")
    host_port: str = ""


class HostBody(ApiObject):
    """``HostConfig``: what depends on the machine."""

    __go_name__: ClassVar[str | None] = "container.HostConfig"

    binds: tuple[str, ...] = ()
    log_config: LogBody = LogBody()
    network_mode: str = ""
    port_bindings: Mapping[str, tuple[PortBinding, ...] | None] = {}
    publish_all_ports: bool = False
    restart_policy: RestartBody = RestartBody()
    auto_remove: bool = False
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
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
    memory: int = 0
    memory_reservation: int = 0
    nano_cpus: int = msgspec.field(name="NanoCpus", default=0)
    cpu_period: int = msgspec.field(name="CpuPeriod", default=0)
    cpu_quota: int = msgspec.field(name="CpuQuota", default=0)
    pids_limit: int | None = None
    ulimits: tuple[Ulimit, ...] = ()
    init: bool | None = None


class EndpointIPAM(ApiObject):
    __go_name__: ClassVar[str | None] = "network.EndpointIPAMConfig"

    ipv4_address: str = ""


class EndpointBody(ApiObject):
    """What a container is to be on one network."""

    __go_name__: ClassVar[str | None] = "network.EndpointSettings"

    ipam_config: EndpointIPAM | None = None
    aliases: tuple[str, ...] = ()


class NetworkingBody(ApiObject):
    __go_name__: ClassVar[str | None] = "network.NetworkingConfig"

    endpoints_config: Mapping[str, EndpointBody | None] = {}


class CreateBody(ApiObject):
    """``Config``, with ``HostConfig`` and ``NetworkingConfig`` in it."""

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
    cmd: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    healthcheck: HealthConfig | None = None
    image: str = ""
    volumes: Mapping[str, Any] = {}
    working_dir: str = ""
    labels: Mapping[str, str] = {}
    stop_signal: str = ""
    stop_timeout: GoInt | None = None
    host_config: HostBody = HostBody()
    networking_config: NetworkingBody = NetworkingBody()


class ConnectWish(ApiObject):
    """The body of ``POST /networks/{id}/connect``."""

    __go_name__: ClassVar[str | None] = "types.NetworkConnect"

    container: str = ""
    endpoint_config: EndpointBody = EndpointBody()


def read_create(body: bytes) -> CreateBody:
    """The wish.

    Raises: InvalidArgument: it is none, with Go's words; Unimplemented: an option that this node does not act on.
    """
    value = parse(body)
    if not isinstance(value, dict):
        raise InvalidArgument(BODY_EMPTY)
    folded = {str(name).casefold(): one for name, one in value.items()}
    check_config(value)
    check_host(folded.get("hostconfig"))
    networking = folded.get("networkingconfig")
    endpoints = networking.get("EndpointsConfig") if isinstance(networking, dict) else None
    for endpoint in endpoints.values() if isinstance(endpoints, dict) else ():
        check_endpoint(endpoint)
    return from_builtins(value, CreateBody)


def read_connect(body: bytes) -> ConnectWish:
    """The wish.  Raises: as ``read_create``."""
    value = parse(body)
    if isinstance(value, dict):
        check_endpoint(value.get("EndpointConfig"))
    return from_builtins(value, ConnectWish)
