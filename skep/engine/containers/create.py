"""Translates a create request and an image into a container's configuration, for tasks and ``docker run``.  Pure.

Sources: moby 20.10, daemon/create.go, daemon/commit.go (merge), volume/mounts/linux_parser.go (binds); docker/cli, opts
(the values that clients send).
"""

import re
from collections.abc import Mapping
from ipaddress import IPv6Address
from typing import NamedTuple

from msgspec.structs import replace

from skep.api.formats.gosyntax import parse_port
from skep.api.formats.networks import BUILTIN
from skep.engine.confinement import machine
from skep.engine.confinement.limits import nano_cpus_of
from skep.engine.confinement.machine import MachineOptions
from skep.engine.containers import health
from skep.engine.containers.container import ContainerConfig, LogConfig, PlainOptions, RestartPolicy
from skep.engine.containers.request import (
    ENDPOINT_SYSCTLS,
    CreateRequest,
    EndpointSettings,
    HostConfig,
    LogOptions,
    PortBinding,
    TaskOptions,
    refused,
    security_options,
)
from skep.engine.containers.signals import signal_number
from skep.engine.images.image import ContainerDefaults
from skep.engine.lifecycle.network_rules import NO_ADDRESS, NO_ALIASES
from skep.engine.log_drivers.options import Check, log_config, with_defaults
from skep.engine.volumes.mounts import check_option_types, check_paths
from skep.errors import FailedPrecondition, InvalidArgument, Unimplemented
from skep.model.container import (
    DEFAULT_STOP_GRACE_NS,
    HEALTH_INTERVAL_NS_MIN,
    BindOptions,
    HealthConfig,
    Mount,
    TmpfsOptions,
    VolumeOptions,
)
from skep.model.networks.addresses import parsed
from skep.model.networks.sandbox import EndpointRequest, NetworkMode, PublishedPort
from skep.model.permissions.rights import api_access
from skep.model.service import PublishMode
from skep.model.values.meta import Driver
from skep.model.values.times import SECOND_NS

RESERVED_LABELS = "com.docker.swarm."
"""Labels with this prefix identify the containers of tasks."""
MEMORY_BYTES_MIN = 6 << 20
"""The smallest memory limit in bytes.  A process cannot start with less.  Source: moby, linuxMinMemory."""
NO_SOURCE = 'invalid mount config for type "bind": field Source must not be empty'

_NAME = re.compile(r"/?[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_MAC = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}|[0-9A-Fa-f]{2}(-[0-9A-Fa-f]{2}){5}")
_INTERFACE_SYSCTL = re.compile(r"net\.(ipv4|ipv6|mpls)\.\w+\.(IFNAME|ifname)\.\w+=[^,]+", re.ASCII)
_LINK = re.compile(r"/?[a-zA-Z0-9][a-zA-Z0-9_.-]*(:[a-zA-Z0-9][a-zA-Z0-9_.-]*)?")
_PORT = re.compile(r"([0-9]{1,5})(?:/(tcp|udp|sctp))?")
_PROPAGATIONS = frozenset({"rprivate", "private", "rshared", "shared", "rslave", "slave"})
_IGNORED_BIND_OPTIONS = frozenset({"", "rw", "z", "Z", "consistent", "cached", "delegated"})
_HOST_GATEWAY = "host-gateway"


class NodeDefaults(NamedTuple):
    """A node's defaults for its containers."""

    hostname: str
    host_gateway: str
    """Address at which containers reach the node.  Empty if unknown."""
    log: Driver
    """Log driver of containers that do not name one."""
    log_drivers: Mapping[str, Check] = {}
    """The drivers that send logs to other programs or machines, each with a function that checks its options."""


