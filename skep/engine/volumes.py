"""Local volumes: directories of the node that outlive the containers which use them; and mounts of containers."""

import asyncio
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from skep.aio.failures import describe_error, log_error
from skep.aio.trees import remove_tree
from skep.engine.container import MountPoint
from skep.errors import InvalidArgument, Unavailable
from skep.linux.commands import communicate
from skep.linux.files import replace_file
from skep.linux.syscalls import open_in_root
from skep.model.container import BindOptions, Mount, TmpfsOptions

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_COPY_DEADLINE_S = 600.0
_LABELS = "labels.json"
_NAMELESS = re.compile(r"[0-9a-f]{64}")
ANONYMOUS = "com.docker.volume.anonymous"
"""Docker's label of a volume without a name."""


class Volumes:
    """The volumes of one node, each at ``<data>/volumes/<name>/_data``, with its labels beside in ``labels.json``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, name: str) -> Path:
        """Where a volume's files are.  Raises: InvalidArgument, with Docker's words: no name for a volume."""
        if len(name) == 1:
            raise InvalidArgument(
                f"create {name}: volume name is too short, names should be at least two alphanumeric characters"
            )
        if not _NAME.fullmatch(name):
            raise InvalidArgument(
                f'create {name}: "{name}" includes invalid characters for a local volume name,'
                ' only "[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed. If you intended to pass a host directory,'
                " use absolute path"
            )
        return self._directory / name / "_data"

    def names(self) -> list[str]:
        """All volumes of the node, sorted."""
        try:
            return sorted(entry.name for entry in self._directory.iterdir() if (entry / "_data").is_dir())
        except FileNotFoundError:
            return []  # none was made yet

    def created_ns(self, name: str) -> int:
        """When the volume was made, Unix time."""
        return self.path(name).parent.stat().st_mtime_ns

    def ensure(self, name: str, labels: Mapping[str, str] | None = None) -> Path:
        """The volume's directory, made if there is none, with ``labels`` then; one that is there keeps its own."""
        path = self.path(name)
        if path.is_dir():
            return path
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if labels is not None:  # before the directory, with which the volume is there
            replace_file(path.parent / _LABELS, msgspec.json.encode(labels))
        path.mkdir(mode=0o755, exist_ok=True)
        return path

    def labels(self, name: str) -> Mapping[str, str] | None:
        """The labels it was made with; None: it was made by a container without labels, or they cannot be read."""
        try:
            return msgspec.json.decode((self.path(name).parent / _LABELS).read_bytes(), type=dict[str, str])
        except FileNotFoundError:
            return {ANONYMOUS: ""} if _NAMELESS.fullmatch(name) else None
        except Exception as error:  # one volume's error does not reach others
            log_error(error, "labels of a volume not read", volume=name)
            return None

    async def remove(self, name: str) -> None:
        """Remove a volume with everything in it.  Raises: Unavailable: something of it is left."""
        try:
            await remove_tree(self.path(name).parent)
        except OSError as error:
            raise Unavailable(f"cannot remove volume {name}: {describe_error(error)}") from error

    # --- mounts of containers -----------------------------------------------------------------------------------

    def mount_points(self, mounts: Iterable[Mount], image_volumes: Iterable[str]) -> list[MountPoint]:
        """What a container mounts; volumes that do not exist are made.

        ``image_volumes``: targets of the image's volumes; one without a name, where ``mounts`` has nothing.
        Raises: InvalidArgument, in Docker's words.
        """
        points = [self._mount_point(mount) for mount in mounts]
        taken = {point.destination for point in points}
        anonymous = sorted(set(image_volumes) - taken)
        return points + [self._mount_point(Mount(type="volume", target=one)) for one in anonymous]

    def _mount_point(self, mount: Mount) -> MountPoint:
        match mount.type:
            case "bind":
                if not os.path.exists(mount.source):
                    options = mount.bind_options
                    if options is None or not options.create_mountpoint:
                        raise InvalidArgument(
                            'invalid mount config for type "bind": bind source path does not exist: '
                            f"{mount.source}"
                        )
                    os.makedirs(mount.source)
                return mount_point(mount, mount.source, "")
            case "volume" | "":
                driver = mount.volume_options.driver_config if mount.volume_options else None
                if driver is not None and driver.name not in ("", "local"):
                    raise InvalidArgument(
                        f'error looking up volume plugin {driver.name}: plugin "{driver.name}" not found'
                    )
                name = mount.source or self.new_name()
                check_local_options(name, driver.options if driver is not None else {})
                if mount.volume_options and mount.volume_options.subpath:
                    raise InvalidArgument(
                        f"volume {name}: mounts of a subpath are not supported by this node"
                    )
                labels = mount.volume_options.labels if mount.volume_options and mount.source else None
                path = self.ensure(name, labels or None)
                point = mount_point(mount, str(path), name)
                return msgspec.structs.replace(point, anonymous=not mount.source)
            case _:
                return mount_point(mount, mount.source, "")

    async def fill(self, points: Iterable[MountPoint], mounts: Iterable[Mount], root: Path) -> None:
        """Copy what the image has at their targets into new volumes, unless the mount has ``nocopy``.

        ``root``: the container's root file system.  Raises: Unavailable.
        """
        unfilled = {mount.target for mount in mounts if mount.volume_options and mount.volume_options.no_copy}
        for point in points:
            if point.type == "volume" and point.destination not in unfilled:
                await copy_up(root, point.destination, self.path(point.name))

    async def remove_anonymous(self, points: Iterable[MountPoint]) -> None:
        """Remove the volumes that were made for one container alone.  Raises: Unavailable."""
        for point in points:
            if point.type == "volume" and point.anonymous:
                await self.remove(point.name)

    @staticmethod
    def new_name() -> str:
        """A name for a volume without one: 64 hexadecimal characters, as Docker's."""
        return secrets.token_hex(32)


