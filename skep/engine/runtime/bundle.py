"""A container's directories: one below ``<data>/containers``, and one below ``<run>/bundles``.

```
<data>/containers/<id>/record               its configuration and state
                                             upper/ work/         its changes
                       root/                a process's empty root file system
                       hosts hostname resolv.conf
                       log/                 its output (k8s-file), rotated
                       <id>                 exit code, by conmon
                       oom                  by conmon when the kernel killed for memory

<run>/bundles/<id>/config.json              runc's input
                   rootfs/                  mount point of its root file system
                   attach ctl pidfile ...   conmon's socket, pipe and files
                                      exec/<exec id>/          the same for an exec
                                      parts/<n>                mount points of volume subpaths while runc starts
                                      shm/                     its /dev/shm, if other containers may share it
                                      api/                     its own socket of the Engine API, if it mounts the API's
```

Files that only a running container needs are in the run directory, which is in memory and empty after a reboot.  This
saves 10 of the 33 inodes that a start would create on the disk.  None of these files is synced.  Files that a container
can make grow stay on the disk.
"""

import asyncio
import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from skep.aio.failures import log_error
from skep.aio.trees import remove_tree
from skep.engine import api_sockets
from skep.engine.api_sockets import ApiSockets
from skep.engine.capacity import Capacity
from skep.engine.confinement import apparmor, devices, selinux
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.confinement.machine import other_container
from skep.engine.confinement.users import ProcessUser, identity
from skep.engine.containers import image_mounts, records
from skep.engine.containers.container import Container, ContainerConfig, ExecConfig, MountPoint
from skep.engine.runtime import machine_files, mapped_mounts, overlay, runtime_spec
from skep.engine.runtime.bind_flags import adapt_to_crun, request_flags
from skep.engine.volumes import tmpfs_mounts
from skep.engine.volumes.mounts import check_propagation, relabel_sources
from skep.engine.volumes.volumes import VolumeSubpath
from skep.errors import Unavailable
from skep.linux import syscalls
from skep.linux.confined_root import Bind
from skep.linux.files import replace_file
from skep.linux.name_files import hosts_file, resolver_file
from skep.linux.trees import walk
from skep.model.networks.sandbox import NetworkMode
from skep.model.values.ids import ContainerId
from skep.model.values.user_map import UserMap

log = structlog.get_logger()

_NAMES = ("hosts", "hostname", "resolv.conf")
_FILES_OF_THE_NODE = frozenset(f"/etc/{name}" for name in _NAMES)
OUTSIDE_OF_IMAGES = tuple(
    path.removeprefix("/") for path in (*sorted(_FILES_OF_THE_NODE), "/dev", "/proc", "/sys")
)
"""Paths that every container has in its writable directory because of mounts.

They do not count as changes by the user.
"""
_ID = re.compile("[0-9a-f]{64}")


class FoundContainers(msgspec.Struct):
    """Containers of earlier processes."""

    known: list[Container] = []
    unknown: list[ContainerId] = []
    """Containers without a decodable record.  They may still run."""
    unreadable: list[ContainerId] = []
    """Containers whose record cannot be read at the moment."""


class RootFiles(NamedTuple):
    """A container's mounted root file system, and the mounts inside it while the container runs.

    File systems in memory are left out.  Outer mount points come before inner ones.
    """

    path: Path
    binds: Sequence[Bind]
    users: UserMap | None = None
    """Mapping by which ``path`` and its own binds have their owners."""