def checked_name(name: str) -> str:
    """Return ``name`` without a leading slash.  Raises: InvalidArgument, in Docker's words."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
    return name.removeprefix("/")


def plain_options(request: CreateRequest, *, is_step: bool = False) -> PlainOptions:
    """Return the options of a plain container that decide when it runs and on which networks.

    ``is_step`` marks a build's container.  Raises: InvalidArgument, Unimplemented.
    """
    host = request.host_config
    check_limits(host)  # only for plain containers: managers check the limits of tasks, and are stricter
    _check_health(request.healthcheck)  # the same
    _check_shared(request)
    check_option_types(host.mounts)
    restart = restart_policy(host)
    if host.auto_remove and restart.name != "no":
        raise InvalidArgument("can't create 'AutoRemove' container with restart policy")
    mode, networks = _networks(request)
    mac_address = _mac_address(request)
    streams = {
        "stdin": request.attach_stdin,
        "stdout": request.attach_stdout,
        "stderr": request.attach_stderr,
    }
    return PlainOptions(
        mode=mode,
        networks=networks,
        network_mode=host.network_mode or "default",
        mac_address=mac_address if mode is NetworkMode.BRIDGE else "",
        restart=restart,
        auto_remove=host.auto_remove,
        security_options=host.security_opt,
        volumes_from=host.volumes_from,
        attached=tuple(name for name, is_attached in streams.items() if is_attached),
        console_size=(host.console_size[0], host.console_size[1]) if len(host.console_size) == 2 else (0, 0),
        is_step=is_step,
    )


def _check_health(given: HealthConfig | None) -> None:
    """Raise InvalidArgument for an invalid health check.  Source: moby, daemon/container.go (validateHealthCheck)."""
    if given is not None and (refusal := given.refusal("Healthcheck")):
        raise InvalidArgument(refusal)


def _networks(request: CreateRequest) -> tuple[NetworkMode, tuple[EndpointRequest, ...]]:
    mode = request.host_config.network_mode
    endpoints = {
        name: one or EndpointSettings() for name, one in request.networking_config.endpoints_config.items()
    }
    match mode:
        case _ if machine.other_container(mode):
            if any(one.aliases for one in endpoints.values()):
                raise InvalidArgument(NO_ALIASES)
            kind, others = NetworkMode.CONTAINER, {}
        case "" | "default" | "bridge" | "none" | "host":
            kind = {"none": NetworkMode.NONE, "host": NetworkMode.HOST}.get(mode, NetworkMode.BRIDGE)
            others = {
                name: one for name, one in endpoints.items() if name not in ("", mode, "default", "bridge")
            }
            if any(one.aliases for name, one in endpoints.items() if name not in others):
                raise InvalidArgument(NO_ALIASES)
            if any(_has_address(one) for name, one in endpoints.items() if name not in others):
                raise InvalidArgument(NO_ADDRESS)
            for name, one in endpoints.items():
                if name not in others:
                    _check_predefined(name or "bridge", one)
            if request.host_config.links or any(one.links for one in endpoints.values()):
                raise refused("--link on a network that containers have no names on")
            if others and kind is not NetworkMode.BRIDGE:
                raise InvalidArgument("conflicting options: host and none networks stand alone")
        case _:
            own = endpoints.get(mode, EndpointSettings())
            links = dict.fromkeys((*own.links, *request.host_config.links))
            main = replace(own, mac_address=own.mac_address or request.mac_address, links=tuple(links))
            rest = {name: one for name, one in endpoints.items() if name != mode}
            kind, others = NetworkMode.NETWORKS, {mode: main, **rest}
    return kind, tuple(endpoint_request(name, one) for name, one in others.items())


def _has_address(settings: EndpointSettings) -> bool:
    ipam = settings.ipam_config
    return ipam is not None and bool(ipam.ipv4_address or ipam.ipv6_address)


def _mac_address(request: CreateRequest) -> str:
    """Return the MAC address on the node's bridge.  Raises: InvalidArgument: it is invalid, or two are given."""
    mode, endpoints = request.host_config.network_mode, request.networking_config.endpoints_config
    names = ("default", "bridge", "") if mode in ("", "default", "bridge") else (mode,)
    own = next((one for name in names if (one := endpoints.get(name)) is not None), EndpointSettings())
    if own.mac_address and request.mac_address not in ("", own.mac_address):
        raise InvalidArgument(
            "the container-wide MAC address must match the endpoint-specific MAC address for the main network, "
            "or be left empty"
        )
    return _checked_mac(own.mac_address or request.mac_address)


def _checked_mac(text: str) -> str:
    """Return a MAC address in Docker's form.  Raises: InvalidArgument: no interface can have it."""
    if not text:
        return ""
    if not _MAC.fullmatch(text):
        raise InvalidArgument(f"address {text[:64]}: invalid MAC address")
    found = text.lower().replace("-", ":")
    if int(found[:2], 16) & 1 or not found.strip("0:"):
        raise InvalidArgument(f"address {text}: a container needs a unicast address")
    return found


