"""Validates requested mounts of containers, and copies an image's files into new volumes."""

import asyncio
import errno
import os
import posixpath
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import urlsplit

from skep.api.formats.gosyntax import parse_size
from skep.engine.confinement import selinux
from skep.engine.containers.container import ContainerConfig, MountPoint
from skep.engine.volumes.tmpfs_mounts import check_options
from skep.errors import FailedPrecondition, InvalidArgument, Unavailable
from skep.linux import mounting, without_links
from skep.linux.commands import communicate
from skep.linux.syscalls import open_in_root
from skep.linux.user_namespaces import mapping
from skep.linux.without_links import open_without_links, path_of
from skep.model.container import BindOptions, Mount, TmpfsOptions
from skep.model.values.user_map import UserMap

_COPY_DEADLINE_S = 600.0
"""Time limit in seconds for the copy into one volume."""

_NEEDED: Final = {"device": ("type",), "type": ("device",), "o": ("device", "type")}
"""Other options that each volume option requires."""


def check_local_options(name: str, options: Mapping[str, str]) -> None:
    """Check options of a ``local`` volume.  Raises: InvalidArgument, in Docker's words.

    Source: moby 28, volume/local/local_unix.go (validateOpts).
    """
    for option in options:
        if option not in (*_NEEDED, "size"):
            raise InvalidArgument(f'create {name}: invalid option: "{option}"')
    if options.get("type") == "cifs":
        try:
            port = urlsplit(options.get("device", "")).port
        except ValueError as error:
            raise InvalidArgument(f"create {name}: error parsing mount device url: {error}") from error
        if port is not None:
            raise InvalidArgument(
                f"create {name}: port not allowed in CIFS device URL, include 'port' in 'o='"
            )
    if "size" in options and _size(name, options["size"]) > 0:
        raise InvalidArgument(f"create {name}: quota size requested but no quota support")
    for option, others in _NEEDED.items():
        for other in others if option in options else ():
            if other not in options:
                raise InvalidArgument(f'create {name}: missing required option: "{other}"')


def _size(name: str, text: str) -> int:
    try:
        return parse_size(text)
    except InvalidArgument as error:
        raise InvalidArgument(f"create {name}: {error}") from error


def check_paths(mount: Mount) -> None:
    """Check a mount's target, and the source of a bind mount.  Raises: InvalidArgument, in Docker's words.

    Relative paths are refused, because they would be relative to the working directory of this process or of runc.
    Source: moby 28, volume/mounts/linux_parser.go.
    """
    invalid = f'invalid mount config for type "{mount.type}"'
    if not mount.target:
        raise InvalidArgument(f"{invalid}: field Target must not be empty")
    if posixpath.normpath(mount.target).strip("/") == "":
        raise InvalidArgument(f"{invalid}: invalid specification: destination can't be '/'")
    for path in (mount.target, mount.source if mount.type == "bind" else ""):
        if path and not path.startswith("/"):
            raise InvalidArgument(f"{invalid}: invalid mount path: '{path}' mount path must be absolute")
    if mount.type == "tmpfs" and mount.source:
        raise InvalidArgument(f"{invalid}: field Source must not be specified")


def check_option_types(mounts: Iterable[Mount]) -> None:
    """Raise InvalidArgument for options of another type than the mount's.

    Source: moby, daemon/server/router/container/container_routes.go (postContainersCreate, API 1.42 and later).
    """
    for mount in mounts:
        given = (
            ("VolumeOptions", "volume", mount.volume_options),
            ("BindOptions", "bind", mount.bind_options),
            ("TmpfsOptions", "tmpfs", mount.tmpfs_options),
        )
        for name, type, options in given:
            if options is not None and mount.type != type:
                raise InvalidArgument(f'{name} must not be specified on mount type "{mount.type}"')


def check_subpath(type: str, subpath: str) -> None:
    """Check a subpath in a mount of a ``type``.  Raises: InvalidArgument, in Docker's words.

    Source: moby 28, volume/mounts/linux_parser.go.
    """
    depth = 0
    for word in PurePosixPath(subpath).parts:
        depth += -1 if word == ".." else 1
        if depth < 0 or word == "/" or "\0" in word:
            raise InvalidArgument(
                f'invalid mount config for type "{type}": subpath must be a relative path within the volume'
            )


_COPY_INTO_EMPTY = '[ -n "$(ls -A -- "$1")" ] || exec cp -a -- "$0" "$1"'


def has_directory(root: Path, path: str) -> bool:
    try:
        os.close(open_in_root(root, path, os.O_PATH | os.O_DIRECTORY))
    except OSError:
        return False
    return True


