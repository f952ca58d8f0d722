"""Local volumes: directories of the node that outlive the containers which use them; and mounts of containers."""

import asyncio
import os
import re
import secrets
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import msgspec

from skep.aio.failures import describe_error, isolate, log_error
from skep.aio.trees import remove_tree
from skep.api.gosyntax import parse_size
from skep.engine.container import MountPoint
from skep.errors import InvalidArgument, SkepError, Unavailable
from skep.linux import mounting
from skep.linux.commands import communicate
from skep.linux.files import replace_file
from skep.linux.syscalls import open_in_root, unmount
from skep.model.container import BindOptions, Mount, TmpfsOptions, VolumeOptions
from skep.model.meta import Driver

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_COPY_DEADLINE_S = 600.0
_MOUNT_DEADLINE_S = 120.0
"""For all mounts of one container.  The kernel's own limits for NFS are longer, and some waits have none."""
_KILL_DEADLINE_S = 1.0
"""For the end of a process that was killed: in the kernel it may wait for longer, and is left alone."""
_LABELS, _OPTIONS = "labels.json", "options.json"
_NAMELESS = re.compile(r"[0-9a-f]{64}")
ANONYMOUS = "com.docker.volume.anonymous"
"""Docker's label of a volume without a name."""


class MountFailed(SkepError):
    """A volume or a part of it could not be mounted; the text has the kernel's reason."""


class Part(NamedTuple):
    """A part of a volume that a container mounts, and the path at which the node has it while runc starts."""

    volume: str
    subpath: str
    target: Path