def _check_shared(request: CreateRequest) -> None:
    """Raise InvalidArgument for options that conflict with shared namespaces.

    Source, with its order: moby, runconfig/hostconfig.go (validateNetContainerMode), hostconfig_unix.go.
    """
    host = request.host_config
    if host.network_mode == "container:":
        raise InvalidArgument("Invalid network mode: invalid container format container:<name|id>")
    is_shared = bool(machine.other_container(host.network_mode))
    if host.links and (is_shared or host.network_mode == "host"):
        kind = "container type network" if is_shared else "host type networking"
        raise InvalidArgument(
            f"conflicting options: {kind} can't be used with links. This would result in undefined behavior"
        )
    if request.mac_address and (is_shared or host.network_mode in ("host", "none")):
        raise InvalidArgument("conflicting options: mac-address and the network mode")
    if is_shared:
        for is_given, what in (
            (request.hostname, "hostname and the network mode"),
            (host.dns, "dns and the network mode"),
            (host.extra_hosts, "custom host-to-IP mapping and the network mode"),
            (
                host.port_bindings or host.publish_all_ports,
                "port publishing and the container type network mode",
            ),
            (request.exposed_ports, "port exposing and the container type network mode"),
        ):
            if is_given:
                raise InvalidArgument(f"conflicting options: {what}")
    if host.uts_mode == "host" and request.hostname:
        raise InvalidArgument("conflicting options: hostname and the UTS mode")


def volumes_from(text: str) -> tuple[str, bool]:
    """Return the container of a ``--volumes-from`` value, and whether its mounts are read-only.

    Raises: InvalidArgument.  Source: moby, volume/mounts/volume_unix.go (ParseVolumesFrom).
    """
    name, _, mode = text.partition(":")
    if not name:
        raise InvalidArgument(f"malformed volumes-from specification: {text}")
    if mode not in ("", "ro", "rw", "z", "Z"):
        raise InvalidArgument(f"invalid mode: {mode}")
    return name, mode == "ro"


def endpoint_request(network: str, settings: EndpointSettings) -> EndpointRequest:
    """Return one network of a plain container.  Raises: InvalidArgument."""
    ipam = settings.ipam_config
    for link in settings.links:
        if not _LINK.fullmatch(link):
            raise InvalidArgument(f"bad format for links: {link[:256]}")
    if network in BUILTIN:
        _check_predefined(network, settings)
    return EndpointRequest(
        network=network,
        aliases=settings.aliases,
        address=_checked_address(ipam.ipv4_address, 4) if ipam is not None else "",
        address6=_checked_address(ipam.ipv6_address, 6) if ipam is not None else "",
        mac_address=_checked_mac(settings.mac_address),
        links=settings.links,
        gw_priority=settings.gw_priority,
        sysctls=_interface_sysctls(settings),
    )


def _interface_sysctls(settings: EndpointSettings) -> str:
    """Return the sysctls of one network's interface.  Raises: InvalidArgument.

    Source: moby, daemon/container_operations.go (validateEndpointSettings).
    """
    given = settings.driver_opts.get(ENDPOINT_SYSCTLS, "")
    for one in given.split(",") if given else ():
        if not _INTERFACE_SYSCTL.fullmatch(one):
            raise InvalidArgument(
                f"invalid endpoint settings:\nunrecognised network interface sysctl '{one[:256]}'; represent "
                "'net.X.Y.ethN.Z=V' as 'net.X.Y.IFNAME.Z=V', 'X' must be 'ipv4', 'ipv6' or 'mpls'"
            )
    return given


def _check_predefined(network: str, settings: EndpointSettings) -> None:
    """Refuse options that a predefined network does not have.  Raises: Unimplemented."""
    if settings.gw_priority:
        raise Unimplemented(
            f"GwPriority is not supported on network {network}, whose gateway has the priority 0: set the priority of "
            "the container's other networks"
        )
    if settings.driver_opts:
        raise Unimplemented(f"{ENDPOINT_SYSCTLS} is not supported on network {network}: use --sysctl")


def _checked_address(text: str, version: int) -> str:
    """Return a normalized address.  Raises: InvalidArgument, in Docker's words: not an address of that IP version.

    Source: moby 20.10, daemon/create.go (verifyNetworkingConfig).
    """
    if not text:
        return ""
    try:
        address = parsed(text)
    except ValueError:
        address = None
    is_mapped = isinstance(address, IPv6Address) and address.ipv4_mapped is not None
    if address is None or address.version != version or is_mapped:
        raise InvalidArgument(f"invalid IPv{version} address: {text[:64]}")
    return str(address)


