"""Detects the capacity of this machine and process for containers: programs, kernel features, limits."""

import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec

from skep.engine.confinement import apparmor, capabilities, cdi, seccomp, selinux
from skep.engine.confinement.cgroups import Cgroups
from skep.linux.own_user_namespace import is_in_user_namespace
from skep.model.values.user_map import UserMap

_CPUS = Path("/sys/devices/system/cpu")
_MOUNT_SETATTR = (5, 12)
"""The first kernel version with mount_setattr(2), which runc (1.1) uses for recursive read-only mounts (``rro``)."""
_READS_MAPPINGS = (1, 1, 11)
"""The first version of runc that reads the mapping of a user namespace that it joins.  Source: runc, CHANGELOG.md."""
_CAP_SYS_RESOURCE = "CAP_SYS_RESOURCE"
_INITS = ("/usr/bin/tini-static", "/usr/bin/catatonit", f"{sys.prefix}/libexec/skep/tini-static")
"""Init programs for ``--init``.  Only static ones, because a dynamic init finds no loader in most images."""


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """The most that this node can provide to its containers."""

    capabilities: frozenset[str]
    hard_limits: Mapping[str, int] = {}
    """Hard limits of this process by name (such as ``RLIMIT_NOFILE``).  Empty if this process may raise them."""
    controllers: frozenset[str]
    has_swap_accounting: bool
    may_lower_oom_score: bool = True
    is_cgroup_v2: bool = False
    has_apparmor: bool = False
    selinux_policy: selinux.Policy | None = None
    """The policy that labels containers, or None without SELinux or without ``--selinux-enabled``."""
    sysfs: Path = apparmor.SYSFS
    """The machine's sysfs."""
    masked_paths: tuple[str, ...] = ()
    """Paths to mask on this machine, in addition to the paths that are masked on every machine."""
    has_keyrings: bool = True
    """Whether each container gets its own session keyring."""
    has_every_group: bool = True
    """Whether a container's processes may have any group.  In a user namespace, only some groups exist."""
    is_in_user_namespace: bool = False
    """Whether the node itself runs in a user namespace, where nobody can make device nodes."""
    init_binary: str = ""
    """Path of a static init program on the node.  Empty if the node has none."""
    has_x32: bool = True
    """Whether the kernel may run x32 system calls."""
    has_recursive_read_only: bool = False
    """Whether a mount can be made read-only with all mounts below it."""
    has_io_weight: bool = False
    """Whether a container's share of block device time can be weighted."""
    cpus: str = ""
    """Processors that a container can be bound to (``0-3``).  Empty if unknown."""
    memory_nodes: str = ""
    """Memory nodes that a container can be bound to.  Empty if unknown."""
    users: UserMap | None = None
    """Mapping of the users of containers that do not request the machine's (``userns-remap``), or None."""
    runc_reads_mappings: bool = False
    """Whether runc reads the mapping of a user namespace that it joins, and warns if it is told as well."""
    cdi_directories: tuple[Path, ...] = cdi.DIRECTORIES
    """Directories of CDI device descriptions.  Later directories take precedence."""


class Programs(msgspec.Struct, frozen=True, kw_only=True):
    """The machine's programs that containers need."""

    runtimes: Mapping[str, Path] = msgspec.field(default_factory=lambda: {"runc": Path("/usr/sbin/runc")})
    """OCI runtimes that containers may choose, by name."""
    versions: Mapping[str, str] = {}
    """Versions of the runtimes, as far as they are known."""
    default_runtime: str = "runc"
    """Name of the runtime of containers that choose none."""
    conmon: Path = Path("/usr/bin/conmon")
    init: str = ""


def find_programs(
    runtimes: Mapping[str, str] = {"runc": "runc"},
    default_runtime: str = "runc",
    conmon: str = "conmon",
    versions: Mapping[str, str] = MappingProxyType({}),
) -> Programs:
    """Find the machine's programs by name or path.  A program that is not found gets its usual path."""
    usual = Programs()
    return Programs(
        runtimes={
            name: Path(shutil.which(program) or f"/usr/sbin/{name}") for name, program in runtimes.items()
        },
        versions=versions,
        default_runtime=default_runtime,
        conmon=Path(shutil.which(conmon) or usual.conmon),
        init=next((path for path in _INITS if os.access(path, os.X_OK)), ""),
    )


def capacity_of(
    cgroups: Cgroups,
    programs: Programs,
    cdi_directories: tuple[Path, ...] = cdi.DIRECTORIES,
    cpus: Path = _CPUS,
    sysfs: Path = apparmor.SYSFS,
    *,
    with_selinux: bool = False,
) -> Capacity:
    """Return the capacity of this process, which does not change while it lives.

    ``cpus`` is the kernel's directory of processors, and ``sysfs`` is the machine's.  ``with_selinux`` labels
    containers if the machine has SELinux.
    """
    bounding = capabilities.bounding_set()
    may_raise = _CAP_SYS_RESOURCE in bounding
    limits = {
        name: resource.getrlimit(getattr(resource, name))[1]
        for name in dir(resource)
        if name.startswith("RLIMIT_")
    }
    return Capacity(
        capabilities=bounding,
        hard_limits={} if may_raise else {name: hard for name, hard in limits.items() if hard >= 0},
        controllers=cgroups.controllers,
        has_swap_accounting=cgroups.has_swap_accounting,
        may_lower_oom_score=may_raise,
        is_cgroup_v2=cgroups.is_v2,
        init_binary=programs.init,
        has_x32=seccomp.runs_x32(),
        has_apparmor=apparmor.is_supported(sysfs),
        selinux_policy=selinux.find_policy(sysfs) if with_selinux else None,
        sysfs=sysfs,
        masked_paths=thermal_throttles(cpus),
        has_keyrings=not is_in_user_namespace(),
        has_every_group=not is_in_user_namespace(),
        is_in_user_namespace=is_in_user_namespace(),
        has_io_weight=cgroups.has_io_weight,
        runc_reads_mappings=_version(programs.versions.get("runc", "")) >= _READS_MAPPINGS,
        cdi_directories=cdi_directories,
        cpus=cgroups.cpus,
        memory_nodes=cgroups.memory_nodes,
        has_recursive_read_only=seccomp.kernel_version(platform.release()) >= _MOUNT_SETATTR,
    )


def thermal_throttles(cpus: Path = _CPUS) -> tuple[str, ...]:
    """Return each processor's directory of thermal throttling events.

    They are masked, because they reveal the machine's activity.

    Source: moby, daemon/pkg/oci/defaults.go (GHSA-6fw5-f8r9-fgfm).
    """
    try:
        possible = (cpus / "possible").read_text()
    except OSError:
        return ()
    paths = (cpus / f"cpu{number}" / "thermal_throttle" for number in _numbers(possible))
    return tuple(str(path) for path in paths if path.exists())


def _version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version, such as ``1.1.11``.  Empty if it is unknown."""
    return tuple(int(number) for number in text.split(".") if number)


def _numbers(ranges: str) -> Iterator[int]:
    """Yield the numbers of ``0-3,8``: 0, 1, 2, 3, 8.  Skips anything else."""
    for part in ranges.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            yield from range(int(first), int(last or first) + 1)


def processors() -> int:
    """Return the number of processors that this process may use, as Docker counts them."""
    return len(os.sched_getaffinity(0))
