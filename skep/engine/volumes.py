"""Volumes: directories of the node that outlive the containers which use them, and what plug-ins give."""

import asyncio
import hashlib
import os
import re
import secrets
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from skep.aio.clock import SystemClock
from skep.aio.failures import describe_error, isolate, log_error
from skep.aio.trees import remove_tree
from skep.engine.bind_sources import BindSources
from skep.engine.container import MountPoint
from skep.engine.events import Events
from skep.engine.mounts import check_local_options, check_subpath, copy_up, has_directory, mount_point
from skep.engine.volume_plugins import LOCAL, PluginRefused, VolumePlugins
from skep.errors import AlreadyExists, InvalidArgument, NotFound, SkepError, Unavailable
from skep.linux import mounting
from skep.linux.files import replace_file
from skep.linux.syscalls import unmount
from skep.model.container import Mount, VolumeOptions
from skep.model.meta import Driver

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_MOUNT_DEADLINE_S = 120.0
"""For all mounts of one container.  The kernel's own limits for NFS are longer, and some waits have none."""
_KILL_DEADLINE_S = 1.0
"""For the end of a process that was killed: in the kernel it may wait for longer, and is left alone."""
_LABELS, _OPTIONS, _USES = "labels.json", "options.json", "uses.json"
_DRIVER, _MOUNTS = "driver.json", "mounts.json"
"""Of a volume of a plug-in: the plug-in's name, and the users for which it mounted the volume."""
_USES_MAX = 64
"""Names that a volume keeps of those that used it, the latest ones."""
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

    A volume with options (NFS, for example) is mounted there from its first user's start to its last one's end, and so
    is the directory of a plug-in's volume.
    Users are containers, by id.  Nothing here looks into a volume that is mounted: its server may be silent.
    """

    def __init__(
        self,
        directory: Path,
        *,
        plugins: VolumePlugins | None = None,
        mount_deadline_s: float = _MOUNT_DEADLINE_S,
        command: Sequence[str] = (sys.executable, "-I", "-m", mounting.__name__),
        events: Events | None = None,
        run: Path | None = None,
    ) -> None:
        """``command``: mounts and unmounts, by a request on its input.  ``events``: the engine's; None: its own.
        ``run``: the node's run directory, whose sockets no volume has."""
        self._refused = [str(run)] if run is not None else []
        self.events = events or Events(SystemClock())
        self.plugins = plugins or VolumePlugins()
        self._directory = directory
        self._deadline_s = mount_deadline_s
        self._command = command
        self.bind_sources = BindSources()
        self._users: defaultdict[str, set[str]] = defaultdict(set)
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._unfinished: set[str] = set()
        """Volumes whose last unmount failed, perhaps because their plug-in was not reached."""
        self._uses: dict[str, Mapping[str, int]] = {}

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
        except (OSError, ValueError):  # ValueError: a zero byte
            return False

    def created_ns(self, name: str) -> int:
        """When the volume was made, Unix time."""
        return self.path(name).parent.stat().st_mtime_ns

    def ensure(
        self,
        name: str,
        labels: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None,
        driver: str = LOCAL,
    ) -> Path:
        """The volume's directory, made if there is none, with ``labels`` and ``options`` then; one that is there
        keeps its own.  ``driver``: a plug-in, which has made it.  Raises: SkepError: the file system refuses it.
        """
        path, plug_in = self.path(name), None if driver == LOCAL else driver
        if self.has(name):
            return path
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            for left in (_LABELS, _OPTIONS, _DRIVER, _USES):  # of one whose removal failed
                (path.parent / left).unlink(missing_ok=True)
            # Before the directory, with which the volume is there.
            for file, kept in ((_LABELS, labels), (_OPTIONS, options), (_DRIVER, plug_in)):
                if kept is not None:  # a password may be among the options
                    replace_file(path.parent / file, msgspec.json.encode(kept), mode=0o600)
            path.mkdir(mode=0o755, exist_ok=True)
        except OSError as error:
            raise SkepError(f"error while creating volume path '{path}': {error.strerror}") from error
        self.events.publish_volume("create", name, {"driver": driver})
        return path

    def options(self, name: str) -> Mapping[str, str]:
        """The driver options it was made with.  Raises: Unavailable: they cannot be read."""
        return self.given_options(name) or {}

    def given_options(self, name: str) -> Mapping[str, str] | None:
        """The same; None where it was made without any."""
        try:
            content = (self.path(name).parent / _OPTIONS).read_bytes()
            return msgspec.json.decode(content, type=dict[str, str])
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unavailable(f"options of volume {name} cannot be read: {describe_error(error)}") from error

    def driver(self, name: str) -> str:
        """``local``, or the plug-in that has it.  Raises: Unavailable: that cannot be read."""
        try:
            return msgspec.json.decode((self.path(name).parent / _DRIVER).read_bytes(), type=str)
        except FileNotFoundError:
            return LOCAL
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unavailable(f"driver of volume {name} cannot be read: {describe_error(error)}") from error

    def _is_mounted(self, name: str) -> bool:
        """Whether its files are elsewhere, and mounted while it is used.  Raises: Unavailable."""
        return self.driver(name) != LOCAL or _is_mounted(self.options(name))

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

    # --- what has used them ---------------------------------------------------------------------------------------

    def open(self) -> None:
        """Read what has used the volumes; to be called once, in a thread."""
        for name in self.names():
            try:
                content = (self.path(name).parent / _USES).read_bytes()
                self._uses[name] = msgspec.json.decode(content, type=dict[str, int])
            except FileNotFoundError:
                continue  # nothing that said so
            except Exception as error:  # one volume's error does not reach others
                log_error(error, "uses of a volume not read", volume=name)

    @property
    def uses(self) -> Mapping[str, Mapping[str, int]]:
        """Volumes -> names of what has used them -> the latest time of each, as it was given."""
        return self._uses

    async def note_use(self, name: str, user: str, at: int) -> None:
        """Keep that ``user`` has data in the volume, beyond the life of its containers; not if it mounts something.

        Raises: Unavailable: it cannot be written.
        """
        async with self._locks[name]:
            known = self._uses.get(name, {})
            if known.get(user, -1) >= at or self._is_mounted(name):
                return
            latest = dict(sorted({**known, user: at}.items(), key=lambda use: -use[1])[:_USES_MAX])
            path, content = self.path(name).parent / _USES, msgspec.json.encode(latest)
            try:
                await asyncio.to_thread(replace_file, path, content, is_durable=False)
            except OSError as error:
                raise Unavailable(f"use of volume {name} not kept: {describe_error(error)}") from error
            self._uses[name] = latest

    async def create(
        self,
        name: str,
        driver: str = "",
        labels: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Make a volume if there is none, by a plug-in if ``driver`` names one.

        Raises: InvalidArgument; NotFound: no such plug-in; AlreadyExists: another driver has it; PluginRefused: the
        plug-in refuses; Unavailable: it does not respond.
        """
        self.path(name)
        known = self.driver(name) if self.has(name) else ""
        if known and driver not in ("", known):
            raise AlreadyExists(
                f"create {name}: driver '{known}' already has volume '{name}': volume name must be unique"
            )
        driver = known or driver or LOCAL
        if driver != LOCAL:
            try:
                plugin = await self.plugins.get(driver)
                async with self._locks[name]:
                    if await plugin.get(name) is None:
                        await plugin.create(name, options or (self.options(name) if known else {}))
            except (PluginRefused, NotFound, Unavailable) as error:
                raise type(error)(f"create {name}: {error}") from error
        self.ensure(name, labels, options, driver)

    async def create_of_plugins(self, mounts: Iterable[Mount]) -> None:
        """Make the volumes that mounts have of plug-ins.

        Raises: InvalidArgument: one can never be made; PluginRefused; Unavailable.
        """
        for mount in mounts:
            given = mount.volume_options or VolumeOptions()
            driver = given.driver_config or Driver()
            if mount.type not in ("volume", "") or driver.name in ("", LOCAL):
                continue
            if not mount.source:
                raise InvalidArgument(f"a volume of plugin {driver.name} needs a name")
            try:
                await self.create(mount.source, driver.name, given.labels, driver.options)
            except (NotFound, AlreadyExists) as error:
                raise InvalidArgument(str(error)) from error

    async def remove(self, name: str, *, force: bool = False) -> None:
        """Remove a volume with everything in it, but not what is on the device that it mounts.

        Args:
            force: also if its plug-in does not remove it, or is gone.

        Raises: Unavailable: something of it is left; PluginRefused; NotFound: its plug-in is gone.
        """
        try:
            if self._is_mounted(name):
                await self._unmount_unused(name)
                if mounting.is_target(self.path(name)):  # what is mounted is not ours to remove
                    raise Unavailable(f"cannot remove volume {name}: it is mounted")
            if (driver := self.driver(name)) != LOCAL:
                await self._remove_of_plugin(name, driver, force=force)
            is_there = self.has(name)
            await remove_tree(self.path(name).parent, keep=self._last_entry(name))
            self._uses.pop(name, None)
            if is_there:
                self.events.publish_volume("destroy", name, {"driver": driver})
        except OSError as error:
            raise Unavailable(f"cannot remove volume {name}: {describe_error(error)}") from error

    def _last_entry(self, name: str) -> str:
        """What goes last of a volume.

        With ``_data`` it is there, and can be removed again if that fails; one of a plug-in or with options would be
        a plain one without its file.
        """
        if (self.path(name).parent / _DRIVER).exists():
            return _DRIVER
        return _OPTIONS if self.has_options(name) else "_data"

    async def _remove_of_plugin(self, name: str, driver: str, *, force: bool) -> None:
        try:
            plugin = await self.plugins.get(driver)
            await plugin.remove(name)
        except (PluginRefused, NotFound, Unavailable) as error:
            if not force:
                raise type(error)(f"remove {name}: {error}") from error
            log_error(error, "plugin did not remove a volume", volume=name, driver=driver)

    # --- volumes with options, and parts of volumes ---------------------------------------------------------------

    async def mount(self, user: str, points: Iterable[MountPoint], parts: Sequence[Part] = ()) -> None:
        """Mount what ``user`` needs to start: its volumes with options, and ``parts``.  Harmless when it is mounted.

        Raises: MountFailed, in Docker's words, with the kernel's reason: nothing is mounted for the user; SourceSilent;
        Unavailable.
        """
        points = tuple(points)
        await self.bind_sources.wait(points)
        needed = [
            point
            for point in points
            if point.type == "volume" and point.name and self._is_mounted(point.name)
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
            is_mounted = mounting.is_target(Path(point.source))
            if is_mounted and user in users:
                return
            if is_mounted and not users:  # by a process that was killed, perhaps half
                await self._run({"unmount": point.source})
                is_mounted = False
            users.add(user)  # whatever becomes of it is undone by its end
            try:
                request = await self._source(point, user)
                if not is_mounted:
                    await self._run(request)
            except (MountFailed, PluginRefused, NotFound) as error:
                raise MountFailed(f"error while mounting volume '{point.source}': {error}") from error

    async def _source(self, point: MountPoint, user: str) -> Mapping[str, Any]:
        """The request that mounts a volume; a plug-in makes it available first.

        Raises: PluginRefused; NotFound; Unavailable.
        """
        driver = self.driver(point.name)
        if driver == LOCAL:
            return {"mount": point.source, "options": self.options(point.name), "refused": self._refused}
        plugin, id = await self.plugins.get(driver), _mount_id(user)
        self._keep_mounts(point.name, self._mounts(point.name) | {id})
        directory = await plugin.mount(point.name, id)
        own = [str(self._directory.parent), *self._refused]
        return {"directory": directory, "target": point.source, "refused": own}

    def _mounts(self, name: str) -> set[str]:
        """The users for which a plug-in mounted a volume; those of an earlier process, too."""
        try:
            return set(msgspec.json.decode((self.path(name).parent / _MOUNTS).read_bytes(), type=list[str]))
        except FileNotFoundError:
            return set()
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            log_error(error, "mounts of a volume not read", volume=name)
            return set()

    def _keep_mounts(self, name: str, ids: Collection[str]) -> None:
        path = self.path(name).parent / _MOUNTS
        replace_file(path, msgspec.json.encode(sorted(ids)), is_durable=False)

    async def _give_back(self, name: str) -> None:
        """Have the plug-in of a volume unmount it for users that have ended.  Raises: Unavailable; the id is kept."""
        driver = self.driver(name)
        ended = self._mounts(name) - set(map(_mount_id, self._users[name])) if driver != LOCAL else ()
        for id in sorted(ended):
            try:
                plugin = await self.plugins.get(driver)
                await plugin.unmount(name, id)
            except PluginRefused as error:  # it has no such mount, or will never unmount it
                log_error(error, "plugin did not unmount a volume", volume=name, driver=driver)
            except NotFound as error:
                raise Unavailable(f"cannot unmount volume {name}: {error}") from error
            self._keep_mounts(name, self._mounts(name) - {id})

    async def _bind(self, part: Part) -> None:
        if not mounting.is_target(part.target):
            root = str(self.path(part.volume))
            await self._run({"bind": str(part.target), "root": root, "part": part.subpath})

    def adopt(self, user: str, points: Iterable[MountPoint]) -> None:
        """Note a user that an earlier process has started."""
        for point in points:
            if point.type == "volume" and point.name:
                self._users[point.name].add(user)

    async def unmount(self, user: str, parts: Iterable[Part] = ()) -> None:
        """The user has ended: unmount ``parts``, and volumes that it was the last one of.

        Raises: Unavailable: something is mounted still, until ``unmount_unfinished`` or the volume's next user.
        """
        self.release_parts(parts)
        left = [name for name, users in self._users.items() if user in users]
        for name in left:
            self._users[name].discard(user)
        await self._unmount_each(left)

    async def unmount_unfinished(self) -> None:
        """Try again what failed.  Raises: Unavailable."""
        await self._unmount_each(sorted(self._unfinished))

    async def unmount_unused(self) -> None:
        """Unmount volumes whose users have ended while no node process ran.  Raises: Unavailable."""
        await self._unmount_each(
            [name for name in self.names() if mounting.is_target(self.path(name)) or self._mounts(name)]
        )

    async def _unmount_each(self, names: Iterable[str]) -> None:
        """Raises: Unavailable: one is mounted still; the others are not."""
        failed: SkepError | None = None
        for name in names:
            try:
                await self._unmount_unused(name)
                self._unfinished.discard(name)
            except SkepError as error:
                self._unfinished.add(name)
                failed = failed or error
        if failed is not None:
            raise failed

    async def _unmount_unused(self, name: str) -> None:
        """Raises: Unavailable."""
        async with self._locks[name]:
            try:
                async with asyncio.timeout(self._deadline_s):
                    if not self._users[name] and mounting.is_target(self.path(name)):
                        await self._run({"unmount": str(self.path(name))})
                    await self._give_back(name)
            except (MountFailed, TimeoutError) as error:
                raise Unavailable(f"cannot unmount volume {name}: {describe_error(error)}") from error
            if not self._users[name]:
                del self._users[name]

    @staticmethod
    def release_parts(parts: Iterable[Part]) -> None:
        """Unmount parts that a container has mounted itself meanwhile, or does not any more."""
        for part in parts:
            if mounting.is_target(part.target):
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
        if given.subpath:
            if not mount.source:
                raise InvalidArgument(
                    'invalid mount config for type "volume": must not set Subpath when using anonymous volumes'
                )
            check_subpath("volume", given.subpath)
        name = mount.source or self.new_name()
        if driver.name in ("", LOCAL):
            check_local_options(name, driver.options)
        elif not self.has(name) or self.driver(name) != driver.name:  # see ``create_of_plugins``
            raise InvalidArgument(
                f'error looking up volume plugin {driver.name}: plugin "{driver.name}" not found'
            )
        if driver.options and self.has(name) and self.options(name) != driver.options:
            raise InvalidArgument(f"volume {name} exists with other options than those of the mount")
        path = self.ensure(name, labels, driver.options if given.driver_config is not None else None)
        point = mount_point(mount, str(path), name)
        return msgspec.structs.replace(
            point, anonymous=not mount.source, subpath=given.subpath, driver=self.driver(name)
        )

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
            if not self._is_mounted(point.name):
                await copy_up(root, point.destination, self.path(point.name))
            elif has_directory(root, point.destination):
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


def _is_mounted(options: Mapping[str, str]) -> bool:
    return bool(options.get("device") or options.get("type"))


def _mount_id(user: str) -> str:
    """The id of a user for a plug-in: 64 hexadecimal digits, as an engine gives it."""
    return hashlib.sha256(user.encode()).hexdigest()
