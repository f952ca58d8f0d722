"""Mounts for containers whose users are mapped: the node's files with the owners that the container sees.

A volume's files keep the container's ids on the disk.  So a volume has the same owners for every container that mounts
it, with mapped users or without.  runc mounts an id-mapped view of the volume, which exists while the container starts.
Bind mounts of the machine's files are mounted as they are, as in Docker.  So are volumes that mount something
themselves (a file server, a device, a plug-in's directory), because it may be a directory of the machine.
"""

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import structlog
from msgspec.structs import replace

from skep.aio.blocking import BlockingCalls
from skep.engine.containers.container import Container, MountPoint
from skep.errors import FailedPrecondition, Unavailable
from skep.linux import mounting, syscalls
from skep.linux.user_namespaces import mapping, open_mapped_if_possible
from skep.model.values.user_map import UserMap

log = structlog.get_logger()

_DEADLINE_S: Final = 10.0
"""Time limit in seconds for the views of one container, which holds a start slot meanwhile."""


def check_mapping(container: Container, users: UserMap | None) -> None:
    """Check that the container was created with the present mapping ``users``.  Raises: FailedPrecondition."""
    if container.users != (None if container.config.machine.userns_mode == "host" else users):
        raise FailedPrecondition(
            f"container {container.name} was created with another userns-remap than the node has now: "
            "remove it and create it again"
        )


def is_mapped(container: Container, point: MountPoint, own: Sequence[Path]) -> bool:
    """Return whether the container gets a view of a mount: of volumes, and of cluster volumes, ``own/ID/mount``.

    A path inside a cluster volume does not count, because a link there may lead to a file of the machine.
    A build has created the bind mounts of its steps itself.  The view has the container's owners unless the volume
    mounts something (``has_own_owners``).
    """
    if container.users is None or point.internal or not point.source:
        return False
    if point.type == "volume":
        return True
    is_step = container.plain is not None and container.plain.is_step
    source = Path(os.path.normpath(point.source))
    return point.type == "bind" and (is_step or source.parent.parent in own)


def has_own_owners(point: MountPoint, is_mount: Callable[[Path], bool] = mounting.is_target) -> bool:
    """Return whether a volume, which is mounted by now, has owners that are the machine's.  Blocks."""
    return point.type == "volume" and is_mount(Path(point.source))


def placed(
    container: Container, points: Sequence[MountPoint], place: Path, own: Sequence[Path]
) -> tuple[MountPoint, ...]:
    """Return ``points`` for runc: the container's mounts, with the paths at which ``mount_all`` mounts the views."""
    return tuple(
        # Not "bind", because the node's own paths are refused as sources of users' bind mounts.
        replace(point, type="volume", source=str(place / str(number)), read_only=False, read_only_below=None)
        if is_mapped(container, given, own)
        else point
        for number, (given, point) in enumerate(zip(container.config.mounts, points, strict=True))
    )


class ViewMounts:
    """Mounts views within a time limit, because the file server of a volume may not respond."""

    def __init__(self) -> None:
        self.deadline_s = _DEADLINE_S
        self._calls = BlockingCalls(busy="containers already wait for their volumes")

    async def mount(self, name: str, work: Callable[[Callable[[], bool]], None]) -> None:
        """Mount the views of the container ``name`` by ``work``, whose argument is ``is_over`` of ``mount_all``.

        Raises: OSError; Unavailable: a volume does not respond, or too many others do not.
        """
        over = threading.Event()
        try:
            await self._calls.call(partial(work, over.is_set), self.deadline_s)
        except TimeoutError as error:
            raise Unavailable(
                f"a volume of container {name} does not respond within {self.deadline_s:g} s: "
                "look after its file server"
            ) from error
        finally:
            over.set()


def mount_all(
    container: Container,
    points: Sequence[MountPoint],
    place: Path,
    own: Sequence[Path],
    is_over: Callable[[], bool] = bool,
) -> None:
    """Mount the views of ``points``, each by its number below ``place``.  Does nothing if no users are mapped.

    ``is_over`` returns whether the start has ended meanwhile, so that no view is mounted late.  Raises: OSError.
    """
    users = container.users
    if users is None:
        return
    for number, (given, point) in enumerate(zip(container.config.mounts, points, strict=True)):
        if not is_mapped(container, given, own):
            continue
        wanted = None if has_own_owners(given) else users
        if not _mount(point, place / str(number), wanted, is_over):
            log.info(
                "mount without mapped users",
                container=container.name,
                mount=point.destination,
                reason="its file system has owners of its own",
            )


def unmount_all(place: Path) -> None:
    """Undo ``mount_all``.  The container keeps its own mounts.  Raises: OSError."""
    if place.is_dir():
        for target in place.iterdir():
            syscalls.unmount_if_mounted(target)


def _mount(point: MountPoint, target: Path, users: UserMap | None, is_over: Callable[[], bool]) -> bool:
    """Mount the view of one mount, read-only if the mount is.  Return whether it has the container's owners."""
    is_directory = os.path.isdir(point.source)
    if users is None:
        mounted, is_mapped = syscalls.clone_mount(point.source, recursive=True), False
    elif _is_owned(point.source, users):
        mounted, is_mapped = syscalls.clone_mount(point.source, recursive=True), True
    else:
        mounted, is_mapped = open_mapped_if_possible(point.source, mapping(users.kernel_text))
    try:
        # Here, because the kernel refuses runc's remount if the source has more flags, such as nosuid.
        if point.read_only:
            syscalls.make_read_only(mounted, recursive=point.read_only_below is not False)
        syscalls.follow_machine(mounted)  # or unmounting the view would unmount the mounts in the volume
        if is_over():
            return True
        _make_target(target, is_directory=is_directory)
        syscalls.move_mount(mounted, str(target))
    finally:
        os.close(mounted)
    return is_mapped


def _is_owned(source: str, users: UserMap) -> bool:
    """Return whether a user of the container owns a file already."""
    uid = os.stat(source).st_uid
    return any(one.outside <= uid < one.outside + one.size for one in users.uids)


def _make_target(target: Path, *, is_directory: bool) -> None:
    """Create an empty directory or file to mount on, and unmount what a failed start has left there."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    syscalls.unmount_if_mounted(target)
    if is_directory:
        target.mkdir(exist_ok=True)
    else:
        target.touch()


def share_directory(directory: Path, users: UserMap | None) -> None:
    """Let only the machine's root enter a directory, and the root of containers with mapped users.  Raises: OSError.

    runc enters it as that user to reach the root file system.
    """
    if users is not None:
        os.chown(directory, 0, users.root[1])
    directory.chmod(0o700 if users is None else 0o710)
