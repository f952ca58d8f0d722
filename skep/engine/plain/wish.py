"""From the body of ``docker run`` and an image to the container that runs it.  Pure.

Source: moby 20.10, daemon/create.go, daemon/commit.go (merge), volume/mounts/linux_parser.go (binds), opts of the
docker command for what it sends.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from skep.agent.executor import wish as executor_wish
from skep.agent.executor.interface import Rejected
from skep.agent.executor.mounting import NO_SOURCE
from skep.api.gosyntax import BOOLEANS
from skep.engine import apparmor, health
from skep.engine.container import ContainerConfig
from skep.engine.images.image import ContainerDefaults
from skep.engine.options import Plain, RestartWish
from skep.engine.plain.options import refused
from skep.engine.plain.requests import CreateBody, EndpointBody, HostBody
from skep.engine.spec import merged_environment, nano_cpus_of
from skep.errors import FailedPrecondition, InvalidArgument, SkepError, Unimplemented
from skep.model.addresses import parsed
from skep.model.container import (
    BindOptions,
    ContainerSpec,
    Mount,
    TmpfsOptions,
    VolumeOptions,
)
from skep.model.meta import Driver
from skep.model.sandbox import EndpointRequest, NetworkMode, PublishedPort
from skep.model.service import PublishMode
from skep.model.times import SECOND_NS

TASK_LABELS = "com.docker.swarm."
"""What begins so says whose task a container is: nobody else may say it."""

_PORT = re.compile(r"([0-9]{1,5})(?:/(tcp|udp|sctp))?")
_PROPAGATIONS = frozenset({"rprivate", "private", "rshared", "shared", "rslave", "slave"})
_MEANINGLESS_HERE = frozenset({"", "rw", "z", "Z", "consistent", "cached", "delegated"})
_HOST_GATEWAY = "host-gateway"
MEMORY_BYTES_MIN = 6 << 20
"""What a process needs to start at all: moby's linuxMinMemory."""


def plain_of(body: CreateBody) -> Plain:
    """When it runs, and on which networks.  Raises: InvalidArgument, Unimplemented."""
    host = body.host_config
    mode = host.network_mode
    endpoints = {name: one or EndpointBody() for name, one in body.networking_config.endpoints_config.items()}
    restart = _restart(host)
    common = {
        "network_mode": mode or "default",
        "restart": restart,
        "auto_remove": host.auto_remove,
        "security_options": host.security_opt,
        "attached": tuple(
            name
            for name, wanted in (
                ("stdin", body.attach_stdin),
                ("stdout", body.attach_stdout),
                ("stderr", body.attach_stderr),
            )
            if wanted
        ),
    }
    if host.auto_remove and restart.name != "no":
        raise InvalidArgument("can't create 'AutoRemove' container with restart policy")
    if mode.startswith("container:"):
        raise refused("--network container:NAME")
    match mode:
        case "" | "default" | "bridge" | "none" | "host":
            kind = {"none": NetworkMode.NONE, "host": NetworkMode.HOST}.get(mode, NetworkMode.BRIDGE)
            others = {
                name: one for name, one in endpoints.items() if name not in ("", mode, "default", "bridge")
            }
            if any(one.aliases for name, one in endpoints.items() if name not in others):
                raise InvalidArgument(
                    "network-scoped alias is supported only for containers in user defined networks"
                )
            if others and kind is not NetworkMode.BRIDGE:
                raise InvalidArgument("conflicting options: host and none networks stand alone")
        case _:
            kind, others = NetworkMode.NETWORKS, {mode: endpoints.get(mode, EndpointBody()), **endpoints}
    networks = tuple(network_wish(name, one) for name, one in others.items())
    return Plain(mode=kind, networks=networks, **common)  # type: ignore[arg-type]


def network_wish(name: str, endpoint: EndpointBody) -> EndpointRequest:
    """One network of a container."""
    ipam = endpoint.ipam_config
    return EndpointRequest(
        network=name, aliases=endpoint.aliases, address=ipam.ipv4_address if ipam is not None else ""
    )


def labels_of(body: CreateBody, image: ContainerDefaults) -> Mapping[str, str]:
    """The image's and the user's.  Raises: InvalidArgument: one that tells of a task."""
    for name in body.labels:
        if name.startswith(TASK_LABELS):
            raise InvalidArgument(f"the label {name} is for the containers of tasks")
    own = {name: value for name, value in (image.labels or {}).items() if not name.startswith(TASK_LABELS)}
    return {**own, **body.labels}