_LOCAL_OPTIONS = frozenset({"type", "o", "device", "size"})


def check_local_options(name: str, options: Iterable[str]) -> None:
    """Options of a volume of the driver ``local``.  Raises: InvalidArgument: any, by its name."""
    for option in options:
        if option not in _LOCAL_OPTIONS:
            raise InvalidArgument(f'create {name}: invalid option: "{option}"')
        raise InvalidArgument(
            f'create {name}: option "{option}" of the driver "local" is not supported: mount it on the machine,'
            " and into containers as a bind mount"
        )


async def copy_up(root: Path, destination: str, volume: Path) -> None:
    """Fill an empty volume with what the image has at its mount point, owner and mode of the directory
    included.

    Raises: Unavailable: the copy failed.
    """
    if any(volume.iterdir()):
        return
    try:
        source = open_in_root(root, destination, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return  # the image has nothing there
    try:
        process = await asyncio.create_subprocess_exec(
            *("cp", "-a", f"/proc/self/fd/{source}/.", str(volume)),
            pass_fds=(source,),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await communicate(process, _COPY_DEADLINE_S)
    except TimeoutError as error:
        raise Unavailable(f"cannot fill volume {volume.parent.name}: it takes too long") from error
    finally:
        os.close(source)
    if process.returncode:
        raise Unavailable(
            f"cannot fill volume {volume.parent.name}: {errors.decode(errors='replace').strip()}"
        )


def mount_point(mount: Mount, source: str, name: str) -> MountPoint:
    """One mount.  ``source``: the path on this node; ``name``: the volume's.  Raises: InvalidArgument."""
    if not mount.target.startswith("/"):
        raise InvalidArgument(f"invalid mount target, must be an absolute path: {mount.target}")
    match mount.type:
        case "bind":
            options = mount.bind_options
            if options is not None and options.read_only_force_recursive:
                if not mount.read_only:
                    raise InvalidArgument(
                        "mount options conflict: !ReadOnly && BindOptions.ReadOnlyForceRecursive"
                    )
                if options.read_only_non_recursive:
                    raise InvalidArgument(
                        "mount options conflict: ReadOnlyNonRecursive && BindOptions.ReadOnlyForceRecursive"
                    )
            return MountPoint(
                type="bind",
                source=source,
                destination=mount.target,
                read_only=mount.read_only,
                propagation=options.propagation if options else "",
                options=("bind",) if options and options.non_recursive else (),
                read_only_below=_read_only_below(options),
            )
        case "volume" | "":
            return MountPoint(
                type="volume",
                source=source,
                name=name,
                driver="local",
                destination=mount.target,
                read_only=mount.read_only,
            )
        case "tmpfs":
            return MountPoint(
                type="tmpfs",
                destination=mount.target,
                read_only=mount.read_only,
                options=_tmpfs_options(mount.tmpfs_options or TmpfsOptions()),
            )
        case _:
            raise InvalidArgument(f'mount type "{mount.type}" is not supported by this node')


def _read_only_below(options: BindOptions | None) -> bool | None:
    if options is not None and options.read_only_force_recursive:
        return True
    return False if options is not None and options.read_only_non_recursive else None


def _tmpfs_options(options: TmpfsOptions) -> tuple[str, ...]:
    chosen = ["noexec", "nosuid", "nodev", "rprivate"]
    if options.mode:
        chosen.append(f"mode={options.mode:o}")
    if options.size_bytes:
        chosen.append(f"size={options.size_bytes}")
    for option in options.options:
        word = "=".join(option)
        opposite = word.removeprefix("no") if word.startswith("no") else f"no{word}"
        chosen = [one for one in chosen if one not in (word, opposite)] + [word]
    return tuple(chosen)
