"""Translates a container into the runtime specification that runc reads (``config.json``).

Pure: facts that must be looked up (the user, this node's capacity) are arguments.  Defaults are Docker's (moby,
oci/defaults.go): namespaces, masked paths, capabilities, the seccomp profile, the default mounts.
"""

import resource
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from skep.engine.capacity import Capacity
from skep.engine.confinement import apparmor, capabilities, cdi, seccomp
from skep.engine.confinement.devices import NO_DEVICES, DeviceNode, Devices
from skep.engine.confinement.limits import block_io, resources
from skep.engine.confinement.machine import device_rule, other_container
from skep.engine.confinement.users import ProcessUser
from skep.engine.containers.container import Container, ContainerConfig, ExecConfig, MountPoint
from skep.errors import FailedPrecondition, InvalidArgument
from skep.model.networks.sandbox import NetworkMode
from skep.model.values.user_map import UserMap

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INIT_PATH = "/sbin/docker-init"
_PROCESS_INIT_PATH = "/run/docker-init"
"""The machine's /sbin is read-only, so the init cannot be mounted there."""
_UNLIMITED = 2**64 - 1
"""RLIM_INFINITY as the unsigned number that the runtime specification needs.  Docker's API has -1."""

_MASKED_PATHS = (
    *("/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats"),
    *("/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats"),
    *("/sys/devices/virtual/powercap", "/sys/firmware"),
)
"""Paths that are hidden, because they reveal facts about the machine or the activity of other containers."""
_READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
# In a separate network namespace, a process needs no capability to use a low port or to ping.
_LOW_PORTS = {"net.ipv4.ip_unprivileged_port_start": "0"}
_PING = {"net.ipv4.ping_group_range": "0 2147483647"}


class Shared(msgspec.Struct, frozen=True, kw_only=True):
    """Resources that a container shares with other running containers.

    Empty before the container starts, because the resources are unknown until then.
    """

    namespaces: Mapping[str, str] = {}
    """Paths on the node by type: ``network``, ``pid``, ``ipc``, and ``user`` if the container maps its users."""
    shm: str = ""
    """The node's path of the shared tmpfs for /dev/shm.  Empty if the container has a separate /dev/shm."""


NOTHING_SHARED = Shared()


class Built(msgspec.Struct, frozen=True):
    """A specification, and warnings about limits that this node could not set."""

    specification: dict[str, Any]
    warnings: tuple[str, ...]


def build(
    container: Container,
    user: ProcessUser,
    capacity: Capacity,
    *,
    rootfs: str,
    cgroup: str,
    files: Sequence[MountPoint],
    devices: Devices = NO_DEVICES,
    shared: Shared = NOTHING_SHARED,
) -> Built:
    """Return the specification of ``container``.

    Args:
        files: Mounts that the node adds itself (/etc/hosts and similar files).  They come before the user's mounts.
        devices: The devices that were found for the container's options.

    Raises: InvalidArgument: the configuration cannot work on any node; FailedPrecondition: this node cannot confine it.
    """
    config = container.config
    warnings: list[str] = []
    mounts = [*_default_mounts(container, shared), *(_mount(point, capacity) for point in files)]
    mounts += [
        _mount(point, capacity) for point in sorted(config.mounts, key=lambda one: one.destination.count("/"))
    ]
    if container.users is not None or capacity.is_in_user_namespace:
        devices, files_of_devices = _bound(devices)
        mounts += files_of_devices
    mounts += [_edited_mount(one) for one in devices.edits.mounts]
    arguments = [config.path, *config.args]
    if config.init:
        if capacity.init_binary:
            path = _PROCESS_INIT_PATH if config.is_process else INIT_PATH
            mounts.append(_bind(capacity.init_binary, path, read_only=True))
            arguments = [path, "--", *arguments]
        else:
            warnings.append("no static init on this node: the container runs without one")
    specification: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "root": {"path": rootfs, "readonly": config.read_only},
        "process": _process(config, user, capacity, arguments, warnings),
        "mounts": _without_overridden(mounts),
        "linux": _linux(container, capacity, cgroup, devices, shared, warnings),
    }
    if config.machine.uts_mode != "host":
        specification["hostname"] = config.hostname
    if config.machine.annotations:
        specification["annotations"] = dict(config.machine.annotations)
    if devices.edits.hooks:
        specification["hooks"] = cdi.oci_hooks(devices.edits.hooks)
    process = specification["process"]
    process["env"] = list(merged_environment(process["env"], devices.edits.env))
    process["user"]["additionalGids"] += devices.edits.additional_gids
    return Built(specification, tuple(warnings))