async def copy_up(
    root: Path, destination: str, volume: Path, *, is_mounted: bool = False, users: UserMap | None = None
) -> None:
    """Fill an empty volume with the image's files at its mount point, and set the directory's owner and mode.

    No link in the volume is followed, even if another process creates one meanwhile.

    Args:
        is_mounted: Whether the volume is a mount, for which a separate process checks whether it is empty.
        users: The mapping with which ``root`` was mounted.  A volume that is a mount gets the machine's ids.

    Raises: Unavailable: the copy failed.
    """
    if not is_mounted and any(volume.iterdir()):
        return
    try:
        opened = [open_in_root(root, destination, os.O_RDONLY | os.O_DIRECTORY)]
    except OSError:
        return  # the image has no directory there
    try:
        # Other containers may use the volume, and create links in it meanwhile.
        command = ["sh", "-c", _COPY_INTO_EMPTY, path_of(opened[0])]
        given = list(opened)
        if is_mounted or users is not None:
            namespace = ""
            if users is not None and not is_mounted:
                given.append(await asyncio.to_thread(mapping, users.kernel_text))
                namespace = str(given[-1])
            command = [sys.executable, "-I", "-m", without_links.__name__, str(volume), namespace, *command]
        else:
            opened.append(open_without_links(str(volume)))
            given.append(opened[1])
            command.append(path_of(opened[1]))
        process = await asyncio.create_subprocess_exec(
            *command,
            pass_fds=given,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await communicate(process, _COPY_DEADLINE_S)
    except TimeoutError as error:
        raise Unavailable(f"cannot fill volume {volume.parent.name}: it takes too long") from error
    except OSError as error:
        raise Unavailable(f"cannot fill volume {volume.parent.name}: {error.strerror}") from error
    finally:
        for descriptor in opened:
            os.close(descriptor)
    if process.returncode:
        raise Unavailable(
            f"cannot fill volume {volume.parent.name}: {errors.decode(errors='replace').strip()}"
        )


def move_files(source: Path, target: Path) -> bool:
    """Move a directory's files into the directory ``target``, which gets its owner, mode and attributes.

    Files that came to ``target`` meanwhile keep it as it is.  Returns False, with nothing moved, if ``target`` is on
    another file system.  Raises: Unavailable.
    """
    try:
        if any(target.iterdir()):
            return True
        status = source.stat()
        if status.st_dev != target.stat().st_dev:
            return False
        for number, name in enumerate(os.listdir(source)):
            try:
                (source / name).rename(target / name)
            except OSError as error:
                if error.errno != errno.EXDEV or number:
                    raise
                return False
        os.chown(target, status.st_uid, status.st_gid)
        shutil.copystat(source, target)
    except OSError as error:
        raise Unavailable(f"cannot fill volume {target.parent.name}: {error.strerror}") from error
    return True


def mount_point(mount: Mount, source: str, name: str) -> MountPoint:
    """Convert a mount.  ``source`` is its path on this node, ``name`` the volume's.  Raises: InvalidArgument."""
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


def relabel_modes(
    binds: Iterable[str], points: Iterable[MountPoint], requested: Mapping[str, str]
) -> Mapping[str, str]:
    """Return how SELinux labels the sources of mounts, by target: ``z`` or ``Z``.  Others are not labeled.

    A volume of this node gets the shared label if its mount names none.

    Args:
        binds: ``HostConfig.Binds`` of the request.
        points: The container's mounts, without mounts of ``--volumes-from``.
        requested: Further modes by target.

    Source: moby, daemon/volumes.go (setBindModeIfNull), daemon/create_unix.go.
    """
    volumes = (point for point in points if point.type == "volume" and point.driver == "local")
    modes = {point.destination: selinux.SHARED for point in volumes}
    for words in (text.split(":") for text in binds):
        options = words[2].split(",") if len(words) == 3 else []
        modes |= [(words[1], word) for word in options if word in (selinux.SHARED, selinux.PRIVATE)]
    return {**modes, **requested}


def relabel_sources(config: ContainerConfig, placed: Iterable[MountPoint]) -> None:
    """Set the SELinux labels of the sources of mounts.  Blocks, for large trees for long.

    ``placed`` are the container's mounts with the node's paths.  Secrets and configs belong to this container alone.

    Raises: FailedPrecondition, in Docker's words.
    """
    for point, at in zip(config.mounts, placed, strict=True) if config.mount_label else ():
        mode = selinux.PRIVATE if point.internal else config.relabel.get(point.destination, "")
        if mode and at.source:
            selinux.relabel(at.source, config.mount_label, mode)


_SHARED, _SLAVE = ("shared:",), ("shared:", "master:")
_PASSING_ON: Final = {
    "shared": ("shared", _SHARED),
    "rshared": ("shared", _SHARED),
    "slave": ("shared or slave", _SLAVE),
    "rslave": ("shared or slave", _SLAVE),
}
"""For each requested propagation: the propagation that the mount of the source must have, and how to name it."""


def check_propagation(points: Iterable[MountPoint]) -> None:
    """Raise FailedPrecondition, in Docker's words, if mounts could not propagate as requested.

    Source: moby 28, daemon/oci_linux.go (ensureShared, ensureSharedOrSlave).
    """
    for point in points:
        if point.propagation not in _PASSING_ON:
            continue
        words, fields = _PASSING_ON[point.propagation]
        target, given = mounting.containing_mount(os.path.realpath(point.source))
        if not any(field.startswith(fields) for field in given):
            raise FailedPrecondition(
                f"path {point.source} is mounted on {target} but it is not a {words} mount"
            )


def _read_only_below(options: BindOptions | None) -> bool | None:
    if options is not None and options.read_only_force_recursive:
        return True
    return False if options is not None and options.read_only_non_recursive else None


def _tmpfs_options(options: TmpfsOptions) -> tuple[str, ...]:
    """Return the options of a tmpfs.  Raises: InvalidArgument."""
    chosen = ["noexec", "nosuid", "nodev", "rprivate"]
    if options.mode:
        chosen.append(f"mode={options.mode:o}")
    if options.size_bytes:
        chosen.append(f"size={options.size_bytes}")
    for option in options.options:
        word = "=".join(option)
        opposite = word.removeprefix("no") if word.startswith("no") else f"no{word}"
        chosen = [one for one in chosen if one not in (word, opposite)] + [word]
    check_options(chosen)
    return tuple(chosen)