def labels(request: CreateRequest, image: ContainerDefaults, task: TaskOptions | None) -> Mapping[str, str]:
    """Return the labels of image, request and task.  Raises: InvalidArgument: a label is reserved for tasks."""
    if task is not None:
        return {**(image.labels or {}), **request.labels, **task.labels}
    for name in request.labels:
        if name.startswith(RESERVED_LABELS):
            raise InvalidArgument(f"the label {name} is reserved for containers of tasks")
    own = {
        name: value for name, value in (image.labels or {}).items() if not name.startswith(RESERVED_LABELS)
    }
    return {**own, **request.labels}


def mounts(request: CreateRequest) -> list[Mount]:
    """Return all mounts of the request.  Raises: InvalidArgument."""
    host = request.host_config
    found = [_bind(text) for text in host.binds]
    found += host.mounts
    found += [
        Mount(
            type="tmpfs",
            target=target,
            tmpfs_options=TmpfsOptions(options=tuple((word,) for word in words.split(",") if word)),
        )
        for target, words in host.tmpfs.items()
    ]
    if any(mount.type == "bind" and not mount.source for mount in found):
        raise InvalidArgument(NO_SOURCE)
    targets = {mount.target for mount in found}
    if len(targets) < len(found):
        twice = next(one for one in targets if [mount.target for mount in found].count(one) > 1)
        raise InvalidArgument(f"Duplicate mount point: {twice}")
    anonymous = sorted(request.volumes.keys() - targets)
    found += [Mount(type="volume", target=target) for target in anonymous]
    for mount in found:
        check_paths(mount)
    return found


def container_config(
    request: CreateRequest, image: ContainerDefaults, task: TaskOptions | None, node: NodeDefaults
) -> ContainerConfig:
    """Return the container's configuration.  Its mounts are only the task's secrets and configs.

    ``task`` is None for a plain container.  Raises: InvalidArgument, Unimplemented, FailedPrecondition.
    """
    host = request.host_config
    entrypoint, command = invocation(request, image)
    is_on_host = host.network_mode == "host"
    healthcheck = _healthcheck(request, image, task)
    stop_timeout = _stop_timeout(request, image) if task is None else None
    task = task or TaskOptions(stop_grace_ns=_stop_grace_ns(stop_timeout), may_log_anywhere=True)
    exposed = _exposed(request, image, task)
    return ContainerConfig(
        path=(entrypoint + command)[0],
        args=(entrypoint + command)[1:],
        entrypoint=entrypoint,
        command=command,
        env=_environment(request, image),
        working_dir=request.working_dir or image.working_dir,
        user=request.user or image.user,
        groups=host.group_add,
        hostname=request.hostname or (node.hostname if is_on_host or host.uts_mode == "host" else ""),
        tty=request.tty,
        open_stdin=request.open_stdin,
        stdin_once=request.stdin_once,
        stop_signal=_stop_signal(request.stop_signal or image.stop_signal),
        stop_grace_ns=task.stop_grace_ns,
        stop_timeout=stop_timeout,
        init=bool(host.init),
        read_only=host.readonly_rootfs,
        mounts=task.mounts,
        nano_cpus=_nano_cpus(host),
        memory_bytes=not_negative(host.memory, "memory limit"),
        memory_reservation_bytes=not_negative(host.memory_reservation, "memory reservation"),
        pids=max(host.pids_limit or 0, 0),
        shm_bytes=not_negative(host.shm_size, "shm size") or (64 << 20),
        ulimits=host.ulimits,
        sysctls=host.sysctls,
        capability_add=host.cap_add,
        capability_drop=host.cap_drop,
        **security_options(host.security_opt)._asdict(),
        oom_score_adj=host.oom_score_adj,
        hosts=_hosts(task, host, node),
        nameservers=host.dns,
        search_domains=host.dns_search,
        dns_options=host.dns_options,
        ports=() if is_on_host else (*task.ports, *_ports(request, exposed)),
        endpoints=task.endpoints,
        machine=machine_options(host),
        api=api_access(request.labels),  # only the request's labels count, not the image's
        is_on_host=is_on_host,
        exposed_ports=tuple(sorted(exposed)),
        binds=host.binds,
        requested_mounts=host.mounts,
        tmpfs=host.tmpfs,
        healthcheck=healthcheck,
        log=_log(host.log_config, task, node),
    )


