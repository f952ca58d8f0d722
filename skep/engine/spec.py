"""From a container to the runtime specification that runc reads (``config.json``).

Pure: what has to be looked up (the user, what this node can do) comes in as arguments.  Defaults are Docker's
(moby, oci/defaults.go): namespaces, masked paths, capabilities, the seccomp profile, the default mounts.
"""

import resource
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from skep.engine import apparmor, capabilities, seccomp
from skep.engine.container import Container, ContainerConfig, ExecConfig, MountPoint
from skep.engine.users import Identity
from skep.errors import FailedPrecondition, InvalidArgument
from skep.model.sandbox import NetworkMode

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INIT_PATH = "/sbin/docker-init"
CPU_PERIOD_US = 100_000

_MASKED_PATHS = (
    *("/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats"),
    *("/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats"),
    *("/sys/devices/virtual/powercap", "/sys/firmware"),
)
"""Files that reveal the machine, or let one container measure another's activity."""
_READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_DEFAULT_SYSCTLS = {
    # A process needs no capability to use a low port or to ping, in a network namespace of its own.
    "net.ipv4.ip_unprivileged_port_start": "0",
    "net.ipv4.ping_group_range": "0 2147483647",
}


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What this node can give its containers at most."""

    capabilities: frozenset[str]
    hard_limits: Mapping[str, int] = {}
    """Hard limits of this process by name (``RLIMIT_NOFILE``), where it may not raise them."""
    controllers: frozenset[str]
    has_swap_accounting: bool
    may_lower_oom_score: bool = True
    is_cgroup_v2: bool = False
    has_apparmor: bool = False
    masked_paths: tuple[str, ...] = ()
    """Of this machine, beside those that are masked everywhere."""
    has_keyrings: bool = True
    """Whether each container gets a session keyring of its own."""
    init_binary: str = ""
    """A static init on the node, empty when there is none."""
    has_x32: bool = True
    """Whether the kernel may run x32 calls."""
    has_recursive_read_only: bool = False
    """Whether a mount can be made read-only with all mounts below it."""


class Built(msgspec.Struct, frozen=True):
    """A specification, and warnings of limits that this node could not set."""

    specification: dict[str, Any]
    warnings: tuple[str, ...]


def build(
    container: Container,
    user: Identity,
    capacity: Capacity,
    *,
    rootfs: str,
    cgroup: str,
    files: Sequence[MountPoint],
) -> Built:
    """The specification of ``container``.

    ``files``: mounts that the node makes itself (/etc/hosts and its like), placed before the user's.
    Raises: InvalidArgument: the configuration cannot work on any node; FailedPrecondition: this one cannot confine it.
    """
    config = container.config
    warnings: list[str] = []
    mounts = [*_default_mounts(config, capacity), *(_mount(point, capacity) for point in files)]
    mounts += [
        _mount(point, capacity) for point in sorted(config.mounts, key=lambda one: one.destination.count("/"))
    ]
    arguments = [config.path, *config.args]
    if config.init:
        if capacity.init_binary:
            mounts.append(_bind(capacity.init_binary, INIT_PATH, read_only=True))
            arguments = [INIT_PATH, "--", *arguments]
        else:
            warnings.append("no static init on this node: the container runs without one")
    specification: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "hostname": config.hostname,
        "root": {"path": rootfs, "readonly": config.read_only},
        "process": _process(config, user, capacity, arguments, warnings),
        "mounts": _without_overridden(mounts),
        "linux": _linux(container, capacity, cgroup, warnings),
    }
    return Built(specification, tuple(warnings))


def exec_process(
    container: Container, exec: ExecConfig, user: Identity, capacity: Capacity
) -> dict[str, Any]:
    """The process specification of an exec: the container's, with the options of the exec."""
    config = msgspec.structs.replace(
        container.config,
        env=merged_environment(container.config.env, exec.env),
        working_dir=exec.working_dir or container.config.working_dir,
        tty=exec.tty,
    )
    if exec.privileged:
        config = msgspec.structs.replace(config, capability_add=("ALL",), capability_drop=())
    process = _process(config, user, capacity, list(exec.command), [])
    process.pop("oomScoreAdj", None)  # inherited from the container
    return process