def exec_process(
    container: Container, exec: ExecConfig, user: ProcessUser, capacity: Capacity
) -> dict[str, Any]:
    """Return an exec's process specification: the container's, changed by the exec's options."""
    config = msgspec.structs.replace(
        container.config,
        env=merged_environment(container.config.env, exec.env),
        working_dir=exec.working_dir or container.config.working_dir,
        tty=exec.tty,
    )
    if exec.privileged:
        config = msgspec.structs.replace(
            config, machine=msgspec.structs.replace(config.machine, privileged=True)
        )
    process = _process(config, user, capacity, list(exec.command), [])
    process.pop("oomScoreAdj", None)  # an exec inherits it from the container
    return process


def merged_environment(base: Iterable[str], over: Iterable[str]) -> tuple[str, ...]:
    """Return the variables ``base``, overridden by ``over``.

    A name without ``=`` in ``over`` removes the variable.  Later entries override earlier ones, and the order is kept.

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


def _process(
    config: ContainerConfig, user: ProcessUser, capacity: Capacity, arguments: list[str], warnings: list[str]
) -> dict[str, Any]:
    wanted = _capabilities(config)
    given = [name for name in wanted if name in capacity.capabilities]
    if len(given) < len(wanted):
        refused = [name for name in wanted if name not in capacity.capabilities]
        warnings.append(f"this node cannot grant {', '.join(refused)}")
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
            warnings.append("this node cannot lower the OOM score")
        else:
            process["oomScoreAdj"] = config.oom_score_adj
    profile = _apparmor_profile(config)
    if profile not in (apparmor.DEFAULT_PROFILE, apparmor.UNCONFINED) and not capacity.has_apparmor:
        raise FailedPrecondition(f"AppArmor is not enabled on this machine: no profile {profile}")
    if capacity.has_apparmor:
        process["apparmorProfile"] = profile
    if config.process_label:
        process["selinuxLabel"] = config.process_label
    return process


def _capabilities(config: ContainerConfig) -> tuple[str, ...]:
    if config.machine.privileged:
        return capabilities.ALL
    return capabilities.granted(config.capability_add, config.capability_drop)


def _apparmor_profile(config: ContainerConfig) -> str:
    """Return the AppArmor profile.  A privileged container has none, unless its user has named one."""
    if config.apparmor != "default":
        return config.apparmor
    return apparmor.UNCONFINED if config.machine.privileged else apparmor.DEFAULT_PROFILE


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
        if 0 <= hard < (soft if soft >= 0 else hard + 1):
            raise InvalidArgument(
                f"ulimit soft limit must be less than or equal to hard limit: {soft} > {hard}"
            )
        most = capacity.hard_limits.get(type)
        if most is not None and (hard < 0 or hard > most):
            warnings.append(f"ulimit {limit.name}={hard} exceeds this node's limit: {most}")
            hard, soft = most, min(soft, most) if soft >= 0 else most
        limits.append({"type": type, "soft": soft & _UNLIMITED, "hard": hard & _UNLIMITED})
    return limits


def _linux(
    container: Container,
    capacity: Capacity,
    cgroup: str,
    devices: Devices,
    shared: Shared,
    warnings: list[str],
) -> dict[str, Any]:
    config, options = container.config, container.config.machine
    limits = resources(config, capacity, warnings)
    if io := block_io(options, devices.limited, capacity, warnings):
        limits["blockIO"] = io
    own_network = container.mode not in (NetworkMode.HOST, NetworkMode.CONTAINER)
    masked = (
        [*_MASKED_PATHS, *capacity.masked_paths] if options.masked_paths is None else options.masked_paths
    )
    read_only = _READONLY_PATHS if options.readonly_paths is None else options.readonly_paths
    namespaces = _namespaces(container, capacity, shared)
    linux: dict[str, Any] = {
        "namespaces": namespaces,
        **({"cgroupsPath": cgroup} if cgroup else {}),
        "resources": {"devices": _device_rules(config, [*devices.nodes, *devices.bound])} | limits,
        "maskedPaths": [] if options.privileged else masked,
        "readonlyPaths": [] if options.privileged else read_only,
        "sysctl": {
            **(_default_sysctls(container.users, capacity) if own_network else {}),
            **config.sysctls,
            **_interface_sysctls(container),
        },
    }
    joins_users = any(one["type"] == "user" and "path" in one for one in namespaces)
    reads_mappings = joins_users and container.runtime == "runc" and capacity.runc_reads_mappings
    if container.users is not None and not reads_mappings:
        linux["uidMappings"] = [one.oci for one in container.users.uids]
        linux["gidMappings"] = [one.oci for one in container.users.gids]
    if config.mount_label:
        linux["mountLabel"] = config.mount_label
    if devices.nodes:
        linux["devices"] = [_device(node) for node in devices.nodes]
    profile = _seccomp(config, capacity)
    if profile is not None:
        linux["seccomp"] = profile
    if any(point.propagation in ("shared", "rshared") for point in config.mounts):
        linux["rootfsPropagation"] = "shared"
    elif any(point.propagation in ("slave", "rslave") for point in config.mounts):
        linux["rootfsPropagation"] = "rslave"
    return linux


def _default_sysctls(users: UserMap | None, capacity: Capacity) -> Mapping[str, str]:
    """Return the default sysctls.  The kernel takes only groups that exist in the user namespace.

    Source: moby, daemon/oci_linux.go.
    """
    if users is not None:
        return {**_LOW_PORTS, "net.ipv4.ping_group_range": f"0 {users.groups_count - 1}"}
    return {**_LOW_PORTS, **_PING} if capacity.has_every_group else _LOW_PORTS


def _interface_sysctls(container: Container) -> dict[str, str]:
    """Return the sysctls of the container's single interfaces, which exist before the runtime sets them."""
    endpoints = container.sandbox.endpoints if container.sandbox is not None else ()
    return {name: value for endpoint in endpoints for name, value in endpoint.sysctls.items()}


