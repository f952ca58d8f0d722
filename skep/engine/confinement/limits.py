"""Translates a container's limits into the runtime specification.  Limits that the kernel lacks become warnings.  Pure.

Source: moby 20.10, daemon/daemon_unix.go (verifyPlatformContainerResources: error texts), daemon/oci_linux.go.
"""

from collections.abc import Mapping
from typing import Any, Final

from skep.engine.capacity import Capacity
from skep.engine.confinement.machine import MachineOptions, numbers
from skep.engine.containers.container import ContainerConfig
from skep.errors import InvalidArgument

CPU_PERIOD_US: Final = 100_000
"""Docker's default period of a CPU quota, in microseconds."""
_THROTTLES: Final = {
    "throttleReadBpsDevice": "BPS Block I/O read",
    "throttleWriteBpsDevice": "BPS Block I/O write",
    "throttleReadIOPSDevice": "IOPS Block read",
    "throttleWriteIOPSDevice": "IOPS Block write",
}


def check_cpus(nano_cpus: int, available: int) -> None:
    """Refuse a limit below 0 or above the number of processors.  Raises: InvalidArgument, in Docker's words.

    Limits of tasks are not refused, because a service may run on larger nodes and on this node.  Its task here then has
    no limit.

    Source: moby 20.10, daemon/daemon_unix.go (verifyPlatformContainerResources).
    """
    if not 0 <= nano_cpus <= available * 1_000_000_000:
        raise InvalidArgument(
            f"Range of CPUs is from 0.01 to {available}.00, as there are only {available} CPUs available"
        )


def nano_cpus_of(quota_us: int, period_us: int) -> int:
    """Convert a quota per period to billionths of a processor.  ``period_us`` 0 means the kernel's default."""
    return quota_us * 1_000_000_000 // (period_us or CPU_PERIOD_US)


def swap_bytes(config: ContainerConfig) -> int:
    """Return the limit in bytes for memory and swap together.  -1 means unlimited, and 0 that none is set."""
    return config.machine.memory_swap or 2 * config.memory_bytes


def resources(config: ContainerConfig, capacity: Capacity, warnings: list[str]) -> dict[str, Any]:
    """Return ``linux.resources`` for the limits of ``config``, except block device limits.

    Raises: InvalidArgument: this machine does not have the processors or memory nodes.
    """
    found = {
        "memory": _memory(config, capacity, warnings),
        "cpu": _cpu(config, capacity, warnings),
        "pids": _pids(config, capacity, warnings),
    }
    return {name: limits for name, limits in found.items() if limits}


def _memory(config: ContainerConfig, capacity: Capacity, warnings: list[str]) -> dict[str, Any]:
    memory: dict[str, Any] = {}
    options = config.machine
    is_limited = bool(config.memory_bytes or config.memory_reservation_bytes)
    if "memory" not in capacity.controllers:
        if is_limited:
            warnings.append("Your kernel does not support memory limit capabilities. Limitation discarded.")
        return memory
    if config.memory_bytes:
        memory["limit"] = config.memory_bytes
        if capacity.has_swap_accounting:
            memory["swap"] = swap_bytes(config)
        elif options.memory_swap:
            warnings.append(
                "Your kernel does not support swap limit capabilities or the cgroup is not mounted. "
                "Memory limited without swap."
            )
    if config.memory_reservation_bytes:
        memory["reservation"] = config.memory_reservation_bytes
    if options.memory_swappiness not in (None, -1):
        if capacity.is_cgroup_v2:
            warnings.append(
                "Your kernel does not support memory swappiness capabilities or the cgroup is not mounted. "
                "Memory swappiness discarded."
            )
        else:
            memory["swappiness"] = options.memory_swappiness
    if options.oom_kill_disable:
        if capacity.is_cgroup_v2:
            warnings.append("Your kernel does not support OomKillDisable. OomKillDisable discarded.")
        else:
            memory["disableOOMKiller"] = True
            if not config.memory_bytes:
                warnings.append(
                    "OOM killer is disabled for the container, but no memory limit is set, this can result in the "
                    "system running out of resources."
                )
    return memory


