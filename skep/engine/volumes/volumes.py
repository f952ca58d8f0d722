"""Creates, mounts, fills and removes volumes, which outlive the containers that use them."""

import asyncio
import hashlib
import secrets
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import msgspec

from skep.aio.failures import describe_error, isolate, log_error
from skep.aio.race import afterwards, thread_to_end, unless_done
from skep.aio.trees import discard_tree
from skep.engine.containers.container import Container, MountPoint
from skep.engine.events import Events
from skep.engine.lifecycle.background import Background
from skep.engine.volumes.bind_sources import BindSources
from skep.engine.volumes.mounts import (
    check_local_options,
    check_subpath,
    copy_up,
    has_directory,
    mount_point,
    move_files,
)
from skep.engine.volumes.volume_plugins import LOCAL, PluginRefused, VolumePlugins
from skep.engine.volumes.volume_store import ANONYMOUS, VolumeStore
from skep.errors import (
    AlreadyExists,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    SkepError,
    Unavailable,
)
from skep.linux import mounting
from skep.linux.files import replace_file, sync_directory
from skep.linux.syscalls import unmount
from skep.model.container import Mount, VolumeOptions
from skep.model.values.meta import Driver
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.user_map import UserMap

_MOUNT_DEADLINE_S = 120.0
"""Time limit in seconds for all mounts of one container.

Without it, the kernel would wait longer for NFS, or forever.
"""
_KILL_DEADLINE_S = 1.0
"""Seconds to wait for the end of a killed process.  If it hangs in the kernel for longer, it is left alone."""
_MOUNTS = "mounts.json"
"""File of a plug-in volume that lists the users for which the plug-in has mounted it."""

Listing = Callable[[], Collection[Container]]
"""Returns all containers of this node, because any of them may use a volume."""


class MountFailed(SkepError):
    """A volume or a subpath of it could not be mounted.  The text has the kernel's reason."""


class VolumeInUse(AlreadyExists):
    """A container uses the volume.  The Engine API responds with 409, as for a taken name."""


class VolumeSubpath(NamedTuple):
    """A subpath of a volume that a container mounts, and the node's path for it while runc starts."""

    volume: str
    subpath: str
    target: Path


def users_by_volume(containers: Iterable[Container]) -> Mapping[str, Sequence[str]]:
    """Return, for each volume name, the ids of the containers that mount the volume, running or not."""
    users: dict[str, list[str]] = {}
    for container in containers:
        for name in sorted({mount.name for mount in container.config.mounts if mount.name}):
            users.setdefault(name, []).append(container.id)
    return users