class Bundles:
    """The directories of all containers of this node."""

    def __init__(
        self,
        directory: Path,
        run: Path,
        cgroups: Cgroups,
        capacity: Capacity,
        resolver: Path,
        apis: ApiSockets = api_sockets.NONE,
        mapped: Sequence[Path] = (),
    ) -> None:
        """Take the directories and settings of one node.

        Args:
            directory: Parent of the containers' directories on disk.
            run: Parent of the containers' bundles, in memory.
            resolver: The node's /etc/resolv.conf, copied to containers without name servers of their own.
            mapped: Directories whose files belong to containers, like volumes.  See ``mapped_mounts``.
        """
        self.apis = apis
        self._directory = directory
        self._run = run
        self._cgroups = cgroups
        self._capacity = capacity
        self._resolver = resolver
        self._mapped = mapped
        self._mounts = threading.Lock()
        self._borrowers: Counter[ContainerId] = Counter()
        self._to_release: set[ContainerId] = set()
        """Containers whose root file system stays mounted only because it is borrowed."""

    @property
    def users(self) -> UserMap | None:
        """Mapping of the users of this node's new containers, or None."""
        return self._capacity.users

    @property
    def selinux_policy(self) -> selinux.Policy | None:
        """The policy that labels containers, or None."""
        return self._capacity.selinux_policy

    def path(self, id: ContainerId) -> Path:
        """Return the container's directory on disk, which exists from ``make`` to ``discard``."""
        return self._directory / id

    def bundle(self, id: ContainerId) -> Path:
        """Return runc's and conmon's bundle, which exists from ``make``, or after a reboot from ``prepare``."""
        return self._run / id

    def rootfs(self, id: ContainerId) -> Path:
        """Return the mount point of the container's root file system."""
        return self.bundle(id) / "rootfs"

    def parts(self, container: Container) -> tuple[VolumeSubpath, ...]:
        """Return the container's mounts of volume subpaths, each with the path that runc mounts.

        This path is a mount point of the node, so that links in the volume cannot lead elsewhere.
        """
        directory = self.bundle(container.id) / "parts"
        return tuple(
            VolumeSubpath(point.name, point.subpath, directory / str(number))
            for number, point in enumerate(container.config.mounts)
            if point.subpath and point.type == "volume"
        )

    def shm(self, id: ContainerId) -> Path:
        """Return the /dev/shm of a container with a shareable IPC namespace.

        It is mounted while the container may run.
        """
        return self.bundle(id) / "shm"

    def api(self, id: ContainerId) -> Path:
        """Return the directory of the container's own Engine API socket."""
        return self.bundle(id) / "api"

    def _images(self, id: ContainerId) -> Path:
        """Return the directory where the container's images are mounted while it may run."""
        return self.bundle(id) / "images"

    def _tmpfs(self, id: ContainerId) -> Path:
        """Return the directory where the container's memory file systems are mounted while it may run."""
        return self.bundle(id) / "tmpfs"

    def _views(self, id: ContainerId) -> Path:
        """Return the directory of id-mapped views of volumes while runc starts."""
        return self.bundle(id) / "mapped"

    def log(self, id: ContainerId) -> Path:
        """Return the file that conmon writes now.  Older files have the suffixes ``.1``, ``.2``, ..."""
        return self.path(id) / "log" / "current"

    def exec_path(self, id: ContainerId, exec_id: str) -> Path:
        """Return the directory of an exec, which exists while the exec runs."""
        return self.bundle(id) / "exec" / exec_id

    # --- records ----------------------------------------------------------------------------------------------

    def load(self) -> "FoundContainers":
        """Return the containers that earlier processes left."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._run.mkdir(mode=0o700, parents=True, exist_ok=True)
        mapped_mounts.share_directory(self._run, self.users)
        found = FoundContainers()
        for directory in sorted(self._directory.iterdir()):
            id = ContainerId(directory.name)
            if not _ID.fullmatch(id):
                log.warning("unknown directory ignored", path=str(directory))
                continue
            try:
                container = self.read(id)
            except Unavailable as error:
                log_error(error, "container record not readable", container=id)
                found.unreadable.append(id)
                continue
            if container is None:
                found.unknown.append(id)
            else:
                found.known.append(container)
        return found

    def read(self, id: ContainerId) -> Container | None:
        """Return the record, or None without a decodable one.  Raises: Unavailable: it cannot be read now."""
        container = records.read(self.path(id) / records.NAME)
        return container if container is not None and container.id == id else None

    def save(self, container: Container) -> None:
        """Replace the record on disk."""
        records.write(self.path(container.id) / records.NAME, container)

    # --- making and unmaking ----------------------------------------------------------------------------------

    def make(self, container: Container) -> None:
        """Create the directories.  The record is written later, once the container has its network."""
        path = self.path(container.id)
        path.mkdir(mode=0o710, parents=True)
        for name in ("upper", "work", "log"):
            (path / name).mkdir(mode=0o755)
        if container.config.is_process:
            machine_files.make_root(path / "root")

    def prepare(
        self, container: Container, shared: runtime_spec.Shared = runtime_spec.NOTHING_SHARED
    ) -> tuple[str, ...]:
        """Mount the root file system and write runc's input.  Call it again after a restart.

        Returns warnings about limits of the configuration that this node could not set.

        Args:
            shared: Namespaces that the container shares with other containers.

        Raises: OSError; InvalidArgument: unknown user, invalid capability, ...; FailedPrecondition: this node cannot
        confine it, a device is missing, or a mount cannot be propagated.
        """
        config = container.config
        mapped_mounts.check_mapping(container, self.users)
        if config.is_process:
            machine_files.check(container, is_in_user_namespace=self._capacity.is_in_user_namespace)
            machine_files.own_volumes(config, self.path(container.id) / "root")
        self._confine(config)
        check_propagation(config.mounts)
        found = devices.look_up(config.machine, self._capacity.cdi_directories)
        with self._mounts:
            self.mount(container)
            image_mounts.mount_all(container, self._images(container.id), self.path(container.id) / "images")
            self._to_release.discard(container.id)
        tmpfs_mounts.mount_all(container, self._tmpfs(container.id), partial(self._mode_in_image, container))
        if config.machine.ipc_mode == "shareable":
            shared = msgspec.structs.replace(shared, shm=self._mount_shm(container))
        user = self._identity(container, config.user)
        capacity, init = self._capacity, self._capacity.init_binary
        if config.init and init and config.mount_label:
            program = selinux.shared_program(init, self._run, config.mount_label)
            capacity = msgspec.structs.replace(capacity, init_binary=program)
        built = runtime_spec.build(
            self._with_api(self._with_parts(container)),
            user,
            capacity,
            rootfs=str(self.rootfs(container.id)),
            cgroup=self._cgroups.path_of(container),
            files=machine_files.added(config, self._write_files(container)),
            devices=found,
            shared=shared,
        )
        if config.is_process:
            machine_files.hide(built.specification, (self._directory.parent, self._run.parent))
        if container.users is not None:
            request_flags(built.specification["mounts"])
        if container.runtime == "crun":
            adapt_to_crun(built.specification["mounts"])
        self.specification(container.id).touch(mode=0o600)
        self.specification(container.id).write_bytes(msgspec.json.encode(built.specification))
        for warning in built.warnings:
            log.warning("container limit not applied", container=container.name, warning=warning)
        return built.warnings

    def label_sources(self, container: Container) -> None:
        """Set the SELinux labels of the sources of mounts.  Blocks.  Raises: FailedPrecondition."""
        relabel_sources(container.config, self._with_parts(container).config.mounts)

    def specification(self, id: ContainerId) -> Path:
        """Return the file with the runtime's input."""
        return self.bundle(id) / "config.json"

    def map_volumes(self, container: Container, is_over: Callable[[], bool]) -> None:
        """Mount the container's views, unless ``is_over`` returns True meanwhile.  Raises: OSError."""
        views = self._views(container.id)
        mapped_mounts.mount_all(container, self._placed(container), views, self._mapped, is_over)

    def release_views(self, id: ContainerId) -> None:
        """Undo ``map_volumes``, because runc has its own mounts by now."""
        mapped_mounts.unmount_all(self._views(id))

    def _with_parts(self, container: Container) -> Container:
        """Replace volume subpaths, images, memory file systems and mapped volumes by their paths on this node."""
        views = self._views(container.id)
        mounts = mapped_mounts.placed(container, self._placed(container), views, self._mapped)
        config = msgspec.structs.replace(container.config, mounts=mounts)
        return msgspec.structs.replace(container, config=config)

    def _placed(self, container: Container) -> tuple[MountPoint, ...]:
        targets, images = iter(self.parts(container)), self._images(container.id)
        return tuple(
            image_mounts.placed(point, number, images)
            if point.type == "image"
            else tmpfs_mounts.placed(point, number, self._tmpfs(container.id))
            if point.type == "tmpfs"
            else msgspec.structs.replace(point, source=str(next(targets).target))
            if point.subpath
            else point
            for number, point in enumerate(container.config.mounts)
        )

    def _with_api(self, container: Container) -> Container:
        """Replace the API's socket by a socket of the container's own."""
        own = self.api(container.id)
        given = self.apis.give(container.config.mounts, own)
        if given.has_socket:
            self.apis.open(container, own)
        config = msgspec.structs.replace(container.config, mounts=given.mounts)
        return msgspec.structs.replace(container, config=config)

    def prepare_exec(self, container: Container, exec_id: str, exec: ExecConfig) -> Path:
        """Create directory and process specification of an exec.  Raises: InvalidArgument: unknown user."""
        self._confine(container.config)
        if container.config.is_process:
            machine_files.check_exec(exec)
        user = self._identity(container, exec.user or container.config.user)
        path = self.exec_path(container.id, exec_id)
        path.mkdir(parents=True)
        process = runtime_spec.exec_process(container, exec, user, self._capacity)
        (path / "process.json").write_bytes(msgspec.json.encode(process))
        return path

    def _identity(self, container: Container, user: str) -> ProcessUser:
        if container.config.is_process:
            return machine_files.identity_of(user, container.config.groups)
        return identity(self.rootfs(container.id), user, container.config.groups)

    def release(self, id: ContainerId) -> None:
        """Unmount the root file system of an ended container.  Its changes and output stay.

        If it is borrowed, it is unmounted after the last ``give_back``.
        """
        with self._mounts:
            if self._borrowers[id]:
                self._to_release.add(id)
            else:
                syscalls.unmount_if_mounted(self.rootfs(id))
        self.apis.close(id)
        image_mounts.unmount_all(self._images(id))
        image_mounts.unmount_all(self._tmpfs(id))
        self.release_views(id)
        if self.shm(id).is_dir():
            syscalls.unmount_if_mounted(self.shm(id))

    def is_mounted(self, id: ContainerId) -> bool:
        """Return whether the root file system is mounted."""
        return os.path.ismount(self.rootfs(id))

    def borrow(self, container: Container) -> RootFiles:
        """Return the root file system, mounted at least until ``give_back``.  Raises: OSError."""
        id = container.id
        with self._mounts:
            if not os.path.ismount(self.rootfs(id)):
                self.mount(container)
                self._to_release.add(id)
            self._borrowers[id] += 1
        return RootFiles(self.rootfs(id), self._binds(container), container.users)

    def give_back(self, id: ContainerId) -> None:
        """Undo ``borrow``."""
        with self._mounts:
            self._borrowers[id] -= 1
            if self._borrowers[id]:
                return
            del self._borrowers[id]
            if id in self._to_release:
                self._to_release.discard(id)
                syscalls.unmount_if_mounted(self.rootfs(id))

    def _binds(self, container: Container) -> Sequence[Bind]:
        points = container.config.mounts
        found = {
            point.destination: Bind(
                point.source,
                point.destination,
                point.read_only,
                point.subpath,
                mapped_mounts.is_mapped(container, point, self._mapped)
                and not mapped_mounts.has_own_owners(point),
            )
            for point in points
            if point.type in ("bind", "volume") and point.source and not point.internal
        }
        taken = {point.destination for point in points}
        for target in _FILES_OF_THE_NODE - taken:
            file = self.path(container.id) / os.path.basename(target)
            if file.exists():  # the file exists once the container was started
                found[target] = Bind(str(file), target)
        if container.config.is_process:
            found = machine_files.closed(found, self.path(container.id) / "root")
        return sorted(found.values(), key=lambda bind: bind.target)

    async def discard(self, id: ContainerId) -> None:
        """Remove the directories with everything in them.

        The record is removed last, so that an interrupted removal is continued.
        Raises: OSError: a part of the files is left.  The record is then left too.
        """
        self.apis.close(id)
        await asyncio.to_thread(syscalls.unmount_if_mounted, self.rootfs(id))
        for place in (self._images(id), self._tmpfs(id), self._views(id)):
            await asyncio.to_thread(image_mounts.unmount_all, place)
        await remove_tree(self.bundle(id))
        await remove_tree(self.path(id), keep=records.NAME)

    def changes(self, container: Container) -> Sequence[tuple[int, str]]:
        """Return the differences from the image, sorted by path: 0 modified, 1 added, 2 deleted.

        Mount points of files that the node writes do not count.
        """
        upper = self.path(container.id) / "upper"
        lower = [Path(layer) for layer in container.layers]
        found = []
        for inside, status in walk(upper):
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                found.append((2, f"/{inside}"))
            elif any(overlay.has(layer, inside) for layer in lower):
                found.append((0, f"/{inside}"))
            else:
                found.append((1, f"/{inside}"))
        own = [
            one
            for one in found
            if one[1] not in _FILES_OF_THE_NODE and one not in ((1, "/dev"), (1, "/proc"), (1, "/sys"))
        ]
        if len(own) < len(found) and not any(inside.startswith("/etc/") for _, inside in own):
            own = [one for one in own if one[1] != "/etc"]  # it holds only the node's files
        return sorted(own, key=lambda one: one[1])

    def _confine(self, config: ContainerConfig) -> None:
        """Load the default AppArmor profile if it is missing, because an upgrade of AppArmor may have unloaded it.

        Raises: FailedPrecondition: it cannot be loaded.
        """
        if self._capacity.has_apparmor and config.apparmor == "default":
            apparmor.load_default(self._capacity.sysfs)

    def mount(self, container: Container) -> None:
        """Mount the root file system.  Idempotent.  Raises: OSError."""
        path = self.path(container.id)
        target = self.rootfs(container.id)
        target.mkdir(mode=0o755, parents=True, exist_ok=True)
        if self.users is not None:
            mapped_mounts.share_directory(target.parent, container.users)
        if not os.path.ismount(target):
            lower = (path / "root",) if container.config.is_process else container.layers
            layers = [Path(layer) for layer in lower]
            label = container.config.mount_label
            overlay.mount_layers(layers, path / "upper", path / "work", target, container.users, label)

    def _mode_in_image(self, container: Container, path: str) -> int:
        """Return the mode for a tmpfs at ``path``: the mode of the image's directory, as in Docker, or the default.

        Directories that an earlier start created in the container do not count.
        """
        inside = os.path.normpath(path).lstrip("/")
        if any(overlay.has(Path(layer), inside) for layer in container.layers):
            with suppress(OSError):
                opened = syscalls.open_in_root(self.rootfs(container.id), path, os.O_PATH | os.O_DIRECTORY)
                try:
                    return stat.S_IMODE(os.fstat(opened).st_mode)
                finally:
                    os.close(opened)
        return tmpfs_mounts.DEFAULT_MODE

    def _mount_shm(self, container: Container) -> str:
        target = self.shm(container.id)
        target.mkdir(exist_ok=True)
        if not os.path.ismount(target):
            flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
            words = ["mode=1777", f"size={container.config.shm_bytes}"]
            if container.users is not None:
                words = tmpfs_mounts.owned_words(words, container.users)
            label = selinux.mount_option(container.config.mount_label)
            syscalls.mount("shm", target, "tmpfs", flags, ",".join(filter(None, (*words, label))))
        return str(target)

    def _write_files(self, container: Container) -> Sequence[MountPoint]:
        """Write /etc/hosts, /etc/hostname and /etc/resolv.conf.

        Return the mounts of those where the user mounts nothing.
        """
        path = self.path(container.id)
        taken = {point.destination for point in container.config.mounts}
        if container.mode is NetworkMode.CONTAINER:  # use the files of the container whose network it shares
            other = self.path(ContainerId(other_container(container.network_mode)))
            for name in _NAMES:  # as hard links, because a third container may share this container's network
                (path / name).unlink(missing_ok=True)
                (path / name).symlink_to(other / name)
                selinux.relabel(str(other / name), container.config.mount_label, selinux.SHARED)
            return [_file(path, name) for name in _NAMES if f"/etc/{name}" not in taken]
        points = []
        for name, content in self._name_files(container).items():
            file = path / name
            # Keep the file of a task's container that has run, which may have changed it.  Rewrite a plain container's
            # file, because it may be on other networks now.
            if container.plain is not None or not container.was_started or not file.exists():
                file.write_text(content)
                file.chmod(0o644)
                if container.users is not None:
                    os.chown(file, *container.users.root)
                selinux.relabel(str(file), container.config.mount_label, selinux.PRIVATE)
            if f"/etc/{name}" not in taken:
                points.append(_file(path, name))
        return points

    def refresh_name_files(self, before: Container, after: Container) -> None:
        """Rewrite the files of ``_name_files`` of a running container after a change of its networks.

        A file that the container has modified is not changed.  Raises: OSError.
        """
        old = self._name_files(before)
        for name, text in self._name_files(after).items():
            expected = old[name].encode()
            if text.encode() == expected:
                continue
            # Written in place, because the file is mounted and the container would not see a new file.
            with (self.path(after.id) / name).open("r+b") as file:
                if file.read(len(expected) + 1) == expected:
                    file.seek(0)
                    file.write(text.encode())
                    file.truncate()

    def _name_files(self, container: Container) -> Mapping[str, str]:
        """Return the content of /etc/hosts, /etc/hostname and /etc/resolv.conf."""
        config, sandbox = container.config, container.sandbox
        addresses = sandbox.own_addresses if sandbox is not None else ()
        node_resolver = self._resolver.read_text() if self._resolver.is_file() else ""
        return {
            "hosts": hosts_file(config.hostname, addresses, config.hosts),
            "hostname": f"{config.hostname}\n",
            "resolv.conf": resolver_file(
                node_resolver,
                config.nameservers,
                config.search_domains,
                config.dns_options,
                is_named=sandbox is not None and bool(sandbox.endpoints),
            ),
        }


def _file(path: Path, name: str) -> MountPoint:
    return MountPoint(type="bind", source=str(path / name), destination=f"/etc/{name}", internal=True)


def forget_environment(specification: Path, entries: Sequence[str]) -> None:
    """Remove secret variables from a file with a runtime's input, because memory can be swapped out and the file
    outlives this process.
    """
    try:
        decoded = msgspec.json.decode(specification.read_bytes())
        process = decoded["process"]
        process["env"] = [entry for entry in process["env"] if entry not in entries]
        # At once, because crun reads its copy for each command, and this process can be killed at any time.
        replace_file(
            specification,
            msgspec.json.encode(decoded),
            mode=stat.S_IMODE(specification.stat().st_mode),
            is_durable=False,
        )
    except FileNotFoundError:
        return
    except (OSError, ValueError):  # the memory file system is full, or was full when the file was written
        specification.unlink(missing_ok=True)  # the next start writes it again