class Volumes:
    """The volumes of one node, each at ``<data>/volumes/<name>/_data``; labels and options beside, as JSON.

    A volume with options (NFS, for example) is mounted there from its first user's start to its last one's end.
    Users are containers, by id.  Nothing here looks into a volume that is mounted: its server may be silent.
    """

    def __init__(
        self,
        directory: Path,
        *,
        mount_deadline_s: float = _MOUNT_DEADLINE_S,
        command: Sequence[str] = (sys.executable, "-I", "-m", mounting.__name__),
    ) -> None:
        """``command``: mounts and unmounts, by a request on its input."""
        self._directory = directory
        self._deadline_s = mount_deadline_s
        self._command = command
        self._users: defaultdict[str, set[str]] = defaultdict(set)
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

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
            return sorted(entry.name for entry in self._directory.iterdir() if self.has(entry.name))
        except FileNotFoundError:
            return []  # none was made yet

    def has(self, name: str) -> bool:
        """Whether there is such a volume.  What may be mounted on it is not asked."""
        try:
            return "_data" in os.listdir(self._directory / name)
        except OSError:
            return False

    def created_ns(self, name: str) -> int:
        """When the volume was made, Unix time."""
        return self.path(name).parent.stat().st_mtime_ns

    def ensure(
        self, name: str, labels: Mapping[str, str] | None = None, options: Mapping[str, str] | None = None
    ) -> Path:
        """The volume's directory, made if there is none, with ``labels`` and ``options`` then; one that is there
        keeps its own.
        """
        path = self.path(name)
        if self.has(name):
            return path
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # Before the directory, with which the volume is there.
        if labels is not None:
            replace_file(path.parent / _LABELS, msgspec.json.encode(labels))
        if options is not None:  # a password may be among them
            replace_file(path.parent / _OPTIONS, msgspec.json.encode(options), mode=0o600)
        path.mkdir(mode=0o755, exist_ok=True)
        return path

    def options(self, name: str) -> Mapping[str, str]:
        """The driver options it was made with.  Raises: Unavailable: they cannot be read."""
        return self.given_options(name) or {}

    def given_options(self, name: str) -> Mapping[str, str] | None:
        """The same; None where whoever made it said nothing of options."""
        try:
            content = (self.path(name).parent / _OPTIONS).read_bytes()
            return msgspec.json.decode(content, type=dict[str, str])
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unavailable(f"options of volume {name} cannot be read: {describe_error(error)}") from error

    def has_options(self, name: str) -> bool:
        """Whether it was made with driver options: what it mounts may not be on this node."""
        try:
            return bool(self.options(name))
        except SkepError:
            return True

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
        """Remove a volume with everything in it, but not what is on the device that it mounts.

        Raises: Unavailable: something of it is left.
        """
        try:
            if self.options(name):
                await self._unmount_unused(name)
            await remove_tree(self.path(name).parent)
        except OSError as error:
            raise Unavailable(f"cannot remove volume {name}: {describe_error(error)}") from error

    # --- volumes with options, and parts of volumes ---------------------------------------------------------------

    async def mount(self, user: str, points: Iterable[MountPoint], parts: Sequence[Part] = ()) -> None:
        """Mount what ``user`` needs to start: its volumes with options, and ``parts``.  Harmless when it is mounted.

        Raises: MountFailed, in Docker's words, with the kernel's reason: nothing is mounted for the user; Unavailable.
        """
        needed = [
            point
            for point in points
            if point.type == "volume" and point.name and _is_mounted(self.options(point.name))
        ]
        if not needed and not parts:
            return
        what = (
            f"volume '{needed[0].source}'"
            if needed
            else f"part {parts[0].subpath} of volume {parts[0].volume}"
        )
        try:
            async with asyncio.timeout(self._deadline_s):
                for point in needed:
                    what = f"volume '{point.source}'"
                    await self._mount(user, point)
                for part in parts:
                    await self._bind(part)
        except BaseException as error:
            await asyncio.shield(isolate(self.unmount(user, parts), "volumes not unmounted", user=user))
            if isinstance(error, TimeoutError):
                raise MountFailed(
                    f"error while mounting {what}: it takes longer than {self._deadline_s:g} s"
                ) from error
            raise

    async def _mount(self, user: str, point: MountPoint) -> None:
        async with self._locks[point.name]:
            users = self._users[point.name]
            is_mounted = _is_target(Path(point.source))
            if is_mounted and not users:  # by a process that was killed, perhaps half
                await self._run({"unmount": point.source})
                is_mounted = False
            if not is_mounted:
                try:
                    await self._run({"mount": point.source, "options": dict(self.options(point.name))})
                except MountFailed as error:
                    raise MountFailed(f"error while mounting volume '{point.source}': {error}") from error
            users.add(user)

    async def _bind(self, part: Part) -> None:
        if not _is_target(part.target):
            root = str(self.path(part.volume))
            await self._run({"bind": str(part.target), "root": root, "part": part.subpath})

    def adopt(self, user: str, points: Iterable[MountPoint]) -> None:
        """Note a user that an earlier process has started."""
        for point in points:
            if point.type == "volume" and point.name:
                self._users[point.name].add(user)

    async def unmount(self, user: str, parts: Iterable[Part] = ()) -> None:
        """The user has ended: unmount ``parts``, and volumes that it was the last one of.

        Raises: Unavailable: something is mounted still; the next user of the volume unmounts it first.
        """
        self.release_parts(parts)
        left = [name for name, users in self._users.items() if user in users]
        for name in left:
            self._users[name].discard(user)
        await self._unmount_each(left)

    async def unmount_unused(self) -> None:
        """Unmount volumes whose users have ended while no node process ran.  Raises: Unavailable."""
        await self._unmount_each([name for name in self.names() if _is_target(self.path(name))])

    async def _unmount_each(self, names: Iterable[str]) -> None:
        """Raises: Unavailable: one is mounted still; the others are not."""
        failed: SkepError | None = None
        for name in names:
            try:
                await self._unmount_unused(name)
            except SkepError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    async def _unmount_unused(self, name: str) -> None:
        """Raises: Unavailable."""
        async with self._locks[name]:
            if self._users[name]:
                return
            if _is_target(self.path(name)):
                try:
                    async with asyncio.timeout(self._deadline_s):
                        await self._run({"unmount": str(self.path(name))})
                except (MountFailed, TimeoutError) as error:
                    raise Unavailable(f"cannot unmount volume {name}: {describe_error(error)}") from error
        self._users.pop(name, None)

    @staticmethod
    def release_parts(parts: Iterable[Part]) -> None:
        """Unmount parts that a container has mounted itself meanwhile, or does not any more."""
        for part in parts:
            if _is_target(part.target):
                with suppress(OSError):  # taken off meanwhile, or with the container's directory later
                    unmount(part.target)

    async def _run(self, request: Mapping[str, Any]) -> None:
        """Mount or unmount in a process of its own; one that does not end in time is killed, and not waited for.

        Raises: MountFailed: the reason.
        """
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            cwd="/",
            env={"LANG": "C.UTF-8"},
        )
        try:
            _, errors = await process.communicate(msgspec.json.encode(request))
        except BaseException:
            process.kill()
            with suppress(TimeoutError):
                async with asyncio.timeout(_KILL_DEADLINE_S):
                    await process.wait()
            raise
        if process.returncode:
            reason = errors.decode(errors="replace").strip().splitlines()
            raise MountFailed(reason[-1] if reason else f"mounting ended with {process.returncode}")

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
                return self._volume_point(mount)
            case _:
                return mount_point(mount, mount.source, "")

    def _volume_point(self, mount: Mount) -> MountPoint:
        """Raises: InvalidArgument."""
        given = mount.volume_options or VolumeOptions()
        driver = given.driver_config or Driver()
        # As an engine: with a driver they are stored, be there any or not.
        labels = given.labels if given.labels or given.driver_config is not None else None
        if not mount.source and labels is not None:
            labels = {**labels, ANONYMOUS: ""}
        if driver.name not in ("", "local"):
            raise InvalidArgument(
                f'error looking up volume plugin {driver.name}: plugin "{driver.name}" not found'
            )
        if given.subpath:
            check_subpath(mount.source, given.subpath)
        name = mount.source or self.new_name()
        check_local_options(name, driver.options)
        if driver.options and self.has(name) and self.options(name) != driver.options:
            raise InvalidArgument(f"volume {name} exists with other options than those of the mount")
        path = self.ensure(name, labels, driver.options if given.driver_config is not None else None)
        point = mount_point(mount, str(path), name)
        return msgspec.structs.replace(point, anonymous=not mount.source, subpath=given.subpath)

    async def fill(
        self, user: str, points: Sequence[MountPoint], mounts: Iterable[Mount], root: Path
    ) -> None:
        """Copy what the image has at their targets into new volumes, unless the mount has ``nocopy``.

        ``root``: the root file system of the container, ``user``.  Raises: Unavailable; MountFailed.
        """
        unfilled = {mount.target for mount in mounts if mount.volume_options and mount.volume_options.no_copy}
        for point in points:
            if point.type != "volume" or point.destination in unfilled or point.subpath:
                continue
            is_mounted = _is_mounted(self.options(point.name))
            if not is_mounted:
                await copy_up(root, point.destination, self.path(point.name))
            elif _has_directory(root, point.destination):
                await self._fill_mounted(f"{user} fills {point.name}", point, root)

    async def _fill_mounted(self, user: str, point: MountPoint, root: Path) -> None:
        try:
            await self.mount(user, [point])
        except MountFailed as error:
            raise MountFailed(f"failed to populate volume: {error}") from error
        try:
            await copy_up(root, point.destination, self.path(point.name), is_mounted=True)
        finally:
            await asyncio.shield(isolate(self.unmount(user), "volume not unmounted", volume=point.name))

    async def remove_anonymous(self, points: Iterable[MountPoint]) -> None:
        """Remove the volumes that were made for one container alone.  Raises: Unavailable."""
        for point in points:
            if point.type == "volume" and point.anonymous:
                await self.remove(point.name)

    @staticmethod
    def new_name() -> str:
        """A name for a volume without one: 64 hexadecimal characters, as Docker's."""
        return secrets.token_hex(32)


