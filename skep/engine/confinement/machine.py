"""Options of a container that concern the machine: devices, namespaces, and limits other than memory and processors.

They are fields of ``HostConfig`` with Docker's names.  They are kept with the container and shown as the user gave
them.

Source: moby 20.10, api/types/container/host_config.go; the checks daemon/daemon_unix.go
(verifyPlatformContainerSettings, verifyPlatformContainerResources) and runconfig/hostconfig_unix.go.
"""

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

import msgspec

from skep.errors import InvalidArgument
from skep.model.values.encoding import ApiObject, GoInt
from skep.model.values.user_map import UserMap

CONTAINER: Final = "container:"
"""Prefix of a mode that shares another container's namespace."""
SWAPPINESS_MAX: Final = 100
"""Highest value of ``--memory-swappiness``.  Source: moby, daemon/daemon_unix.go."""
_NAME_MAX: Final = 255
"""Longest file name in bytes (NAME_MAX of Linux)."""
_PATH_MAX: Final = 2048
"""Longest path in characters.

The kernel's limit of 4096 includes the mount point before it, and the container's id and file names after it.
"""

_RULE = re.compile(r"([acb]) ([0-9]{1,10}|\*):([0-9]{1,10}|\*) ([rwm]{1,3})")
_ACCESS = re.compile(r"[rwm]{1,3}")


class DeviceMapping(ApiObject):
    """``--device``: a device, or every device in a directory.  Empty ``cgroup_permissions`` mean ``rwm``."""

    __go_name__: ClassVar[str | None] = "container.DeviceMapping"

    path_on_host: str = msgspec.field(name="PathOnHost", default="")
    path_in_container: str = msgspec.field(name="PathInContainer", default="")
    cgroup_permissions: str = msgspec.field(name="CgroupPermissions", default="")


class DeviceRequest(ApiObject):
    """``--gpus``, or CDI devices (``driver`` cdi).

    ``count`` -1 means all.  ``capabilities`` has alternative sets, one of which the device must have.
    """

    __go_name__: ClassVar[str | None] = "container.DeviceRequest"

    driver: str = msgspec.field(name="Driver", default="")
    count: GoInt = msgspec.field(name="Count", default=0)
    device_ids: tuple[str, ...] = msgspec.field(name="DeviceIDs", default=())
    capabilities: tuple[tuple[str, ...], ...] = msgspec.field(name="Capabilities", default=())
    options: Mapping[str, str] = msgspec.field(name="Options", default={})


class WeightDevice(ApiObject):
    """``--blkio-weight-device``."""

    __go_name__: ClassVar[str | None] = "blkiodev.WeightDevice"

    path: str = ""
    weight: GoInt = 0


class ThrottleDevice(ApiObject):
    """``--device-read-bps`` and similar options.  ``rate`` is bytes or operations per second."""

    __go_name__: ClassVar[str | None] = "blkiodev.ThrottleDevice"

    path: str = ""
    rate: int = 0