def _cpu(config: ContainerConfig, capacity: Capacity, warnings: list[str]) -> dict[str, Any]:
    cpu: dict[str, Any] = {}
    options, has_cpu = config.machine, "cpu" in capacity.controllers
    if config.nano_cpus:
        if has_cpu:
            quota_us, period_us = options.cpu_quota, options.cpu_period or CPU_PERIOD_US
            if quota_us <= 0:
                period_us = CPU_PERIOD_US
                quota_us = max(
                    config.nano_cpus * period_us // 1_000_000_000, 1000
                )  # 1000 is the kernel's minimum
            cpu |= {"quota": quota_us, "period": period_us}
        else:
            warnings.append("Your kernel does not support CPU cfs quota. Quota discarded.")
    if options.cpu_shares:
        if has_cpu:
            cpu["shares"] = options.cpu_shares
        else:
            warnings.append(
                "Your kernel does not support CPU shares or the cgroup is not mounted. Shares discarded."
            )
    if not (options.cpuset_cpus or options.cpuset_mems):
        return cpu
    if "cpuset" not in capacity.controllers:
        warnings.append("Your kernel does not support cpuset or the cgroup is not mounted. Cpuset discarded.")
        return cpu
    for name, asked, available, what in (
        ("cpus", options.cpuset_cpus, capacity.cpus, "CPUs"),
        ("mems", options.cpuset_mems, capacity.memory_nodes, "memory nodes"),
    ):
        if not asked:
            continue
        if available and not (numbers(asked) or frozenset()) <= (numbers(available) or frozenset()):
            raise InvalidArgument(
                f"Requested {what} are not available - requested {asked}, available: {available}"
            )
        cpu[name] = asked
    return cpu


def _pids(config: ContainerConfig, capacity: Capacity, warnings: list[str]) -> dict[str, Any]:
    if config.pids <= 0:
        return {}
    if "pids" in capacity.controllers:
        return {"limit": config.pids}
    warnings.append("Your kernel does not support pids limit capabilities. PIDs limit discarded.")
    return {}


def block_io(
    options: MachineOptions,
    numbers_of: Mapping[str, tuple[int, int]],
    capacity: Capacity,
    warnings: list[str],
) -> dict[str, Any]:
    """Return ``linux.resources.blockIO``.  ``numbers_of`` has the major and minor number of each limited device."""
    found: dict[str, Any] = {}
    if options.blkio_weight or options.blkio_weight_device:
        if capacity.has_io_weight:
            if options.blkio_weight:
                found["weight"] = options.blkio_weight
            if options.blkio_weight_device:
                found["weightDevice"] = [
                    {**_device(numbers_of[one.path]), "weight": one.weight}
                    for one in options.blkio_weight_device
                ]
        else:
            for is_given, what in (
                (options.blkio_weight, "Block I/O weight"),
                (options.blkio_weight_device, "Block I/O weight_device"),
            ):
                if is_given:
                    discarded = "Weight" if what.endswith("weight") else "Weight-device"
                    warnings.append(
                        f"Your kernel does not support {what} or the cgroup is not mounted. {discarded} discarded."
                    )
    has_limits = ("io" if capacity.is_cgroup_v2 else "blkio") in capacity.controllers
    for name, devices in options.throttles.items():
        if devices and has_limits:
            found[name] = [{**_device(numbers_of[one.path]), "rate": one.rate} for one in devices]
        elif devices:
            warnings.append(
                f"Your kernel does not support {_THROTTLES[name]} limit or the cgroup is not mounted. "
                "Limit discarded."
            )
    return found


def _device(numbers_: tuple[int, int]) -> dict[str, int]:
    return {"major": numbers_[0], "minor": numbers_[1]}