def _namespaces(container: Container, capacity: Capacity, shared: Shared) -> list[dict[str, str]]:
    """Return the namespaces that the container creates or joins.  Namespaces of the machine are left out."""
    options = container.config.machine
    modes = {"pid": options.pid_mode, "ipc": options.ipc_mode, "uts": options.uts_mode}
    found = [{"type": "mount"}]
    found += [{"type": type} for type, mode in modes.items() if mode != "host" and not other_container(mode)]
    if container.mode not in (NetworkMode.HOST, NetworkMode.CONTAINER):
        network = {"type": "network"}
        if container.sandbox is not None:
            network["path"] = container.sandbox.netns
        found.append(network)
    # Docker's default is a private cgroup namespace on v2, and the machine's on v1.
    if (options.cgroupns_mode or ("private" if capacity.is_cgroup_v2 else "host")) == "private":
        found.append({"type": "cgroup"})
    if container.users is not None and "user" not in shared.namespaces:
        path = container.sandbox.userns if container.sandbox is not None else ""
        found.append({"type": "user", "path": path} if path else {"type": "user"})
    return found + [{"type": type, "path": path} for type, path in shared.namespaces.items()]


def _device_rules(config: ContainerConfig, nodes: Iterable[DeviceNode]) -> list[dict[str, Any]]:
    """Return the device rules.  runc adds the rules of the devices that every container has."""
    if config.machine.privileged:
        return [{"allow": True, "access": "rwm"}]
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    rules += [
        {"allow": True, "type": one.type, "major": one.major, "minor": one.minor, "access": one.access}
        for one in nodes
    ]
    return rules + [device_rule(rule) for rule in config.machine.device_cgroup_rules]