class MachineOptions(ApiObject):
    """A container's options about the machine, with Docker's defaults."""

    __go_name__: ClassVar[str | None] = "container.HostConfig"

    privileged: bool = False
    devices: tuple[DeviceMapping, ...] = ()
    device_cgroup_rules: tuple[str, ...] = ()
    device_requests: tuple[DeviceRequest, ...] = ()
    pid_mode: str = msgspec.field(name="PidMode", default="")
    ipc_mode: str = ""
    uts_mode: str = msgspec.field(name="UTSMode", default="")
    userns_mode: str = ""
    cgroupns_mode: str = ""
    cgroup_parent: str = ""
    """Parent of its control group.  Empty for the node's default."""
    cpu_shares: int = msgspec.field(name="CpuShares", default=0)
    cpu_period: int = msgspec.field(name="CpuPeriod", default=0)
    """Period of ``cpu_quota`` in microseconds.  0 for the kernel's default."""
    cpu_quota: int = msgspec.field(name="CpuQuota", default=0)
    """Processor time per period in microseconds.  0 or negative for no quota."""
    cpuset_cpus: str = msgspec.field(name="CpusetCpus", default="")
    cpuset_mems: str = msgspec.field(name="CpusetMems", default="")
    blkio_weight: GoInt = 0
    blkio_weight_device: tuple[WeightDevice, ...] = ()
    blkio_device_read_bps: tuple[ThrottleDevice, ...] = ()
    blkio_device_write_bps: tuple[ThrottleDevice, ...] = ()
    blkio_device_read_iops: tuple[ThrottleDevice, ...] = msgspec.field(name="BlkioDeviceReadIOps", default=())
    blkio_device_write_iops: tuple[ThrottleDevice, ...] = msgspec.field(
        name="BlkioDeviceWriteIOps", default=()
    )
    memory_swap: int = 0
    memory_swappiness: int | None = None
    oom_kill_disable: bool | None = None
    annotations: Mapping[str, str] = {}
    masked_paths: tuple[str, ...] | None = None
    """Paths to mask, or None for Docker's default."""
    readonly_paths: tuple[str, ...] | None = None

    @property
    def throttles(self) -> Mapping[str, tuple[ThrottleDevice, ...]]:
        """Block device limits by their name in the runtime specification."""
        return {
            "throttleReadBpsDevice": self.blkio_device_read_bps,
            "throttleWriteBpsDevice": self.blkio_device_write_bps,
            "throttleReadIOPSDevice": self.blkio_device_read_iops,
            "throttleWriteIOPSDevice": self.blkio_device_write_iops,
        }


def other_container(mode: str) -> str:
    """Return the container that a mode ``container:NAME`` names, or ""."""
    return mode.removeprefix(CONTAINER) if mode.startswith(CONTAINER) else ""


def check(options: MachineOptions, memory_bytes: int) -> None:
    """Refuse options that cannot work on any node, in Docker's words.  ``memory_bytes`` is the limit, 0 for none.

    Raises: InvalidArgument.
    """
    _check_modes(options)
    _check_cgroup_parent(options.cgroup_parent)
    _check_memory(options, memory_bytes)
    if options.cpu_shares < 0:
        raise InvalidArgument(f"invalid CPU shares ({options.cpu_shares}): value must be a positive integer")
    if options.cpu_period and not 1_000 <= options.cpu_period <= 1_000_000:
        raise InvalidArgument(
            "CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)"
        )
    if 0 < options.cpu_quota < 1_000:
        raise InvalidArgument("CPU cfs quota can not be less than 1ms (i.e. 1000)")
    for text, what in ((options.cpuset_cpus, "cpus"), (options.cpuset_mems, "mems")):
        if text and numbers(text) is None:
            raise InvalidArgument(f"Invalid value {text} for cpuset {what}")
    _check_block_io(options)
    for rule in options.device_cgroup_rules:
        device_rule(rule)
    for device in options.devices:
        if device.cgroup_permissions and not _ACCESS.fullmatch(device.cgroup_permissions):
            raise InvalidArgument(f"bad mode specified: {device.cgroup_permissions}")
        for path in (device.path_on_host, device.path_in_container or device.path_on_host):
            if not path.startswith("/"):
                raise InvalidArgument(f"{path} is not an absolute path")
            _check_zero(path)
    if "" in options.annotations:
        raise InvalidArgument("invalid Annotations: the empty string is not permitted as an annotation key")


def check_mapped(options: MachineOptions, network_mode: str, users: UserMap | None) -> None:
    """Refuse options that need the machine's root, on a node that maps users, in Docker's words.

    Raises: InvalidArgument.  Source: moby 20.10, daemon/daemon_unix.go (verifyPlatformContainerSettings).
    """
    if users is None or options.userns_mode == "host":
        return
    if options.privileged:
        raise InvalidArgument(
            "privileged mode is incompatible with user namespaces.  You must run the container in the host namespace "
            "when running privileged mode"
        )
    if network_mode == "host":
        raise InvalidArgument("cannot share the host's network namespace when user namespaces are enabled")
    if options.pid_mode == "host":
        raise InvalidArgument("cannot share the host PID namespace when user namespaces are enabled")


