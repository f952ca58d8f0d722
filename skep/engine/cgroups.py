"""Control groups of this node's containers, on v1 (or hybrid) hierarchies and on v2.

Everything lies below one parent (``skep`` by default): containers at ``<parent>/ctr/<id>``, made by runc; their
monitors at ``<parent>/monitors``, so that nothing that happens to the node process reaches them.  A container with
``--cgroup-parent`` has its group there; a group is named by its path, the same in every hierarchy.

The version is found as runc finds it: cgroup2 mounted at /sys/fs/cgroup is v2, all else v1.
"""

import ctypes
import errno
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import structlog

from skep.engine.container import Container
from skep.errors import InvalidArgument, Unavailable
from skep.linux.files import is_no_file
from skep.linux.trees import directories
from skep.model.ids import ContainerId

log = structlog.get_logger()

MOUNT_POINT = Path("/sys/fs/cgroup")
_CGROUP2_SUPER_MAGIC = 0x63677270
_WEIGHTS_V1 = ("blkio.weight", "blkio.bfq.weight")
_WEIGHTS_V2 = ("io.weight", "io.bfq.weight")
_NO_PROCESSES_OF_ITS_OWN = (errno.ENODEV, errno.EOPNOTSUPP)
"""It has been removed; it has threads alone, whose processes are listed further up."""
_libc = ctypes.CDLL(None, use_errno=True)


