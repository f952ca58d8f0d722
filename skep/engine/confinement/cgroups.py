"""Control groups of this node's containers, on v1 (or hybrid) hierarchies and on v2.

Everything is below one parent (``skep`` by default).  Containers are at ``<parent>/ctr/<id>``, created by runc.  Their
conmon processes are at ``<parent>/monitors``, so that they do not end with the node process's group.  A container with
``--cgroup-parent`` has its group there.  A group is named by its path, which is the same in every hierarchy.

The version is detected as in runc: cgroup2 mounted at /sys/fs/cgroup means v2, anything else v1.

A rootless node to which no groups are delegated has none: ``is_usable`` is False, its containers run without limits,
and their mount namespaces tell which processes are theirs.
"""

import ctypes
import errno
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import structlog

from skep.engine.containers.container import Container
from skep.errors import InvalidArgument, Unavailable
from skep.linux.files import is_no_file
from skep.linux.own_user_namespace import is_rootless
from skep.linux.trees import directories
from skep.model.values.ids import ContainerId

log = structlog.get_logger()

MOUNT_POINT = Path("/sys/fs/cgroup")
# Source: linux/magic.h.
_CGROUP2_SUPER_MAGIC = 0x63677270
_WEIGHTS_V1 = ("blkio.weight", "blkio.bfq.weight")
_WEIGHTS_V2 = ("io.weight", "io.bfq.weight")
_NO_PROCESSES_OF_ITS_OWN = (errno.ENODEV, errno.EOPNOTSUPP)
"""Errors of reading a group that was removed, or of a threaded group, whose processes only its ancestors list."""
_libc = ctypes.CDLL(None, use_errno=True)


