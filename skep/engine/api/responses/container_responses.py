"""Containers as the Engine API shows them: ``docker inspect`` and the lines of ``docker ps``.

Fields that Skep does not have are shown with Docker's neutral values.
Source: moby 20.10, api/types/types.go (ContainerJSON), api/types/container/host_config.go, container/view.go.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from skep.engine.api.responses.network_settings import network_settings, networks_in_lists
from skep.engine.confinement import apparmor
from skep.engine.confinement.limits import swap_bytes
from skep.engine.containers.container import (
    Container,
    ContainerConfig,
    ContainerState,
    HealthStatus,
    MountPoint,
    PlainOptions,
)
from skep.engine.images.store import ImageStore
from skep.engine.runtime.bundle import Bundles
from skep.model.networks.sandbox import as_requested
from skep.model.values.times import SECOND_NS, ZERO_TIME, unix_ns

_MASKED = (
    "asound",
    "acpi",
    "kcore",
    "keys",
    "latency_stats",
    "timer_list",
    "timer_stats",
    "sched_debug",
    "scsi",
)
_READ_ONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger")

_HOST_DEFAULTS: Mapping[str, Any] = {
    "Binds": None,
    "ContainerIDFile": "",
    "NetworkMode": "default",
    "PortBindings": {},
    "RestartPolicy": {"Name": "", "MaximumRetryCount": 0},
    "AutoRemove": False,
    "VolumeDriver": "",
    "VolumesFrom": None,
    "CgroupnsMode": "private",
    "IpcMode": "private",
    "Cgroup": "",
    "Links": None,
    "PidMode": "",
    "Privileged": False,
    "PublishAllPorts": False,
    "UTSMode": "",
    "UsernsMode": "",
    "ConsoleSize": [0, 0],
    "CpuShares": 0,
    "CgroupParent": "",
    "BlkioWeight": 0,
    "BlkioWeightDevice": None,
    "BlkioDeviceReadBps": None,
    "BlkioDeviceWriteBps": None,
    "BlkioDeviceReadIOps": None,
    "BlkioDeviceWriteIOps": None,
    "CpuPeriod": 0,
    "CpuQuota": 0,
    "CpuRealtimePeriod": 0,
    "CpuRealtimeRuntime": 0,
    "CpusetCpus": "",
    "CpusetMems": "",
    "Devices": None,
    "DeviceCgroupRules": None,
    "DeviceRequests": None,
    "KernelMemory": 0,
    "KernelMemoryTCP": 0,
    "MemorySwap": 0,
    "MemorySwappiness": None,
    "OomKillDisable": False,
    "CpuCount": 0,
    "CpuPercent": 0,
    "IOMaximumIOps": 0,
    "IOMaximumBandwidth": 0,
    "MaskedPaths": [*(f"/proc/{name}" for name in _MASKED), "/sys/firmware"],
    "ReadonlyPaths": [f"/proc/{name}" for name in _READ_ONLY],
}


def inspected(
    container: Container, bundles: Bundles, exec_ids: Sequence[str], network_ids: Mapping[str, str]
) -> dict[str, Any]:
    """Return ``GET /containers/{id}/json``.  ``network_ids`` are the ids of the predefined networks by name."""
    config = container.config
    path = bundles.path(container.id)
    return {
        "Id": container.id,
        "Created": container.created_at,
        "Path": config.path,
        "Args": list(config.args),
        "State": _state(container),
        "Image": container.image_id,
        "ResolvConfPath": str(path / "resolv.conf"),
        "HostnamePath": str(path / "hostname"),
        "HostsPath": str(path / "hosts"),
        "LogPath": str(bundles.log(container.id)),
        "Name": f"/{container.name}",
        "RestartCount": container.plain.restarts if container.plain is not None else 0,
        "Driver": "overlay2",
        "Platform": "linux",
        "MountLabel": config.mount_label,
        "ProcessLabel": config.process_label,
        "AppArmorProfile": _apparmor_profile(config),
        "ExecIDs": list(exec_ids) or None,
        "HostConfig": _host_config(container),
        "GraphDriver": {
            "Data": {
                "LowerDir": ":".join(container.layers),
                "MergedDir": str(bundles.rootfs(container.id)),
                "UpperDir": str(path / "upper"),
                "WorkDir": str(path / "work"),
            },
            "Name": "overlay2",
        },
        "Mounts": _mounts(container),
        "Config": config_of(container),
        "NetworkSettings": network_settings(container, network_ids),
    }


def _apparmor_profile(config: ContainerConfig) -> str:
    """Return the AppArmor profile, or "" on machines without AppArmor, as in Docker."""
    if not apparmor.is_supported():
        return ""
    return apparmor.DEFAULT_PROFILE if config.apparmor == "default" else config.apparmor


def summary(
    container: Container, images: ImageStore, now_ns: int, network_ids: Mapping[str, str]
) -> dict[str, Any]:
    """Return one line of ``docker ps``.  ``network_ids`` are the ids of the predefined networks by name."""
    return {
        "Id": container.id,
        "Names": [f"/{container.name}"],
        "Image": _shown_image(container, images),
        "ImageID": container.image_id,
        "Command": _command(container),
        "Created": unix_ns(container.created_at) // SECOND_NS,
        "Ports": ports(container),
        "Labels": dict(container.labels),
        "State": container.status,
        "Status": status(container, now_ns),
        "Health": _health_summary(container),
        "HostConfig": {
            "NetworkMode": container.network_mode,
            **({"Annotations": notes} if (notes := dict(container.config.machine.annotations)) else {}),
        },
        "NetworkSettings": {"Networks": networks_in_lists(container, network_ids)},
        "Mounts": _mounts(container),
    }


def status(container: Container, now_ns: int) -> str:
    """Return ``Up 3 minutes``, ``Restarting (1) 5 seconds ago``, ``Exited (1) 2 hours ago``.

    Source: moby 20.10, container/state.go (String).
    """
    match container.state:
        case ContainerState.RUNNING:
            return f"Up {age(now_ns - unix_ns(container.started_at))}{_health(container)}"
        case ContainerState.PAUSED:
            return f"Up {age(now_ns - unix_ns(container.started_at))} (Paused)"
        case ContainerState.REMOVING:
            return "Removal In Progress"
        case _ if container.was_started and container.finished_at != ZERO_TIME:
            word = "Restarting" if container.is_restarting else "Exited"
            return f"{word} ({container.exit_code}) {age(now_ns - unix_ns(container.finished_at))} ago"
        case _:
            return "Created"


def age(duration_ns: int) -> str:
    """Return a duration in words: ``5 seconds``, ``About an hour``, ``3 weeks``.

    Source: docker/go-units, duration.go (HumanDuration).
    """
    seconds = duration_ns // SECOND_NS
    minutes, hours = seconds // 60, int(duration_ns / SECOND_NS / 3600 + 0.5)
    if seconds < 1:
        return "Less than a second"
    if seconds == 1:
        return "1 second"
    if seconds < 60:
        return f"{seconds} seconds"
    if minutes == 1:
        return "About a minute"
    if minutes < 60:
        return f"{minutes} minutes"
    if hours == 1:
        return "About an hour"
    if hours < 48:
        return f"{hours} hours"
    if hours < 24 * 7 * 2:
        return f"{hours // 24} days"
    if hours < 24 * 30 * 2:
        return f"{hours // 24 // 7} weeks"
    if hours < 24 * 365 * 2:
        return f"{hours // 24 // 30} months"
    return f"{int(duration_ns / SECOND_NS / 3600) // 24 // 365} years"


def _health_summary(container: Container) -> dict[str, Any]:
    health = container.health
    if health is None:
        return {"Status": "none", "FailingStreak": 0}
    return {"Status": health.status.value, "FailingStreak": health.failing_streak}


def _health(container: Container) -> str:
    if container.health is None:
        return ""
    word = container.health.status.value
    return f" (health: {word})" if container.health.status is HealthStatus.STARTING else f" ({word})"


def ports(container: Container) -> list[dict[str, Any]]:
    """Return published and exposed ports."""
    published = [
        {
            "IP": port.host_ip or "0.0.0.0",
            "PrivatePort": port.target_port,
            "PublicPort": port.published_port,
            "Type": port.protocol,
        }
        for port in (container.sandbox.ports if container.sandbox else ())
    ]
    known = {(port["PrivatePort"], port["Type"]) for port in published}
    exposed = [
        {"PrivatePort": number, "Type": protocol}
        for number, protocol in map(_split_port, container.config.exposed_ports)
        if (number, protocol) not in known
    ]
    return exposed + published if container.is_running else []


def _split_port(text: str) -> tuple[int, str]:
    number, _, protocol = text.partition("/")
    return int(number.partition("-")[0]) if number.partition("-")[0].isdigit() else 0, protocol or "tcp"


def _state(container: Container) -> dict[str, Any]:
    response: dict[str, Any] = {
        "Status": container.status,
        "Running": container.is_active,
        "Paused": container.state is ContainerState.PAUSED,
        "Restarting": container.is_restarting,
        "OOMKilled": container.oom_killed,
        "Dead": False,
        "Pid": container.pid,
        "ExitCode": container.exit_code,
        "Error": container.error,
        "StartedAt": container.started_at,
        "FinishedAt": container.finished_at,
    }
    if container.health is not None:
        response["Health"] = container.health
    return response


def config_of(container: Container) -> dict[str, Any]:
    """Return ``Config``, the options that do not depend on the machine.

    Images that are committed from the container also have them.
    """
    config = container.config
    attached = container.plain.attached if container.plain is not None else ()
    response: dict[str, Any] = {
        "Hostname": config.hostname or container.id[:12],
        "Domainname": "",
        "User": config.user,
        "AttachStdin": "stdin" in attached,
        "AttachStdout": "stdout" in attached,
        "AttachStderr": "stderr" in attached,
        "Tty": config.tty,
        "OpenStdin": config.open_stdin,
        "StdinOnce": config.stdin_once,
        "Env": list(config.env),
        "Cmd": list(config.command) or None,
        "Image": container.image,
        "Volumes": {one.destination: {} for one in config.mounts if _is_of_config(one, config)} or None,
        "WorkingDir": config.working_dir,
        "Entrypoint": list(config.entrypoint) or None,
        "OnBuild": None,
        "Labels": dict(container.labels),
    }
    if config.exposed_ports:
        response["ExposedPorts"] = {port: {} for port in config.exposed_ports}
    if config.healthcheck is not None:
        response["Healthcheck"] = config.healthcheck
    if container.plain is not None and (mac_address := _chosen_mac(container.plain)):
        response["MacAddress"] = mac_address
    if config.stop_signal:
        response["StopSignal"] = config.stop_signal
    if config.stop_timeout is not None:
        response["StopTimeout"] = config.stop_timeout
    return response


def _chosen_mac(plain: PlainOptions) -> str:
    """Return the address of ``--mac-address``, which applies to the first network of the container."""
    return plain.networks[0].mac_address if plain.networks else plain.mac_address


def _host_config(container: Container) -> dict[str, Any]:
    config = container.config
    mounts: list[Any] = list(config.requested_mounts or ())
    if config.requested_mounts is None:
        mounts = [_mount_config(mount) for mount in config.mounts if not mount.internal]
    return {
        **_HOST_DEFAULTS,
        **_machine_options(config),
        **_plain_host_config(container),
        "Binds": list(config.binds) or None,
        "LogConfig": {"Type": config.log.type, "Config": dict(config.log.options)},
        "PortBindings": _bindings(container),
        "CapAdd": list(config.capability_add) or None,
        "CapDrop": list(config.capability_drop) or None,
        "Dns": list(config.nameservers) or None,
        "DnsOptions": list(config.dns_options) or None,
        "DnsSearch": list(config.search_domains) or None,
        "ExtraHosts": extra_hosts(config.hosts) or None,
        "GroupAdd": list(config.groups) or None,
        "OomScoreAdj": config.oom_score_adj,
        "ReadonlyRootfs": config.read_only,
        "Runtime": container.runtime,
        "SecurityOpt": _security_options(container) or None,
        "ShmSize": config.shm_bytes,
        "Isolation": "default",
        "Memory": config.memory_bytes,
        "NanoCpus": 0 if config.machine.cpu_quota > 0 else config.nano_cpus,
        "MemoryReservation": config.memory_reservation_bytes,
        "PidsLimit": config.pids or None,
        "Ulimits": list(config.ulimits),
        "Init": config.init,
        **({"Sysctls": dict(config.sysctls)} if config.sysctls else {}),
        **({"Mounts": mounts} if mounts else {}),
        **({"Tmpfs": dict(config.tmpfs)} if config.tmpfs else {}),
    }


def _machine_options(config: ContainerConfig) -> dict[str, Any]:
    """Return the options that the user has set.  A privileged container masks no paths."""
    options: dict[str, Any] = msgspec.to_builtins(config.machine)
    if config.memory_bytes:
        options["MemorySwap"] = swap_bytes(config)
    if config.machine.privileged:
        options |= {"MaskedPaths": None, "ReadonlyPaths": None}
    return options


def _security_options(container: Container) -> list[str]:
    if container.plain is not None and container.plain.security_options:
        return list(container.plain.security_options)
    config = container.config
    found = ["no-new-privileges"] if config.no_new_privileges else []
    found += [f"seccomp={config.seccomp}"] if config.seccomp != "default" else []
    found += [f"apparmor={config.apparmor}"] if config.apparmor != "default" else []
    return found + [f"label={option}" for option in config.label_options]


def _plain_host_config(container: Container) -> dict[str, Any]:
    plain = container.plain
    mode = {"NetworkMode": container.network_mode}
    if plain is None:
        return mode
    return mode | {
        "RestartPolicy": {"Name": plain.restart.name, "MaximumRetryCount": plain.restart.attempts_max},
        "AutoRemove": plain.auto_remove,
        "VolumesFrom": list(plain.volumes_from) or None,
        "ConsoleSize": list(plain.console_size),
    }


def _bindings(container: Container) -> dict[str, Any]:
    has_opened = container.sandbox is not None and container.plain is None
    opened = as_requested(container.sandbox.ports) if has_opened and container.sandbox else ()
    published = opened if has_opened else container.config.ports
    bindings: dict[str, Any] = {}
    for port in published:
        binding = {"HostIp": port.host_ip, "HostPort": str(port.published_port)}
        bindings.setdefault(f"{port.target_port}/{port.protocol}", []).append(binding)
    return bindings


def _mount_config(mount: MountPoint) -> dict[str, Any]:
    response: dict[str, Any] = {"Type": mount.type, "Target": mount.destination}
    if source := mount.name or mount.source:
        response["Source"] = source
    if mount.read_only:
        response["ReadOnly"] = True
    return response


def _mounts(container: Container) -> list[dict[str, Any]]:
    config = container.config
    return [_mount(mount, config) for mount in config.mounts if not mount.internal]


def _is_of_config(mount: MountPoint, config: ContainerConfig) -> bool:
    """Return whether a mount is a volume of the image or of ``Config.Volumes``, not of a mount or bind."""
    asked = {one.target for one in config.requested_mounts or ()}
    return mount.type == "volume" and mount.anonymous and mount.destination not in asked


def _mode(mount: MountPoint, config: ContainerConfig) -> str:
    """Return the options of a mount's bind, or ``z`` for a requested volume.

    Source: moby 20.10, daemon/volumes.go (setBindModeIfNull).
    """
    for words in (bind.split(":") for bind in config.binds):
        if len(words) == 3 and words[1] == mount.destination:
            return words[2]
    return "z" if mount.type == "volume" and not _is_of_config(mount, config) else ""


def _mount(mount: MountPoint, config: ContainerConfig) -> dict[str, Any]:
    response: dict[str, Any] = {
        "Type": mount.type,
        "Name": mount.name,
        "Source": mount.source,
        "Destination": mount.destination,
        "Driver": mount.driver,
        "Mode": _mode(mount, config),
        "RW": not mount.read_only,
        "Propagation": mount.propagation or ("rprivate" if mount.type == "bind" else ""),
    }
    return {key: value for key, value in response.items() if value != "" or key not in ("Name", "Driver")}


def _command(container: Container) -> str:
    words = (container.config.path, *(f"'{arg}'" if " " in arg else arg for arg in container.config.args))
    return " ".join(words)


def _shown_image(container: Container, images: ImageStore) -> str:
    """Return the image name with which the container was created.

    If that means another image by now, return the image's id.
    """
    if container.config.is_process:
        return container.image
    image = images.lookup(container.image)
    return container.image if image is not None and image.id == container.image_id else container.image_id


def extra_hosts(lines: Sequence[str]) -> list[str]:
    """Convert lines of /etc/hosts, ``address name...``, to ``HostConfig``'s ``name:address`` per name."""
    words = [line.split() for line in lines]
    return [f"{name}:{address}" for address, *names in words for name in names]