def nano_cpus_of(quota_us: int, period_us: int) -> int:
    """Billionths of a processor that a quota in a period is.  ``period_us``: 0 is the kernel's."""
    return quota_us * 1_000_000_000 // (period_us or CPU_PERIOD_US)


def merged_environment(base: Iterable[str], over: Iterable[str]) -> tuple[str, ...]:
    """``base`` with the values of ``over``; a bare name in ``over`` removes it.  Later ones win, order is kept.

    Source: moby, container/env.go (ReplaceOrAppendEnvValues).
    """
    result = {entry.partition("=")[0]: entry for entry in base}
    for entry in over:
        name, separator, _ = entry.partition("=")
        if separator:
            result[name] = entry
        else:
            result.pop(name, None)
    return tuple(result.values())


def resources(config: ContainerConfig, capacity: Capacity, warnings: list[str]) -> dict[str, Any]:
    """``linux.resources`` for the limits of ``config``; limits without a controller become warnings."""
    result: dict[str, Any] = {}
    if config.memory_bytes or config.memory_reservation_bytes:
        if "memory" in capacity.controllers:
            result["memory"] = memory = {}
            if config.memory_bytes:
                memory["limit"] = config.memory_bytes
                if capacity.has_swap_accounting:
                    memory["swap"] = 2 * config.memory_bytes
            if config.memory_reservation_bytes:
                memory["reservation"] = config.memory_reservation_bytes
        else:
            warnings.append("Your kernel does not support memory limit capabilities. Limitation discarded.")
    if config.nano_cpus:
        if "cpu" in capacity.controllers:
            quota_us = config.nano_cpus * CPU_PERIOD_US // 1_000_000_000
            result["cpu"] = {"quota": max(quota_us, 1000), "period": CPU_PERIOD_US}  # the kernel's least
        else:
            warnings.append("Your kernel does not support CPU cfs quota. Quota discarded.")
    if config.pids > 0:
        if "pids" in capacity.controllers:
            result["pids"] = {"limit": config.pids}
        else:
            warnings.append("Your kernel does not support pids limit capabilities. PIDs limit discarded.")
    return result


def _process(
    config: ContainerConfig, user: Identity, capacity: Capacity, arguments: list[str], warnings: list[str]
) -> dict[str, Any]:
    wanted = capabilities.granted(config.capability_add, config.capability_drop)
    given = [name for name in wanted if name in capacity.capabilities]
    if len(given) < len(wanted):
        refused = [name for name in wanted if name not in capacity.capabilities]
        warnings.append(f"this node may not give {', '.join(refused)}")
    process: dict[str, Any] = {
        "terminal": config.tty,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": [user.gid, *user.groups]},
        "args": arguments,
        "env": _environment(config),
        "cwd": config.working_dir or "/",
        "noNewPrivileges": config.no_new_privileges,
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), given),
        "rlimits": _rlimits(config, capacity, warnings),
    }
    if config.oom_score_adj:
        if config.oom_score_adj < 0 and not capacity.may_lower_oom_score:
            warnings.append("this node may not lower the OOM score")
        else:
            process["oomScoreAdj"] = config.oom_score_adj
    if config.apparmor not in ("default", apparmor.UNCONFINED) and not capacity.has_apparmor:
        raise FailedPrecondition(f"AppArmor is not enabled on this machine: no profile {config.apparmor}")
    if capacity.has_apparmor:
        is_default = config.apparmor == "default"
        process["apparmorProfile"] = apparmor.DEFAULT_PROFILE if is_default else config.apparmor
    return process


def _environment(config: ContainerConfig) -> list[str]:
    defaults = [DEFAULT_PATH, f"HOSTNAME={config.hostname}"]
    if config.tty:
        defaults.append("TERM=xterm")
    return list(merged_environment(defaults, config.env))


def _rlimits(config: ContainerConfig, capacity: Capacity, warnings: list[str]) -> list[dict[str, Any]]:
    limits = []
    for limit in config.ulimits:
        type = f"RLIMIT_{limit.name.upper()}"
        if not hasattr(resource, type):
            raise InvalidArgument(f"invalid ulimit type: {limit.name}")
        hard, soft = limit.hard, limit.soft
        most = capacity.hard_limits.get(type)
        if most is not None and (hard < 0 or hard > most):
            warnings.append(f"ulimit {limit.name}={hard} is more than this node may give: {most}")
            hard, soft = most, min(soft, most) if soft >= 0 else most
        unlimited = 2**64 - 1
        limits.append({"type": type, "soft": soft % (unlimited + 1), "hard": hard % (unlimited + 1)})
    return limits