class Volumes(VolumeStore):
    """Creates, mounts, fills and removes the volumes of one node.

    A volume with options (for example NFS) is mounted when its first user starts and unmounted when its last user ends,
    and so is a plug-in volume.  Users are containers, identified by id.  Nothing here looks into a mounted volume,
    because its server may not respond.
    """

    def __init__(
        self,
        directory: Path,
        *,
        plugins: VolumePlugins | None = None,
        command: Sequence[str] = (sys.executable, "-I", "-m", mounting.__name__),
        events: Events | None = None,
        run: Path | None = None,
        is_mount_point: Callable[[Path], bool] = mounting.is_target,
    ) -> None:
        """Take the settings of one node.

        Args:
            command: Command that mounts and unmounts.  It reads a request from its input.
            events: The engine's event bus, or None to create one.
            run: The node's run directory.  Its sockets must not appear in a volume.
            is_mount_point: Returns whether something is mounted at a path itself.
        """
        super().__init__(directory, events)
        self.refused_paths = [str(run)] if run is not None else []
        self.plugins = plugins or VolumePlugins()
        self.mount_deadline_s = _MOUNT_DEADLINE_S
        self._command = command
        self._is_mount_point = is_mount_point
        self.background = Background()
        """Work that continues if its caller is cancelled.  It runs while the engine runs."""
        self.bind_sources = BindSources()
        self.users: defaultdict[str, set[str]] = defaultdict(set)
        self._filling = WeakValueDictionary[str, asyncio.Lock]()
        """Locks by volume name, held while a volume gets the image's files.  Not ``lock_of``, because a removal and a
        report need not wait for a long copy."""
        self._unfinished: set[str] = set()
        """Volumes whose last unmount failed, for example because their plug-in was unreachable."""

    async def create(
        self,
        name: str,
        driver: str = "",
        labels: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Create a volume if it does not exist, through a plug-in if ``driver`` names one.

        Raises: InvalidArgument; NotFound: no such plug-in; AlreadyExists: the volume has another driver; PluginRefused:
        the plug-in refuses; Unavailable: it does not respond.
        """
        self.path(name)
        driver = self._driver_for(name, driver)
        if driver != LOCAL:
            try:
                plugin = await self.plugins.get(driver)
                async with self.lock_of(name):
                    self._driver_for(name, driver)  # the name may have been taken while this waited
                    if await plugin.get(name) is None:
                        await plugin.create(name, options or (self.options(name) if self.has(name) else {}))
            except (PluginRefused, NotFound, Unavailable) as error:
                raise type(error)(f"create {name}: {error}") from error
            self._driver_for(name, driver)
        self.ensure(name, labels, options, driver)

    def _driver_for(self, name: str, driver: str) -> str:
        """Return the volume's driver, or ``driver`` for a new volume.  Raises: AlreadyExists: it has another driver."""
        known = self.driver(name) if self.has(name) else ""
        if known and driver not in ("", known):
            raise AlreadyExists(
                f"create {name}: driver '{known}' already has volume '{name}': volume name must be unique"
            )
        return known or driver or LOCAL

    async def create_of_plugins(self, mounts: Iterable[Mount], stack: str = "") -> None:
        """Create the plug-in volumes of ``mounts``.

        Args:
            stack: See ``mount_points``.

        Raises: InvalidArgument: a volume can never be created; PermissionDenied; PluginRefused; Unavailable.
        """
        for mount in mounts:
            given = mount.volume_options or VolumeOptions()
            driver = given.driver_config or Driver()
            if mount.type not in ("volume", "") or driver.name in ("", LOCAL):
                continue
            if not mount.source:
                raise InvalidArgument(f"a volume of plugin {driver.name} needs a name")
            self._require_of_stack(mount.source, stack)
            labels = {**given.labels, STACK_LABEL: stack} if stack else given.labels
            try:
                await self.create(mount.source, driver.name, labels, driver.options)
            except (NotFound, AlreadyExists) as error:
                raise InvalidArgument(str(error)) from error

    async def remove(self, name: str, containers: Listing, *, force: bool = False) -> None:
        """Remove a volume with all its files, except the contents of a device that it mounts.

        Continues if the caller is cancelled.  A new volume with this name may be created before this returns.

        Args:
            containers: Returns all containers.  A volume that one of them mounts is not removed.
            force: Remove the volume here even if its plug-in refuses or does not exist.

        Raises: VolumeInUse; Unavailable: it is mounted, or cannot be renamed away; PluginRefused; NotFound: its plug-in
        is gone.
        """
        removal = self._remove(name, containers, force=force)
        # Continues without its caller: a plug-in that has begun to remove a volume does not stop.
        await self.background.carry_out(removal, name=f"remove-volume-{name[:12]}")

    async def _remove(self, name: str, containers: Listing, *, force: bool) -> None:
        def require_unused() -> None:
            if users := users_by_volume(containers()).get(name):
                raise VolumeInUse(f"remove {name}: volume is in use - [{', '.join(users)}]")

        try:
            async with self.lock_of(name):
                require_unused()
                if self._is_mounted(name):
                    await self._unmount_locked(name)
                    if self._is_mount_point(self.path(name)):  # mounted contents must not be removed
                        raise Unavailable(f"cannot remove volume {name}: it is mounted")
                if (driver := self.driver(name)) != LOCAL:
                    await self._remove_of_plugin(name, driver, force=force)
                require_unused()  # a container may have been created meanwhile; nothing is awaited before the next step
                is_there, aside = self.has(name), self._set_aside(name)
        except OSError as error:
            raise Unavailable(f"cannot remove volume {name}: {describe_error(error)}") from error
        if is_there:
            self.events.publish_volume("destroy", name, {"driver": driver})
        if aside is None:
            return
        # Without the sync, a power loss could bring the volume back without some of its files.
        await isolate(asyncio.to_thread(sync_directory, aside.parent), "removal not synced", volume=name)
        await discard_tree(aside)

    async def _remove_of_plugin(self, name: str, driver: str, *, force: bool) -> None:
        try:
            plugin = await self.plugins.get(driver)
            await plugin.remove(name)
        except (PluginRefused, NotFound, Unavailable) as error:
            if not force:
                raise type(error)(f"remove {name}: {error}") from error
            log_error(error, "plugin did not remove a volume", volume=name, driver=driver)

    # --- volumes with options, and subpaths of volumes --------------------------------------------------------------

    async def mount(
        self, user: str, points: Iterable[MountPoint], parts: Sequence[VolumeSubpath] = ()
    ) -> None:
        """Mount ``user``'s volumes with options, and ``parts``.  Idempotent.

        Raises: MountFailed, in Docker's words with the kernel's reason; SourceSilent; Unavailable.  After an error
        nothing stays mounted for the user.
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
        undo = partial(self._unmount_isolated, user, parts)
        try:
            async with unless_done(undo), asyncio.timeout(self.mount_deadline_s):
                for point in needed:
                    what = f"volume '{point.source}'"
                    await self._mount(user, point)
                for part in parts:
                    await self._bind(part)
        except TimeoutError as error:
            text = f"error while mounting {what}: it takes longer than {self.mount_deadline_s:g} s"
            raise MountFailed(text) from error

    async def _unmount_isolated(self, user: str, parts: Iterable[VolumeSubpath] = ()) -> None:
        await isolate(self.unmount(user, parts), "volumes not unmounted", user=user)

    async def _mount(self, user: str, point: MountPoint) -> None:
        async with self.lock_of(point.name):
            users = self.users[point.name]
            is_mounted = self._is_mount_point(Path(point.source))
            if is_mounted and user in users:
                return
            if is_mounted and not users:  # mounted by a killed process, perhaps incompletely
                await self._run({"unmount": point.source})
                is_mounted = False
            users.add(user)  # recorded first, so that a partial mount is undone when the user ends
            try:
                request = await self._source(point, user)
                if not is_mounted:
                    await self._run(request)
            except (MountFailed, PluginRefused, NotFound) as error:
                raise MountFailed(f"error while mounting volume '{point.source}': {error}") from error

    async def _source(self, point: MountPoint, user: str) -> Mapping[str, Any]:
        """Return the request that mounts a volume.  For a plug-in volume, the plug-in is called first.

        Raises: PluginRefused; NotFound; Unavailable.
        """
        driver = self.driver(point.name)
        if driver == LOCAL:
            return {"mount": point.source, "options": self.options(point.name), "refused": self.refused_paths}
        plugin, id = await self.plugins.get(driver), _mount_id(user)
        self.keep_mounts(point.name, self.mounts_of(point.name) | {id})
        directory = await plugin.mount(point.name, id)
        own = [str(self.directory.parent), *self.refused_paths]
        return {"directory": directory, "target": point.source, "refused": own}

    def mounts_of(self, name: str) -> set[str]:
        """Return the users for which a plug-in mounted a volume, including users of an earlier process."""
        try:
            return set(msgspec.json.decode((self.path(name).parent / _MOUNTS).read_bytes(), type=list[str]))
        except FileNotFoundError:
            return set()
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            log_error(error, "mounts of a volume not read", volume=name)
            return set()

    def keep_mounts(self, name: str, ids: Collection[str]) -> None:
        path = self.path(name).parent / _MOUNTS
        replace_file(path, msgspec.json.encode(sorted(ids)), is_durable=False)

    async def _give_back(self, name: str) -> None:
        """Make a volume's plug-in unmount it for ended users.  Raises: Unavailable; the users stay recorded."""
        driver = self.driver(name)
        ended = self.mounts_of(name) - set(map(_mount_id, self.users[name])) if driver != LOCAL else ()
        for id in sorted(ended):
            try:
                plugin = await self.plugins.get(driver)
                await plugin.unmount(name, id)
            except PluginRefused as error:  # the plug-in has no such mount, or will never unmount it
                log_error(error, "plugin did not unmount a volume", volume=name, driver=driver)
            except NotFound as error:
                raise Unavailable(f"cannot unmount volume {name}: {error}") from error
            self.keep_mounts(name, self.mounts_of(name) - {id})

    async def _bind(self, part: VolumeSubpath) -> None:
        if not self._is_mount_point(part.target):
            root = str(self.path(part.volume))
            await self._run({"bind": str(part.target), "root": root, "part": part.subpath})

    def adopt(self, user: str, points: Iterable[MountPoint]) -> None:
        """Record a user that an earlier process started."""
        for point in points:
            if point.type == "volume" and point.name:
                self.users[point.name].add(user)

    async def unmount(self, user: str, parts: Iterable[VolumeSubpath] = ()) -> None:
        """Unmount ``parts`` for a user that has ended, and volumes whose last user it was.

        Raises: Unavailable: something stays mounted.  ``unmount_unfinished``, or the volume's next user, retries that.
        """
        self.release_parts(parts)
        left = [name for name, users in self.users.items() if user in users]
        for name in left:
            self.users[name].discard(user)
        await self._unmount_each(left)

    async def unmount_unfinished(self) -> None:
        """Retry failed unmounts.  Raises: Unavailable."""
        await self._unmount_each(sorted(self._unfinished))

    async def unmount_unused(self) -> None:
        """Unmount volumes whose users ended while no node process ran.  Raises: Unavailable."""
        await self._unmount_each(
            [name for name in self.names() if self._is_mount_point(self.path(name)) or self.mounts_of(name)]
        )

    async def _unmount_each(self, names: Iterable[str]) -> None:
        """Unmount the unused volumes among ``names``.  All are tried.  Raises: Unavailable: one failed."""
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
        """Unmount a volume unless it is used.  Raises: Unavailable."""
        async with self.lock_of(name):
            await self._unmount_locked(name)

    async def _unmount_locked(self, name: str) -> None:
        """Unmount a volume unless it is used.  The caller holds its lock.  Raises: Unavailable."""
        try:
            async with asyncio.timeout(self.mount_deadline_s):
                if not self.users[name] and self._is_mount_point(self.path(name)):
                    await self._run({"unmount": str(self.path(name))})
                await self._give_back(name)
        except (MountFailed, TimeoutError) as error:
            raise Unavailable(f"cannot unmount volume {name}: {describe_error(error)}") from error
        if not self.users[name]:
            del self.users[name]

    @staticmethod
    def release_parts(parts: Iterable[VolumeSubpath]) -> None:
        """Unmount subpaths that runc has mounted in the container by now, or that are no longer needed."""
        for part in parts:
            if mounting.is_target(part.target):
                with suppress(OSError):  # unmounted meanwhile, or later with the container's directory
                    unmount(part.target)

    async def _run(self, request: Mapping[str, Any]) -> None:
        """Mount or unmount in a separate process.  If it does not end in time, it is killed and not waited for.

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

    def mount_points(
        self, mounts: Iterable[Mount], image_volumes: Iterable[str], stack: str = ""
    ) -> list[MountPoint]:
        """Return a container's mount points.  Creates missing volumes.

        The caller must not await before it has recorded the container.  Otherwise a volume could be removed meanwhile.

        Args:
            image_volumes: Paths of the image's volumes.  Each without an entry in ``mounts`` gets an anonymous volume.
            stack: Stack of the container's service.  New volumes with a name get it as a label.

        Raises: InvalidArgument, in Docker's words; PermissionDenied: a volume belongs to another stack.
        """
        points = [self._mount_point(mount, stack) for mount in mounts]
        taken = {point.destination for point in points}
        anonymous = sorted(set(image_volumes) - taken)
        return points + [self._mount_point(Mount(type="volume", target=one)) for one in anonymous]

    def _mount_point(self, mount: Mount, stack: str = "") -> MountPoint:
        match mount.type:
            case "bind":
                return mount_point(mount, mount.source, "")
            case "volume" | "":
                return self._volume_point(mount, stack)
            case _:
                return mount_point(mount, mount.source, "")

    def _require_of_stack(self, name: str, stack: str) -> None:
        """Raise PermissionDenied if another stack has created the volume and an operator may have named it.

        Operators may use volumes whose names start with their stack's name (``api.access.permissions``), but one
        stack's name may be the start of another's.  Only administrators can use volumes with other names in a service,
        so these are not checked.
        """
        owner = (self.labels(name) or {}).get(STACK_LABEL, "") if stack and self.has(name) else ""
        if owner not in ("", stack) and name.startswith(f"{stack}_"):
            raise PermissionDenied(
                f"volume {name} belongs to the stack {owner}: services of the stack {stack} cannot use it"
            )

    def _volume_point(self, mount: Mount, stack: str) -> MountPoint:
        """Return the mount point of a volume, which is created if missing.

        Raises: InvalidArgument; PermissionDenied.
        """
        given = mount.volume_options or VolumeOptions()
        driver = given.driver_config or Driver()
        # Like Docker: labels are stored if a driver is given, even when empty.
        labels = given.labels if given.labels or given.driver_config is not None else None
        if not mount.source and labels is not None:
            labels = {**labels, ANONYMOUS: ""}
        if mount.source and stack:
            self._require_of_stack(mount.source, stack)
            labels = {**(labels or {}), STACK_LABEL: stack}
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
            raise InvalidArgument(
                f"volume {name} exists with other options than the mount: use the same options, or another volume"
            )
        path = self.ensure(name, labels, driver.options if given.driver_config is not None else None)
        point = mount_point(mount, str(path), name)
        return msgspec.structs.replace(
            point, anonymous=not mount.source, subpath=given.subpath, driver=self.driver(name)
        )

    async def fill(
        self,
        user: str,
        points: Sequence[MountPoint],
        mounts: Iterable[Mount],
        root: Path,
        users: UserMap | None = None,
    ) -> None:
        """Copy the image's files at the mount targets into new volumes, unless the mount has ``nocopy``.

        ``root`` is the root file system of the container ``user``, mounted with the mapping ``users``.
        Raises: Unavailable; MountFailed.
        """
        unfilled = {mount.target for mount in mounts if mount.volume_options and mount.volume_options.no_copy}
        for point in points:
            if point.type != "volume" or point.destination in unfilled or point.subpath:
                continue
            if not self._is_mounted(point.name):
                await self._fill_local(point, root, users)
            elif has_directory(root, point.destination):
                await self._fill_mounted(f"{user} fills {point.name}", point, root, users)

    async def _fill_local(self, point: MountPoint, root: Path, users: UserMap | None) -> None:
        """Fill a volume aside and then at once, since a volume with a part of the files would count as filled.

        Of two containers that are created at the same time, the second waits.
        """
        volume, aside = self.path(point.name), self.new_aside()
        async with self._filling.setdefault(point.name, asyncio.Lock()):
            if any(volume.iterdir()) or not has_directory(root, point.destination):
                return
            async with afterwards(partial(discard_tree, aside)):
                copy = aside / point.name / volume.name
                copy.mkdir(mode=0o755, parents=True)
                await copy_up(root, point.destination, copy, users=users)
                if not await thread_to_end(partial(move_files, copy, volume)):
                    await copy_up(root, point.destination, volume, users=users)

    async def _fill_mounted(self, user: str, point: MountPoint, root: Path, users: UserMap | None) -> None:
        try:
            await self.mount(user, [point])
        except MountFailed as error:
            raise MountFailed(f"failed to populate volume: {error}") from error
        async with afterwards(partial(self._unmount_isolated, user)):
            await copy_up(root, point.destination, self.path(point.name), is_mounted=True, users=users)

    async def remove_anonymous(self, points: Iterable[MountPoint], containers: Listing) -> None:
        """Remove the volumes that were created for one container only, unless another container uses them.

        Raises: Unavailable.
        """
        for point in points:
            if point.type == "volume" and point.anonymous:
                with suppress(VolumeInUse):
                    await self.remove(point.name, containers)

    @staticmethod
    def new_name() -> str:
        """Return a name for an anonymous volume: 64 hexadecimal characters, as in Docker."""
        return secrets.token_hex(32)


def _mount_id(user: str) -> str:
    """Return the id by which a plug-in knows a user: 64 hexadecimal digits, as in Docker."""
    return hashlib.sha256(user.encode()).hexdigest()