class Cgroups:
    """The groups of one node.  ``parent``: path below each hierarchy, without a slash at its ends."""

    def __init__(self, parent: str, mount_point: Path = MOUNT_POINT) -> None:
        self.parent = parent.strip("/")
        self._mount_point = mount_point
        self.is_v2 = file_system_type(mount_point) == _CGROUP2_SUPER_MAGIC
        self._roots = {"": mount_point} if self.is_v2 else _v1_hierarchies(mount_point)

    def path_of(self, container: Container) -> str:
        """``cgroupsPath`` of the runtime specification."""
        given = container.config.machine.cgroup_parent
        return f"{self._group(given) if given else self._containers}/{container.id}"

    def check_parent(self, given: str) -> None:
        """Refuse a ``--cgroup-parent`` where containers and monitors of this node are: it would end with one of them.

        Raises: InvalidArgument.
        """
        group = self._group(given) + "/"
        if given and group.startswith((f"{self._containers}/", f"/{self.parent}/monitors/")):
            raise InvalidArgument(f"invalid cgroup parent {given}: it is of other containers of this node")

    @property
    def _containers(self) -> str:
        return f"/{self.parent}/ctr"

    def _group(self, given: str) -> str:
        # Docker leaves a relative one to runc: on v1 below the group of process 1, on v2 beside the daemon's.
        names = [*([] if given.startswith("/") else [self.parent]), *given.split("/")]
        return "".join(f"/{name}" for name in names if name)

    @property
    def controllers(self) -> frozenset[str]:
        """What can be limited here: ``memory``, ``cpu``, ``pids``, ..."""
        if not self.is_v2:
            return frozenset(self._roots)
        return frozenset((self._roots[""] / "cgroup.controllers").read_text().split())

    @property
    def has_swap_accounting(self) -> bool:
        """Whether memory and swap together can be limited."""
        if self.is_v2:
            return "memory" in self.controllers and Path("/proc/swaps").exists()
        root = self._roots.get("memory")
        return root is not None and (root / "memory.memsw.limit_in_bytes").exists()

    @property
    def has_io_weight(self) -> bool:
        """Whether block devices can be shared by weight.

        v2: a group shows it, the root has no such file; v1: the root does.
        """
        if not self.is_v2:
            root = self._roots.get("blkio")
            return root is not None and any((root / name).exists() for name in _WEIGHTS_V1)
        groups = (path for path in self._mount_point.iterdir() if path.is_dir())
        return any((group / name).exists() for group in groups for name in _WEIGHTS_V2)

    @property
    def cpus(self) -> str:
        """Processors that containers can be bound to: ``0-3``; empty: unknown."""
        return self._cpuset("cpus")

    @property
    def memory_nodes(self) -> str:
        """Memory nodes that containers can be bound to: ``0``; empty: unknown."""
        return self._cpuset("mems")

    def _cpuset(self, name: str) -> str:
        root = self._roots.get("" if self.is_v2 else "cpuset")
        if root is None:
            return ""
        for file in (f"cpuset.{name}.effective", f"cpuset.effective_{name}", f"cpuset.{name}"):
            with suppress(OSError):
                return (root / file).read_text().strip()
        return ""

    def directory(self, container: Container, controller: str) -> Path | None:
        """Where files of ``controller`` are for this container, None where it is not mounted."""
        root = self._roots.get("" if self.is_v2 else controller)
        return None if root is None else root / self.path_of(container).lstrip("/")

    def parent_directory(self, controller: str) -> Path:
        """Where files of ``controller`` are for everything below the parent.  Raises: KeyError: it is not mounted."""
        return self._roots["" if self.is_v2 else controller] / self.parent

    def hold_this_process(self) -> bool:
        """Whether the calling process lives below the parent itself, as nodes that share a machine do."""
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        return any(f"{line.split(':', 2)[2]}/".startswith(f"/{self.parent}/") for line in lines)

    def pids(self, container: Container) -> frozenset[int]:
        """The processes of a container, nested groups included.  Empty when it has none.

        Raises: Unavailable: they cannot be read now.
        """
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

    def enter_monitors(self) -> None:
        """Put the calling thread, and so what it starts, into the group of monitors.

        On v2 threads cannot be placed apart from their process: there ``join_monitors`` moves each.  A
        hierarchy that refuses is left alone and logged.
        """
        if self.is_v2:
            return
        for controller, root in self._roots.items():
            directory = root / self.parent / "monitors"
            try:
                directory.mkdir(parents=True, exist_ok=True)
                if controller == "cpuset":
                    _inherit_cpuset(root, directory)
                (directory / "tasks").write_text(str(threading.get_native_id()))
            except OSError as error:
                log.warning("cgroup of monitors refused", controller=controller, error=str(error))

    def expect_move(self) -> None:
        """Make the next move of a process to another group a quick one; takes some milliseconds, so not in the loop.

        After a pause of some 20 ms the first move waits for an RCU grace period (``cgroup_threadgroup_rwsem``), 10 ms
        and more: runc would wait for it amid an exec.  A move of the calling thread to where it is begins that wait
        now, and changes nothing.
        """
        for line in Path("/proc/thread-self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = self._roots.get(controllers.split(",")[0])
            if root is None:
                continue
            file = root / path.lstrip("/") / ("cgroup.threads" if self.is_v2 else "tasks")
            # Only time is lost where this fails: a group seen from another namespace, a file that is read-only.
            # Opened as it is there: outside of a control group nothing is to be created.
            with suppress(OSError), file.open("r+b") as threads:
                # By its number: a move of "0", the writer itself, does not take the lock.
                os.write(threads.fileno(), b"%d" % threading.get_native_id())
            return

    def join_monitors(self, pid: int) -> None:
        """On v2: move a process that was just started into the group of monitors."""
        if not self.is_v2:
            return
        directory = self._roots[""] / self.parent / "monitors"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            if error.errno != errno.ESRCH:  # it has ended already
                log.warning("cgroup of monitors refused", controller="v2", error=str(error))

    def remove(self, container: Container) -> bool:
        """Remove a container's groups, as far as they are there; whether none is left.  Parents stay, as in Docker."""
        return self._remove(self.path_of(container))

    def remove_unknown(self, container_id: ContainerId) -> None:
        """The same of a container of which nothing is known but its id: where they are by default."""
        self._remove(f"{self._containers}/{container_id}")

    def _remove(self, path: str) -> bool:
        left = [root for root in self._all_roots() if not _remove_tree(root / path.lstrip("/"))]
        return not left

    def _all_roots(self) -> Iterable[Path]:
        """Every hierarchy; beside v1 there may be one of v2 without controllers, where runc makes groups, too."""
        unified = self._mount_point / "unified"
        roots = dict.fromkeys(self._roots.values())  # one may be mounted for several controllers
        return (*roots, *([unified] if unified.is_dir() else []))


def file_system_type(path: Path) -> int:
    """``f_type`` of statfs(2) (Python's statvfs leaves it out).  0 when it cannot be found out."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs has 120 bytes; f_type comes first
    if _libc.statfs(os.fsencode(path), buffer):
        return 0
    return int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], "little") & 0xFFFFFFFF


def _v1_hierarchies(mount_point: Path) -> dict[str, Path]:
    """Mounted v1 hierarchies by controller; one mounted for several controllers appears under each."""
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


def _inherit_cpuset(root: Path, directory: Path) -> None:
    """A new v1 cpuset takes no process before it has processors and memory nodes: its parent's."""
    chain = [path for path in (directory, *directory.parents) if path != root and path.is_relative_to(root)]
    for path in reversed(chain):
        for name in ("cpuset.cpus", "cpuset.mems"):
            if not (path / name).read_text().strip():
                (path / name).write_text((path.parent / name).read_text())


def _remove_tree(directory: Path) -> bool:
    """Remove a group with its nested ones, from below; whether it is gone."""
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # it has nested groups, or processes
        for path in reversed(directories(directory)):
            with suppress(OSError):
                path.rmdir()
    return not directory.exists()