_NEEDED: Final = {"device": ("type",), "type": ("device",), "o": ("device", "type")}
"""Options of a volume, and the others that each needs."""


def _is_mounted(options: Mapping[str, str]) -> bool:
    return bool(options.get("device") or options.get("type"))


def _is_target(path: Path) -> bool:
    """Whether something is mounted at ``path``, whose parent is a directory of this node."""
    return os.path.join(os.path.realpath(path.parent), path.name) in mounting.mount_targets()


def check_local_options(name: str, options: Mapping[str, str]) -> None:
    """Options of a volume of the driver ``local``.  Raises: InvalidArgument, in Docker's words.

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


def check_subpath(volume: str, subpath: str) -> None:
    """A part of a volume.  Raises: InvalidArgument, in Docker's words.

    Source: moby 28, volume/mounts/linux_parser.go.
    """
    if not volume:
        raise InvalidArgument(
            'invalid mount config for type "volume": must not set Subpath when using anonymous volumes'
        )
    depth = 0
    for word in PurePosixPath(subpath).parts:
        depth += -1 if word == ".." else 1
        if depth < 0 or word == "/" or "\0" in word:
            raise InvalidArgument(
                'invalid mount config for type "volume": subpath must be a relative path within the volume'
            )


_COPY_INTO_EMPTY = '[ -n "$(ls -A -- "$1")" ] || exec cp -a -- "$0" "$1"'


def _has_directory(root: Path, path: str) -> bool:
    try:
        os.close(open_in_root(root, path, os.O_PATH | os.O_DIRECTORY))
    except OSError:
        return False
    return True


async def copy_up(root: Path, destination: str, volume: Path, *, is_mounted: bool = False) -> None:
    """Fill an empty volume with what the image has at its mount point, owner and mode of the directory
    included.

    Args:
        is_mounted: the volume is no directory of this node, and a process looks whether it is empty.

    Raises: Unavailable: the copy failed.
    """
    if not is_mounted and any(volume.iterdir()):
        return
    try:
        source = open_in_root(root, destination, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return  # the image has nothing there
    try:
        process = await asyncio.create_subprocess_exec(
            *("sh", "-c", _COPY_INTO_EMPTY, f"/proc/self/fd/{source}/.", str(volume)),
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