def _hosts(task: TaskOptions, host: HostConfig, node: NodeDefaults) -> tuple[str, ...]:
    lines = (*task.hosts, *map(_host_line, host.extra_hosts))
    return tuple(_with_gateway(line, node.host_gateway) for line in lines)


def _healthcheck(
    request: CreateRequest, image: ContainerDefaults, task: TaskOptions | None
) -> HealthConfig | None:
    """Return the health check.  For a task, the node limits how often the image's own health check runs."""
    least = HEALTH_INTERVAL_NS_MIN if task is not None else 0
    return health.merged(request.healthcheck, image.healthcheck, image_interval_ns_min=least)


def _log(given: LogOptions, task: TaskOptions, node: NodeDefaults) -> LogConfig:
    """Return the log configuration.  It is restricted if a user below administrator chose the destination."""
    driver = with_defaults(Driver(name=given.type, options=given.config), node.log)
    is_default = not given.type and not any(name.endswith(("-address", "-url")) for name in given.config)
    config = log_config(driver, node.log_drivers)
    return replace(config, is_restricted=not task.may_log_anywhere and not is_default)


def machine_options(host: HostConfig) -> MachineOptions:
    """Return those options of ``host`` that are stored with the container unchanged.  Raises: InvalidArgument."""
    machine.check(host, host.memory)
    return MachineOptions(**{name: getattr(host, name) for name in MachineOptions.__struct_fields__})


def _exposed(request: CreateRequest, image: ContainerDefaults, task: TaskOptions) -> set[str]:
    """Return the ports of the image and the request, and the ports that the task publishes on its node."""
    published = {f"{port.target_port}/{port.protocol}" for port in task.ports}
    return {
        *(image.exposed_ports or {}),
        *request.exposed_ports,
        *request.host_config.port_bindings,
        *published,
    }


def _environment(request: CreateRequest, image: ContainerDefaults) -> tuple[str, ...]:
    """Return the user's variables unchanged, then the image's variables that the user does not set.

    Source: moby 20.10, daemon/commit.go (merge).
    """
    named = {one.partition("=")[0] for one in request.env}
    return (*request.env, *(one for one in image.env or () if one.partition("=")[0] not in named))


def _stop_timeout(request: CreateRequest, image: ContainerDefaults) -> int | None:
    return image.stop_timeout if request.stop_timeout is None else request.stop_timeout


def _stop_grace_ns(stop_timeout: int | None) -> int:
    return DEFAULT_STOP_GRACE_NS if stop_timeout is None else max(stop_timeout, -1) * SECOND_NS


def _stop_signal(name: str) -> str:
    """Return a stop signal's name unchanged.  Raises: InvalidArgument: no such signal."""
    signal_number(name or "SIGTERM")
    return name


def invocation(request: CreateRequest, image: ContainerDefaults) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return entrypoint and command.

    An entrypoint in the request replaces the image's entrypoint and command.  A command alone replaces the command.
    Raises: InvalidArgument: there is nothing to run.
    """
    entrypoint, command = image.entrypoint or (), request.cmd or image.cmd or ()
    if request.entrypoint == ("",):  # ``--entrypoint ""`` also drops the image's entrypoint
        entrypoint, command = (), request.cmd
    elif request.entrypoint:
        return request.entrypoint, request.cmd
    if not entrypoint and not command:
        raise InvalidArgument("No command specified")
    return entrypoint, command


def restart_policy(host: HostConfig) -> RestartPolicy:
    """Return the ``--restart`` policy.  Raises: InvalidArgument."""
    name, most = host.restart_policy.name or "no", host.restart_policy.maximum_retry_count
    if name not in ("no", "always", "unless-stopped", "on-failure"):
        raise InvalidArgument(f"invalid restart policy '{name}'")
    if most < 0:
        raise InvalidArgument("maximum retry count cannot be negative")
    if most and name != "on-failure":
        raise InvalidArgument(f"maximum retry count cannot be used with restart policy '{name}'")
    return RestartPolicy(name=name, attempts_max=most)


def _nano_cpus(host: HostConfig) -> int:
    if host.cpu_quota > 0:
        return nano_cpus_of(host.cpu_quota, host.cpu_period)
    return not_negative(host.nano_cpus, "number of CPUs")


def check_limits(host: HostConfig) -> None:
    """Raise InvalidArgument for limits that contradict each other, or with which no process could start.

    Source: moby, daemon/daemon_unix.go (verifyPlatformContainerResources).
    """
    if host.nano_cpus and (host.cpu_quota or host.cpu_period):
        raise InvalidArgument("Conflicting options: Nano CPUs and CPU Period cannot both be set.")
    for value, what in ((host.memory, "limit"), (host.memory_reservation, "reservation")):
        if 0 < value < MEMORY_BYTES_MIN:
            raise InvalidArgument(f"Minimum memory {what} allowed is 6MB")
    if not -1000 <= host.oom_score_adj <= 1000:
        raise InvalidArgument(f"Invalid value {host.oom_score_adj}, range for oom score adj is [-1000, 1000]")


def not_negative(value: int, what: str) -> int:
    """Return ``value`` unless it is negative.  Raises: InvalidArgument, with ``what`` as the name of the limit."""
    if value < 0:
        raise InvalidArgument(f"invalid {what}: it must not be negative")
    return value


def _host_line(text: str) -> str:
    """Convert ``name:address`` to a line of /etc/hosts.  Raises: InvalidArgument."""
    name, separator, address = text.partition(":")
    if not separator or not name or not address:
        raise InvalidArgument(f'bad format for add-host: "{text}"')
    return f"{address} {name}"


def _with_gateway(line: str, gateway: str) -> str:
    """Replace ``host-gateway`` in a line of /etc/hosts with the node's address.  Raises: FailedPrecondition."""
    address, separator, names = line.partition(" ")
    if address != _HOST_GATEWAY:
        return line
    if not gateway:
        raise FailedPrecondition("unable to derive the IP value for host-gateway")
    return f"{gateway}{separator}{names}"