def mounts_of(body: CreateBody, image: ContainerDefaults) -> list[Mount]:
    """Everything that is mounted by the user's wish.  Raises: InvalidArgument."""
    host = body.host_config
    mounts = [_bind(text) for text in host.binds]
    mounts += host.mounts
    mounts += [
        Mount(
            type="tmpfs",
            target=target,
            tmpfs_options=TmpfsOptions(options=tuple((word,) for word in words.split(",") if word)),
        )
        for target, words in host.tmpfs.items()
    ]
    if any(mount.type == "bind" and not mount.source for mount in mounts):
        raise InvalidArgument(NO_SOURCE)
    targets = {mount.target for mount in mounts}
    if len(targets) < len(mounts):
        twice = next(one for one in targets if [mount.target for mount in mounts].count(one) > 1)
        raise InvalidArgument(f"Duplicate mount point: {twice}")
    nameless = sorted(body.volumes.keys() - targets)
    return mounts + [Mount(type="volume", target=target) for target in nameless]


def config_of(
    body: CreateBody,
    image: ContainerDefaults,
    *,
    hostname: str,
    gateway: str,
    log_default: Driver,
) -> ContainerConfig:
    """The container's configuration, but for its mounts.

    Args:
        hostname: the node's; gateway: the node's address for its containers; empty: there is none.

    Raises: InvalidArgument, Unimplemented, FailedPrecondition.
    """
    host = body.host_config
    try:
        entrypoint, command = _invocation(body, image)
        stop_signal = executor_wish.stop_signal(body.stop_signal or image.stop_signal)
        log = executor_wish.log_config(
            Driver(name=host.log_config.type, options=host.log_config.config)
            if host.log_config.type
            else log_default
        )
    except Rejected as error:
        raise InvalidArgument(str(error)) from error
    security = _security(host.security_opt)
    stop_s = body.stop_timeout if body.stop_timeout is not None else image.stop_timeout
    is_on_host = host.network_mode == "host"
    exposed = {*(image.exposed_ports or {}), *body.exposed_ports, *host.port_bindings}
    return ContainerConfig(
        path=(entrypoint + command)[0],
        args=(entrypoint + command)[1:],
        entrypoint=entrypoint,
        command=command,
        env=merged_environment(image.env or (), body.env),
        working_dir=body.working_dir or image.working_dir,
        user=body.user or image.user,
        groups=host.group_add,
        hostname=body.hostname or (hostname if is_on_host else ""),
        tty=body.tty,
        open_stdin=body.open_stdin,
        stdin_once=body.stdin_once,
        stop_signal=stop_signal,
        stop_grace_ns=(stop_s if stop_s is not None and stop_s >= 0 else 10) * SECOND_NS,
        init=bool(host.init),
        read_only=host.readonly_rootfs,
        nano_cpus=_nano_cpus(host),
        memory_bytes=_memory(host.memory, "limit"),
        memory_reservation_bytes=_memory(host.memory_reservation, "reservation"),
        pids=max(host.pids_limit or 0, 0),
        shm_bytes=_not_negative(host.shm_size, "shm size") or (64 << 20),
        ulimits=host.ulimits,
        sysctls=host.sysctls,
        capability_add=host.cap_add,
        capability_drop=host.cap_drop,
        seccomp=security.seccomp,
        apparmor=security.apparmor,
        no_new_privileges=security.no_new_privileges,
        oom_score_adj=host.oom_score_adj,
        hosts=tuple(_host_line(text, gateway) for text in host.extra_hosts),
        nameservers=host.dns,
        search_domains=host.dns_search,
        dns_options=host.dns_options,
        ports=() if is_on_host else tuple(_ports(body, exposed)),
        exposed_ports=tuple(sorted(exposed)),
        healthcheck=health.merged(body.healthcheck, image.healthcheck),
        log=log,
    )


def _restart(host: HostBody) -> RestartWish:
    name, most = host.restart_policy.name or "no", host.restart_policy.maximum_retry_count
    if name not in ("no", "always", "unless-stopped", "on-failure"):
        raise InvalidArgument(f"invalid restart policy '{name}'")
    if most < 0:
        raise InvalidArgument("maximum retry count cannot be negative")
    if most and name != "on-failure":
        raise InvalidArgument(f"maximum retry count cannot be used with restart policy '{name}'")
    return RestartWish(name=name, attempts_max=most)


def _invocation(body: CreateBody, image: ContainerDefaults) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if body.entrypoint == ("",):  # ``--entrypoint ""``: none, not the image's either
        if not body.cmd:
            raise Rejected("No command specified")
        return (), body.cmd
    return executor_wish.invocation(ContainerSpec(command=body.entrypoint or (), args=body.cmd), image)


_SECURITY_WORDS: Final = {
    "no-new-privileges": "no-new-privileges=true",
    "writable-cgroups": "writable-cgroups=true",
    "disable": "label=disable",
}
"""Options that have no value, and what they say."""


class _Security(NamedTuple):
    """What ``--security-opt`` says."""

    seccomp: str = "default"
    apparmor: str = "default"
    no_new_privileges: bool = False


