"""Files of the machine in containers that run its programs (``skep.executor=process``).

Such a container has an empty root file system of its own.  The machine's directories of programs and their
configuration are mounted in it, read-only.  Nothing else of the machine is visible: no ``/home``, ``/root``, ``/run``,
``/srv`` or ``/var``, so no sockets, keys or data.  Files that only root may read are closed to it, because neither its
user nor one of its groups may be root.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from skep.engine.confinement.users import ProcessUser, identity
from skep.engine.containers.container import Container, ContainerConfig, ExecConfig, MountPoint
from skep.errors import FailedPrecondition, InvalidArgument
from skep.linux.confined_root import Bind

_MACHINE = Path("/")
_SHOWN = ("usr", "etc", "opt", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
"""Directories of programs, their libraries and their configuration.  Some are links below ``/usr``, or do not exist."""
_OWN = ("dev", "home", "mnt", "proc", "root", "run", "srv", "sys", "var/cache", "var/lib", "var/log")
_TEMPORARY = ("tmp", "var/tmp")
_HIDDEN = (
    *("/etc/shadow", "/etc/shadow-", "/etc/gshadow", "/etc/gshadow-", "/etc/security/opasswd"),
    *("/etc/ssl/private", "/etc/sudoers", "/etc/sudoers.d", "/etc/skep", "/etc/docker"),
)
"""Passwords and keys, some of which a distribution lets a group such as ``shadow`` read."""


def make_root(root: Path, machine: Path = _MACHINE) -> None:
    """Create the directories of an empty root file system, with mount points for the machine's directories."""
    for name in (*_OWN, *_TEMPORARY, *shown(machine)):
        (root / name).mkdir(mode=0o755, parents=True)
    for name in _TEMPORARY:
        (root / name).chmod(0o1777)
    (root / "var/run").symlink_to("../run")
    for entry in _entries(machine):
        if entry.is_symlink():
            (root / entry.name).symlink_to(os.readlink(entry.path))


def shown(machine: Path = _MACHINE) -> list[str]:
    """Return the machine's directories that are mounted, without their leading slash."""
    return [entry.name for entry in _entries(machine) if entry.is_dir(follow_symlinks=False)]


def _entries(machine: Path) -> list["os.DirEntry[str]"]:
    # The kinds of entries are in the directory, so a file system at /opt that does not respond blocks nothing here.
    with os.scandir(machine) as entries:
        return sorted((one for one in entries if one.name in _SHOWN), key=lambda one: one.name)


def mounts(config: ContainerConfig, machine: Path = _MACHINE) -> list[MountPoint]:
    """Return the mounts of the machine's directories, for a process."""
    return [
        MountPoint(
            type="bind",
            source=str(machine / name),
            destination=f"/{name}",
            read_only=True,
            read_only_below=True,
            options=("nosuid", "nodev"),
        )
        for name in (shown(machine) if config.is_process else ())
    ]


def added(
    config: ContainerConfig, files: Sequence[MountPoint], machine: Path = _MACHINE
) -> Sequence[MountPoint]:
    """Return the mounts that the node adds: its ``files``, for a process in the machine's directories.

    A file that the machine does not have is left out, because it cannot be created in a read-only directory.
    """
    if not config.is_process:
        return files
    return [*mounts(config, machine), *(one for one in files if _exists(machine, one.destination))]


def hide(specification: Mapping[str, Any], directories: Iterable[Path]) -> None:
    """Mask keys in a runtime specification.  ``directories`` are the node's own, which may be anywhere."""
    masked = specification["linux"]["maskedPaths"]
    masked += [*_HIDDEN, *(path for path in map(os.path.realpath, directories) if _is_shown(path))]


def closed(binds: Mapping[str, Bind], root: Path, machine: Path = _MACHINE) -> dict[str, Bind]:
    """Return the mounts for ``docker cp``, without the machine's files, which it would read as root.

    Empty read-only directories are in their places.
    """
    found = {target: bind for target, bind in binds.items() if not _is_shown(_normal(target))}
    return found | {f"/{name}": Bind(str(root / name), f"/{name}", True) for name in shown(machine)}


def check(container: Container, *, is_in_user_namespace: bool, machine: Path = _MACHINE) -> None:
    """Refuse a process on a node that maps users, and mount targets that are missing in the machine's directories.

    Raises: FailedPrecondition.
    """
    if is_in_user_namespace or container.users is not None:
        kind = "rootless" if is_in_user_namespace else "one with mapped users"
        raise FailedPrecondition(
            f"this node is {kind}, and runs no plain processes: use an image, or another node"
        )
    points = container.config.mounts
    covered = tuple(f"{point.destination.rstrip('/')}/" for point in points)
    for point in points:
        target = _normal(point.destination)
        if _is_shown(target) and not target.startswith(covered) and not _exists(machine, target):
            raise FailedPrecondition(
                f"the mount target {target} does not exist on this machine, whose directories are read-only in a plain "
                "process: create it there, or choose another target"
            )


def own_volumes(config: ContainerConfig, root: Path, machine: Path = _MACHINE) -> None:
    """Create the mount points of volumes for the user of the process.

    A new volume gets the owner of its mount point, as from an image.  It would belong to root otherwise.
    Raises: InvalidArgument: unknown user, or root.
    """
    user = identity_of(config.user, config.groups, machine)
    for point in config.mounts:
        target = _normal(point.destination)
        if point.type == "volume" and not _is_shown(target):  # a link there may lead to the machine
            place = root / target.lstrip("/")
            place.mkdir(mode=0o755, parents=True, exist_ok=True)
            os.chown(place, user.uid, user.gid)


def check_exec(exec: ExecConfig) -> None:
    """Refuse a privileged command in a process, because it could change the machine.  Raises: InvalidArgument."""
    if exec.privileged:
        raise InvalidArgument("a plain process has no privileged commands: leave out --privileged")


def identity_of(user: str, groups: Iterable[str], machine: Path = _MACHINE) -> ProcessUser:
    """Look up the user of a process in the machine's files.

    Raises: InvalidArgument: it does not exist, or it or a group is root, who may read the machine's keys.
    """
    found = identity(machine, user, groups)
    if 0 in (found.uid, found.gid, *found.groups):
        raise InvalidArgument(
            f"a plain process cannot run as the user or group root ({user}): choose another one with "
            "--user USER:GROUP"
        )
    return found


def _normal(path: str) -> str:
    return f"/{os.path.normpath(path).lstrip('/')}"  # ``normpath`` keeps two slashes at the beginning


def _is_shown(path: str) -> bool:
    return path.split("/")[1] in _SHOWN


def _exists(machine: Path, path: str) -> bool:
    return os.path.lexists(machine / path.lstrip("/"))