def device_rule(text: str) -> dict[str, object]:
    """Convert ``c 1:3 rwm`` to a rule of the runtime specification.  Raises: InvalidArgument.

    Source: moby, oci/oci.go (AppendDevicePermissionsFromCgroupRules).
    """
    match = _RULE.fullmatch(text)
    if match is None:
        raise InvalidArgument(f"invalid device cgroup rule format: '{text}'")
    kind, major, minor, access = match.groups()
    rule: dict[str, object] = {"allow": True, "type": kind, "access": access}
    for name, number in (("major", major), ("minor", minor)):
        if number != "*":
            rule[name] = int(number)
    return rule


def numbers(ranges: str) -> frozenset[int] | None:
    """Return the numbers of ``0-3,8``, or None if the text is invalid.

    Source: moby, pkg/parsers/parsers.go (ParseUintList; at most 8192 processors).
    """
    bits = 0  # a bit mask, because ranges may overlap many times
    for part in ranges.split(","):
        first, separator, last = part.partition("-")
        ends = (first, last if separator else first)
        if not all(end.isascii() and end.isdigit() and len(end) <= 4 for end in ends):
            return None
        if int(ends[0]) > int(ends[1]):
            return None
        bits |= (1 << int(ends[1]) + 1) - (1 << int(ends[0]))
    return frozenset(number for number in range(bits.bit_length()) if bits >> number & 1)


def _check_modes(options: MachineOptions) -> None:
    modes: Sequence[tuple[str, str, Sequence[str]]] = (
        ("PID mode", options.pid_mode, ("", "host")),
        ("IPC mode", options.ipc_mode, ("", "none", "private", "shareable", "host")),
        ("UTS mode", options.uts_mode, ("", "host")),
        ("user namespace mode", options.userns_mode, ("", "host")),
        ("cgroup namespace mode", options.cgroupns_mode, ("", "private", "host")),
    )
    for what, mode, known in modes:
        is_shared = what in ("PID mode", "IPC mode") and bool(other_container(mode))
        if mode == "container:" and what == "IPC mode":
            raise InvalidArgument('can\'t join IPC of container : invalid name or ID supplied: ""')
        if mode not in known and not is_shared:
            raise InvalidArgument(f"{'Invalid' if what == 'IPC mode' else 'invalid'} {what}: {mode}")


def _check_cgroup_parent(path: str) -> None:
    """Refuse paths with ``..``.

    This is stricter than Docker: runc would resolve them and create a group outside the named parent.
    """
    names = path.split("/")
    if {".", ".."} & set(names):
        raise InvalidArgument(f"invalid cgroup parent {path}: it contains . or ..")
    is_long = len(path) > _PATH_MAX or any(len(name.encode()) > _NAME_MAX for name in names)
    if is_long or not all(char.isprintable() for char in path):
        raise InvalidArgument(f"invalid cgroup parent {path[:_NAME_MAX]!r}: not the path of a cgroup")


def _check_memory(options: MachineOptions, memory_bytes: int) -> None:
    if memory_bytes > 0 and 0 < options.memory_swap < memory_bytes:
        raise InvalidArgument("Minimum memoryswap limit should be larger than memory limit, see usage")
    if memory_bytes == 0 and options.memory_swap > 0:
        raise InvalidArgument("You should always set the Memory limit when using Memoryswap limit, see usage")
    swappiness = options.memory_swappiness
    if swappiness is not None and not -1 <= swappiness <= SWAPPINESS_MAX:
        raise InvalidArgument(
            f"Invalid value: {swappiness}, valid memory swappiness range is 0-{SWAPPINESS_MAX}"
        )


def _check_block_io(options: MachineOptions) -> None:
    for weighted in options.blkio_weight_device:
        _check_zero(weighted.path)
    for weight in (options.blkio_weight, *(one.weight for one in options.blkio_weight_device)):
        if weight and not 10 <= weight <= 1000:
            raise InvalidArgument("Range of blkio weight is from 10 to 1000")
    for devices in options.throttles.values():
        for device in devices:
            _check_zero(device.path)
            if device.rate < 0:
                raise InvalidArgument(f"invalid rate for device: {device.path}:{device.rate}")


def _check_zero(path: str) -> None:
    if "\0" in path:
        raise InvalidArgument(f"invalid path {path!r}: it contains a zero byte")