def _ports(request: CreateRequest, exposed: set[str]) -> list[PublishedPort]:
    host, found = request.host_config, []
    for text, bindings in sorted(host.port_bindings.items()):
        for binding in bindings or (PortBinding(),):  # as in the engine, an empty list means any free port
            if "-" in binding.host_port:
                raise refused(f"--publish with a range for one port ({binding.host_port})")
            if (number := parse_port(binding.host_port or "0")) is None:
                raise InvalidArgument(f'invalid port specification: "{binding.host_port}"')
            found.append(_port(text, number, _host_ip(binding.host_ip)))
    if host.publish_all_ports:
        found += [_port(text, 0, "") for text in sorted(exposed) if text not in host.port_bindings]
    return found


def _host_ip(text: str) -> str:
    """Return a normalized address.  Empty means every address of the node.  Raises: InvalidArgument."""
    try:
        return str(parsed(text)) if text else ""
    except ValueError:
        raise InvalidArgument(f"invalid IP address: {text}") from None


def _port(text: str, published: int, address: str) -> PublishedPort:
    match = _PORT.fullmatch(text)
    if match is None or not 0 < int(match[1]) <= 65535:
        raise InvalidArgument(f'invalid port specification: "{text}"')
    if match[2] == "sctp" and ":" in address:
        raise refused(f"--publish of {text} on an address of IPv6")
    return PublishedPort(
        protocol=match[2] or "tcp",
        target_port=int(match[1]),
        published_port=published,
        publish_mode=PublishMode.HOST,
        host_ip=address,
    )


def _bind(text: str) -> Mount:
    """Parse ``source:target[:options]``.  A source that is not a path names a volume.  Raises: InvalidArgument."""
    words = text.split(":")
    if len(words) == 1:
        return Mount(type="volume", target=words[0])
    if len(words) > 3 or not all(words):
        raise InvalidArgument(f"invalid volume specification: '{text}'")
    source, target = words[:2]
    options = words[2].split(",") if len(words) == 3 else []
    propagation = next((word for word in options if word in _PROPAGATIONS), "")
    known = _IGNORED_BIND_OPTIONS | _PROPAGATIONS | {"ro", "nocopy"}
    if not known.issuperset(options) or {"z", "Z"}.issubset(options):
        raise InvalidArgument(f"invalid mode: {words[2]}")
    mount = Mount(type="volume", source=source, target=target, read_only="ro" in options)
    if source.startswith("/"):
        binding = BindOptions(propagation=propagation, create_mountpoint=True)
        mount = replace(mount, type="bind", bind_options=binding)
    else:
        mount = replace(mount, volume_options=VolumeOptions(no_copy="nocopy" in options))
    try:
        check_paths(mount)
    except InvalidArgument as error:
        raise InvalidArgument(f"invalid volume specification: '{text}': {error}") from error
    return mount