def _security(options: Sequence[str]) -> _Security:
    """Raises: InvalidArgument; Unimplemented: an option that confines nothing here.

    Source: moby, daemon/daemon_unix.go (parseSecurityOpt).
    """
    found = _Security()
    for given in options:
        option = _SECURITY_WORDS.get(given, given)
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
            case ("label", _) | ("writable-cgroups", True):
                if value != "disable":  # labels are off here in any case
                    raise refused(f"--security-opt {name}")
            case "writable-cgroups", False:
                pass
            case _:
                raise InvalidArgument(f'invalid --security-opt 2: "{given}"')
    return found


def _nano_cpus(host: HostBody) -> int:
    if host.nano_cpus and (host.cpu_quota or host.cpu_period):
        raise InvalidArgument("Conflicting options: Nano CPUs and CPU Period cannot both be set.")
    if host.cpu_quota > 0:
        return nano_cpus_of(host.cpu_quota, host.cpu_period)
    return _not_negative(host.nano_cpus, "number of CPUs")


def _memory(value: int, what: str) -> int:
    """Source: moby, daemon/daemon_unix.go (verifyPlatformContainerResources)."""
    if 0 < value < MEMORY_BYTES_MIN:
        raise InvalidArgument(f"Minimum memory {what} allowed is 6MB")
    return _not_negative(value, f"memory {what}")


def _not_negative(value: int, what: str) -> int:
    if value < 0:
        raise InvalidArgument(f"invalid {what}: it must not be negative")
    return value


def _host_line(text: str, gateway: str) -> str:
    """``name:address`` as a line of /etc/hosts."""
    name, separator, address = text.partition(":")
    if not separator or not name or not address:
        raise InvalidArgument(f'bad format for add-host: "{text}"')
    if address == _HOST_GATEWAY:
        if not gateway:
            raise FailedPrecondition("unable to derive the IP value for host-gateway")
        address = gateway
    return f"{address} {name}"


def _ports(body: CreateBody, exposed: set[str]) -> list[PublishedPort]:
    host, found = body.host_config, []
    for text, bindings in sorted(host.port_bindings.items()):
        for binding in bindings or ():
            if ":" in binding.host_ip:
                raise Unimplemented(f"published ports of containers have no IPv6: {binding.host_ip}")
            if binding.host_ip and not _is_ipv4(binding.host_ip):
                raise InvalidArgument(f"invalid IP address: {binding.host_ip}")
            if "-" in binding.host_port:
                raise refused(f"--publish with a range for one port ({binding.host_port})")
            if binding.host_port and not (binding.host_port.isascii() and binding.host_port.isdigit()):
                raise InvalidArgument(f'invalid port specification: "{binding.host_port}"')
            number = int(binding.host_port or 0)
            if number > 65535:
                raise InvalidArgument(f'invalid port specification: "{binding.host_port}"')
            address = "" if binding.host_ip == "0.0.0.0" else binding.host_ip
            found.append(_port(text, number, address))
    if host.publish_all_ports:
        found += [_port(text, 0, "") for text in sorted(exposed) if not host.port_bindings.get(text)]
    return found


def _is_ipv4(text: str) -> bool:
    try:
        return parsed(text).version == 4
    except ValueError:
        return False


def _port(text: str, published: int, address: str) -> PublishedPort:
    match = _PORT.fullmatch(text)
    if match is None or not 0 < int(match[1]) <= 65535:
        raise InvalidArgument(f'invalid port specification: "{text}"')
    return PublishedPort(
        protocol=match[2] or "tcp",
        target_port=int(match[1]),
        published_port=published,
        publish_mode=PublishMode.HOST,
        host_ip=address,
    )


def _bind(text: str) -> Mount:
    """``source:target[:options]``; a source that is no path is a volume."""
    words = text.split(":")
    if len(words) == 1:
        return Mount(type="volume", target=words[0])
    if len(words) > 3 or not all(words):
        raise InvalidArgument(f"invalid volume specification: '{text}'")
    source, target = words[:2]
    options = words[2].split(",") if len(words) == 3 else []
    propagation = next((word for word in options if word in _PROPAGATIONS), "")
    for word in options:
        if word not in _MEANINGLESS_HERE | _PROPAGATIONS | {"ro", "nocopy"}:
            raise InvalidArgument(f"invalid mode: {words[2]}")
    if source.startswith("/"):
        return Mount(
            type="bind",
            source=source,
            target=target,
            read_only="ro" in options,
            bind_options=BindOptions(propagation=propagation, create_mountpoint=True),
        )
    return Mount(
        type="volume",
        source=source,
        target=target,
        read_only="ro" in options,
        volume_options=VolumeOptions(no_copy="nocopy" in options),
    )


def worded(error: SkepError) -> SkepError:
    """What a task would be rejected for, said of a request."""
    return InvalidArgument(str(error)) if isinstance(error, Rejected) else error