class Cgroups:
    """The groups of one node.  ``parent`` is their common path below each hierarchy, without slashes at its ends."""

    def __init__(self, parent: str, mount_point: Path = MOUNT_POINT) -> None:
        self.parent = parent.strip("/")
        self._mount_point = mount_point
        self.is_v2 = file_system_type(mount_point) == _CGROUP2_SUPER_MAGIC
        roots = {"": mount_point} if self.is_v2 else _v1_hierarchies(mount_point)
        self.is_mounted = bool(roots)
        self.is_usable = not is_rootless() or (self.is_v2 and os.access(mount_point, os.W_OK))
        self.own_roots = roots if self.is_usable else {}

    def path_of(self, container: Container) -> str:
        """Return the container's ``cgroupsPath`` in the runtime specification, or an empty text for no group."""
        if not self.is_usable:
            return ""
        given = container.config.machine.cgroup_parent
        return f"{self._group(given) if given else self._containers}/{container.id}"

    def check_parent(self, given: str) -> None:
        """Refuse a ``--cgroup-parent`` inside the group of a container or of the monitors, because the group would end
        with it.

        Raises: InvalidArgument.
        """
        group = self._group(given) + "/"
        if given and group.startswith((f"{self._containers}/", f"/{self.parent}/monitors/")):
            raise InvalidArgument(
                f"invalid cgroup parent {given}: it belongs to containers of this node, choose another one"
            )

    @property
    def _containers(self) -> str:
        return f"/{self.parent}/ctr"

    def _group(self, given: str) -> str:
        # Docker leaves relative paths to runc, which puts them below the group of process 1 on v1, and next to the
        # daemon's group on v2.
        names = [*([] if given.startswith("/") else [self.parent]), *given.split("/")]
        return "".join(f"/{name}" for name in names if name)

    @property
    def controllers(self) -> frozenset[str]:
        """Available controllers: ``memory``, ``cpu``, ``pids``, ..."""
        if not self.is_v2 or not self.is_usable:
            return frozenset(self.own_roots)
        return frozenset((self.own_roots[""] / "cgroup.controllers").read_text().split())

    @property
    def has_swap_accounting(self) -> bool:
        """Whether memory and swap can be limited together."""
        if self.is_v2:
            return "memory" in self.controllers and Path("/proc/swaps").exists()
        root = self.own_roots.get("memory")
        return root is not None and (root / "memory.memsw.limit_in_bytes").exists()

    @property
    def has_io_weight(self) -> bool:
        """Whether block devices can be shared by weight.

        On v2, the kernel's file exists in groups but not in the root.  On v1, it exists in the root.
        """
        if not self.is_v2:
            root = self.own_roots.get("blkio")
            return root is not None and any((root / name).exists() for name in _WEIGHTS_V1)
        if not self.is_usable:
            return False
        groups = (path for path in self._mount_point.iterdir() if path.is_dir())
        return any((group / name).exists() for group in groups for name in _WEIGHTS_V2)

    @property
    def cpus(self) -> str:
        """Processors that containers can be bound to, such as ``0-3``.  Empty if unknown."""
        return self._cpuset("cpus")

    @property
    def memory_nodes(self) -> str:
        """Memory nodes that containers can be bound to, such as ``0``.  Empty if unknown."""
        return self._cpuset("mems")

    def _cpuset(self, name: str) -> str:
        root = self.own_roots.get("" if self.is_v2 else "cpuset")
        if root is None:
            return ""
        for file in (f"cpuset.{name}.effective", f"cpuset.effective_{name}", f"cpuset.{name}"):
            with suppress(OSError):
                return (root / file).read_text().strip()
        return ""

    def directory(self, container: Container, controller: str) -> Path | None:
        """Return the container's directory with the files of ``controller``, or None if the controller is not
        mounted.
        """
        root = self.own_roots.get("" if self.is_v2 else controller)
        return None if root is None else root / self.path_of(container).lstrip("/")

    def parent_directory(self, controller: str) -> Path:
        """Return the parent group's directory with the files of ``controller``.

        Raises: KeyError: it is not mounted.
        """
        return self.own_roots["" if self.is_v2 else controller] / self.parent

    def hold_this_process(self) -> bool:
        """Return whether this process itself is below the parent group, as in a playground, where nodes share a
        machine.
        """
        if not self.is_usable:
            return False
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        return any(f"{line.split(':', 2)[2]}/".startswith(f"/{self.parent}/") for line in lines)

    def pids(self, container: Container) -> frozenset[int]:
        """Return the container's processes, including nested groups.

        Raises: Unavailable: they cannot be read now.
        """
        if not self.is_usable:
            return _processes_by_mounts(container.pid)
        directory = self.directory(container, "pids") or self.directory(container, "memory")
        found: set[int] = set()
        if directory is not None:
            groups = [directory]
            while groups:
                group = groups.pop()
                try:
                    with os.scandir(group) as entries:
                        groups += [Path(one) for one in entries if one.is_dir(follow_symlinks=False)]
                    found.update(map(int, (group / "cgroup.procs").read_text().split()))
                except OSError as error:
                    if not (is_no_file(error) or error.errno in _NO_PROCESSES_OF_ITS_OWN):
                        raise Unavailable(f"processes of a container cannot be read: {error}") from error
        return frozenset(found)

    def is_frozen(self, container: Container) -> bool | None:
        """Return whether the container is frozen, or None if that cannot be read."""
        directory = self.directory(container, "freezer")
        if directory is None:
            return None
        try:
            if self.is_v2:
                return (directory / "cgroup.freeze").read_text().strip() == "1"
            return (directory / "freezer.state").read_text().strip() != "THAWED"
        except OSError:
            return None

    def enter_monitors(self) -> None:
        """Move the calling thread, and with it the children that it starts, into the monitors' group.

        On v2, a thread cannot leave the group of its process, so ``join_monitors`` moves each child instead.  A
        hierarchy that refuses is skipped and logged.
        """
        if self.is_v2:
            return
        for controller, root in self.own_roots.items():
            directory = root / self.parent / "monitors"
            try:
                directory.mkdir(parents=True, exist_ok=True)
                if controller == "cpuset":
                    _inherit_cpuset(root, directory)
                (directory / "tasks").write_text(str(threading.get_native_id()))
            except OSError as error:
                log.warning("monitor cgroup not joined", controller=controller, error=str(error))

    def expect_move(self) -> None:
        """Make the next move of a process to another group fast.  Blocks for some milliseconds: call it in a thread.

        If no process was moved for some 20 ms, the next move waits 10 ms or more for an RCU grace period
        (``cgroup_threadgroup_rwsem``), and runc would wait for it during an exec.  Moving the calling thread to its
        current group makes this wait happen now, and changes nothing else.
        """
        for line in Path("/proc/thread-self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = self.own_roots.get(controllers.split(",")[0])
            if root is None:
                continue
            file = root / path.lstrip("/") / ("cgroup.threads" if self.is_v2 else "tasks")
            # A failure (a group in another namespace, or a read-only file) only costs time.  Open without creating,
            # because no file must appear if this is not a control group.
            with suppress(OSError), file.open("r+b") as threads:
                # Write the thread's number, because a move of "0" (the writer itself) does not take the lock.
                os.write(threads.fileno(), b"%d" % threading.get_native_id())
            return

    def join_monitors(self, pid: int) -> None:
        """On v2, move a process that was just started into the monitors' group."""
        if not self.is_v2 or not self.is_usable:
            return
        directory = self.own_roots[""] / self.parent / "monitors"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            if error.errno != errno.ESRCH:  # unless it has just ended
                log.warning("monitor cgroup not joined", controller="v2", error=str(error))

    def remove(self, container: Container) -> bool:
        """Remove a container's groups, if any.  Return whether none is left.  Parents stay, as in Docker."""
        return self._remove(self.path_of(container))

    def remove_unknown(self, container_id: ContainerId) -> bool:
        """Remove the groups at the default path of a container whose record is unreadable.

        Return whether none is left.
        """
        return self._remove(f"{self._containers}/{container_id}")

    def _remove(self, path: str) -> bool:
        if not self.is_usable:
            return True
        left = [root for root in self.all_roots() if not remove_tree(root / path.lstrip("/"))]
        return not left

    def all_roots(self) -> Iterable[Path]:
        """Return every hierarchy.

        Next to v1 hierarchies, a v2 hierarchy without controllers may exist, where runc also creates groups.
        """
        unified = self._mount_point / "unified"
        roots = dict.fromkeys(self.own_roots.values())  # a hierarchy may be mounted for several controllers
        return (*roots, *([unified] if unified.is_dir() else []))


def file_system_type(path: Path) -> int:
    """Return ``f_type`` of statfs(2), which Python's statvfs leaves out, or 0 if it cannot be determined."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs has 120 bytes, and f_type is its first field
    if _libc.statfs(os.fsencode(path), buffer):
        return 0
    return int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], "little") & 0xFFFFFFFF


def _v1_hierarchies(mount_point: Path) -> dict[str, Path]:
    """Return the mounted v1 hierarchies by controller.  A hierarchy with several controllers appears under each."""
    roots: dict[str, Path] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        type, _, super_options = after.split(" ", 2)
        target = Path(before.split(" ")[4])
        if type != "cgroup" or not target.is_relative_to(mount_point):
            continue
        names = [option for option in super_options.split(",") if option not in ("rw", "ro", "xattr")]
        for name in names:
            if "=" not in name or name.startswith("name="):
                roots[name.removeprefix("name=")] = target
    return roots


def _processes_by_mounts(first: int) -> frozenset[int]:
    """Return the processes in the mount namespace of a container's ``first`` process, which no container shares."""
    mounts = mount_namespace(first) if first else None
    if mounts is None or mounts == mount_namespace(os.getpid()):
        return frozenset()
    pids = (int(name) for name in os.listdir("/proc") if name.isdecimal())
    return frozenset(pid for pid in pids if mount_namespace(pid) == mounts)


def mount_namespace(pid: int) -> str | None:
    """Return the name of a process's mount namespace, or None if it has ended or must not be inspected."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return None


def _inherit_cpuset(root: Path, directory: Path) -> None:
    """Copy processors and memory nodes from the parent group, because an empty cpuset of v1 accepts no process."""
    chain = [path for path in (directory, *directory.parents) if path != root and path.is_relative_to(root)]
    for path in reversed(chain):
        for name in ("cpuset.cpus", "cpuset.mems"):
            if not (path / name).read_text().strip():
                (path / name).write_text((path.parent / name).read_text())


def remove_tree(directory: Path) -> bool:
    """Remove a group with its nested groups, bottom-up.  Return whether it no longer exists."""
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # it has nested groups, or processes
        for path in reversed(directories(directory)):
            with suppress(OSError):
                path.rmdir()
    return not directory.exists()