def _linux(container: Container, capacity: Capacity, cgroup: str, warnings: list[str]) -> dict[str, Any]:
    config = container.config
    namespaces = [{"type": type} for type in ("mount", "pid", "ipc", "uts")]
    is_on_host = container.mode is NetworkMode.HOST
    if not is_on_host:
        network = {"type": "network"}
        if container.sandbox is not None:
            network["path"] = container.sandbox.netns
        namespaces.append(network)
    if capacity.is_cgroup_v2:
        namespaces.append({"type": "cgroup"})
    linux: dict[str, Any] = {
        "namespaces": namespaces,
        "cgroupsPath": cgroup,
        # runc adds the devices every container may use.
        "resources": {"devices": [{"allow": False, "access": "rwm"}]} | resources(config, capacity, warnings),
        "maskedPaths": [*_MASKED_PATHS, *capacity.masked_paths],
        "readonlyPaths": _READONLY_PATHS,
        "sysctl": ({} if is_on_host else _DEFAULT_SYSCTLS) | dict(config.sysctls),
    }
    profile = _seccomp(config, capacity)
    if profile is not None:
        linux["seccomp"] = profile
    if any(point.propagation in ("shared", "rshared") for point in config.mounts):
        linux["rootfsPropagation"] = "shared"
    elif any(point.propagation in ("slave", "rslave") for point in config.mounts):
        linux["rootfsPropagation"] = "rslave"
    return linux


def _seccomp(config: ContainerConfig, capacity: Capacity) -> msgspec.Raw | None:
    if config.seccomp == "unconfined":
        return None
    given = (
        frozenset(capabilities.granted(config.capability_add, config.capability_drop)) & capacity.capabilities
    )
    if config.seccomp == "default":
        return seccomp.default(given, has_x32=capacity.has_x32)
    return seccomp.custom(config.seccomp.encode(), given)


def _default_mounts(config: ContainerConfig, capacity: Capacity) -> list[dict[str, Any]]:
    def entry(destination: str, type: str, source: str, *options: str) -> dict[str, Any]:
        return {"destination": destination, "type": type, "source": source, "options": list(options)}

    safe = ("nosuid", "noexec", "nodev")
    return [
        entry("/proc", "proc", "proc", *safe),
        entry("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        entry(
            "/dev/pts",
            "devpts",
            "devpts",
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620",
            "gid=5",
        ),
        entry("/sys", "sysfs", "sysfs", *safe, "ro"),
        entry("/sys/fs/cgroup", "cgroup", "cgroup", "ro", *safe),
        entry("/dev/mqueue", "mqueue", "mqueue", *safe),
        entry("/dev/shm", "tmpfs", "shm", *safe, "mode=1777", f"size={config.shm_bytes}"),
    ]


def _mount(point: MountPoint, capacity: Capacity) -> dict[str, Any]:
    """Raises: FailedPrecondition: mounts below it cannot be made read-only."""
    if point.type == "tmpfs":
        return {
            "destination": point.destination,
            "type": "tmpfs",
            "source": "tmpfs",
            "options": [*point.options, *(["ro"] if point.read_only else [])],
        }
    mount = _bind(point.source, point.destination, read_only=point.read_only)
    mount["options"] = [*mount["options"], point.propagation or "rprivate", *point.options]
    if "bind" in point.options:
        mount["options"].remove("rbind")
    if point.read_only_below and not capacity.has_recursive_read_only:
        raise FailedPrecondition(
            "recursively read-only mounts need Linux 5.12: they are not supported by this node"
        )
    is_below = point.read_only_below is not False and not point.internal
    if point.read_only and is_below and capacity.has_recursive_read_only:
        mount["options"].append("rro")
    return mount


def _bind(source: str, destination: str, *, read_only: bool) -> dict[str, Any]:
    options = ["rbind", "ro" if read_only else "rw"]
    return {"destination": destination, "type": "bind", "source": source, "options": options}


def _without_overridden(mounts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One mount per destination, the later one, at its position."""
    last: dict[str, dict[str, Any]] = {}
    for mount in mounts:
        last.pop(mount["destination"], None)
        last[mount["destination"]] = mount
    return list(last.values())