def _device(node: DeviceNode) -> dict[str, Any]:
    return {
        "path": node.path,
        "type": node.type,
        "major": node.major,
        "minor": node.minor,
        "fileMode": node.mode,
        "uid": node.uid,
        "gid": node.gid,
    }


def _bound(devices: Devices) -> tuple[Devices, list[dict[str, Any]]]:
    """Return the devices of a container in a user namespace, and the mounts of those with another path there.

    A runtime cannot make nodes in a user namespace.  It binds the machine's file of the same path, whatever that is.

    Raises: FailedPrecondition: the machine has no file of a device with its numbers.

    Source: runc, libcontainer/rootfs_linux.go (bindMountDeviceNode); crun, src/libcrun/linux.c (libcrun_create_dev).
    """
    for one in devices.nodes:
        if not one.source:
            raise FailedPrecondition(
                f"no device can be made in a user namespace, and this machine has no file for {one.path} with the "
                f"numbers {one.major}:{one.minor}: correct the CDI description, or use another node"
            )
    bound = tuple(one for one in devices.nodes if one.source != one.path)
    kept = tuple(one for one in devices.nodes if one.source == one.path)
    mounts = [_bind(one.source, one.path, "rprivate", read_only=False) for one in bound]
    return msgspec.structs.replace(devices, nodes=kept, bound=bound), mounts


def _seccomp(config: ContainerConfig, capacity: Capacity) -> msgspec.Raw | None:
    if config.seccomp == "unconfined" or (config.seccomp == "default" and config.machine.privileged):
        return None
    given = frozenset(_capabilities(config)) & capacity.capabilities
    if config.seccomp == "default":
        return seccomp.default(given, has_x32=capacity.has_x32)
    return seccomp.custom(config.seccomp.encode(), given)


def _default_mounts(container: Container, shared: Shared) -> list[dict[str, Any]]:
    def entry(destination: str, type: str, source: str, *options: str) -> dict[str, Any]:
        return {"destination": destination, "type": type, "source": source, "options": list(options)}

    safe = ("nosuid", "noexec", "nodev")
    config, options = container.config, container.config.machine
    writable = "rw" if options.privileged else "ro"
    # The kernel does not let runc mount it again read-only in a user namespace (moby, daemon/oci_linux.go).
    cgroup_access = writable if container.users is None else "rw"
    mounts = [
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
        entry("/sys", "sysfs", "sysfs", *safe, writable),
        entry("/sys/fs/cgroup", "cgroup", "cgroup", cgroup_access, *safe),
        entry("/dev/mqueue", "mqueue", "mqueue", *safe),
    ]
    shm = "/dev/shm" if options.ipc_mode == "host" else shared.shm
    if shm:
        mounts.append(_bind(shm, "/dev/shm", "rprivate", read_only=False))
    elif options.ipc_mode != "none":
        mounts.append(entry("/dev/shm", "tmpfs", "shm", *safe, "mode=1777", f"size={config.shm_bytes}"))
    return mounts


def _edited_mount(mount: cdi.BindMount) -> dict[str, Any]:
    return {
        "destination": mount.container_path,
        "type": mount.type or "bind",
        "source": mount.host_path,
        "options": list(mount.options or ("ro", "nosuid", "nodev", "bind")),
    }


def _mount(point: MountPoint, capacity: Capacity) -> dict[str, Any]:
    """Return a mount entry.  Raises: FailedPrecondition: mounts below it cannot be made read-only."""
    options = (point.propagation or "rprivate", *point.options)
    mount = _bind(point.source, point.destination, *options, read_only=point.read_only)
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


def _bind(source: str, destination: str, *options: str, read_only: bool) -> dict[str, Any]:
    # Leave out "rw": since 1.2, runc treats it as a change of flags, and drops noexec, nosuid and nodev of the source.
    all_options = ["rbind", *(["ro"] if read_only else []), *options]
    return {"destination": destination, "type": "bind", "source": source, "options": all_options}


def _without_overridden(mounts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep only the last mount of each destination, at its position."""
    last: dict[str, dict[str, Any]] = {}
    for mount in mounts:
        last.pop(mount["destination"], None)
        last[mount["destination"]] = mount
    return list(last.values())
