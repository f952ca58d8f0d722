"""Mounts assigned cluster volumes on this node through their CSI drivers, and unmounts unused volumes on request.

Each volume has its own worker, so a volume whose driver hangs blocks only its own tasks, which wait for a bounded time.
Before a driver is called, the volume is recorded in a file, so that a node process that ends at any point leaves
nothing mounted forever.  ``<data>/csi/<id>/`` has ``staging`` and ``mount``, and ``<data>/csi/<id>.json`` the volume.

Source: swarmkit, agent/csi/volumes.go, agent/csi/plugin/plugin.go.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock, tick
from skep.aio.failures import describe_error, isolate, log_error, retry
from skep.csi.driver import CsiDriver
from skep.csi.drivers import Drivers
from skep.errors import SkepError, Unavailable
from skep.linux.files import replace_file
from skep.model.assignment import AssignmentSet
from skep.model.node import CSIInfo
from skep.model.task import VolumeAttachment
from skep.model.values.encoding import to_json
from skep.model.values.ids import VolumeId
from skep.model.values.unknown import leniently
from skep.model.volume import NOT_PUBLISHED, VolumeAssignment

log = structlog.get_logger(__name__)

TASK_WAIT_S = 120.0
"""Seconds that a task waits for a volume before it fails with the driver's last error."""
SCAN_S = 10.0
"""Seconds between two searches for volume drivers."""
DRIVER_BYTES_MAX, DESCRIPTION_BYTES_MAX = 4 * 1024, 16 * 1024
"""Limits in bytes for one driver, and for all drivers, in the node's description.

A larger description would be cut (``model.node_reports.description_size``).
"""


class VolumeTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Times for mounting and unmounting, in seconds."""

    first_retry_s: float = 1.0
    """First delay before a failed driver call is repeated."""
    longest_retry_s: float = 30.0
    used_check_s: float = 1.0
    """Time between two checks whether a container still uses a volume that a manager wants unmounted."""


TIMES = VolumeTimes()


class PathQueries(msgspec.Struct, frozen=True, kw_only=True):
    """How this node's paths are looked up."""

    users_of: Callable[[Path], Collection[str]]
    """Returns the containers that mount a directory and run or are about to run."""
    is_mounted: Callable[[Path], bool]
    """Returns whether a directory has a mount that this process and containers see."""
    device_at: Callable[[Path], str]
    """Returns ``major:minor`` of the block device at a path, or an empty text."""


class PublishedVolume(NamedTuple):
    """A task's mounted volume: the directory where it is mounted, or its block device."""

    path: Path
    device: str = ""
    """``major:minor`` of a block device."""


class _Held:
    """State of one volume that a manager wants mounted or unmounted."""

    def __init__(self, volume: VolumeAssignment, *, is_wanted: bool) -> None:
        self.volume = volume
        self.is_wanted = is_wanted
        self.is_mounted = False
        """Whether this process has mounted the volume.

        Volumes of an earlier process are mounted again, because the machine may have rebooted.
        """
        self.why = ""
        """Reason why the volume is not in its desired state."""
        self.holds = 0
        """Number of containers that are being created with the volume."""
        self.is_dormant = False
        """Whether an earlier process left the volume.

        Such a volume is left alone until a manager or a task names it, because it may be on another node by now.
        """
        self.changed = asyncio.Event()
        self.usable = asyncio.Event()
        """Set while tasks may use the volume, and cleared otherwise: an event that stayed set would make a waiting task
        spin.
        """

    def set(self, *, is_wanted: bool, is_mounted: bool) -> None:
        """Set both flags.  Tasks may use the volume while both are true."""
        self.is_wanted, self.is_mounted = is_wanted, is_mounted
        if is_wanted and is_mounted:
            self.usable.set()
        else:
            self.usable.clear()

    @property
    def obstacle(self) -> str:
        """Reason why no task may use the volume."""
        return self.why or ("it is not mounted yet" if self.is_wanted else "it is being unmounted")


class ClusterVolumes:
    """Applies volume assignments, and provides tasks with the volumes' directories."""

    def __init__(
        self,
        folder: Path,
        drivers: Drivers,
        clock: Clock,
        *,
        secret: Callable[[str], str],
        paths: PathQueries,
        times: VolumeTimes = TIMES,
    ) -> None:
        """Create the volumes.  ``secret`` returns the data of a secret of this node by id, or raises NotFound."""
        self._folder = folder
        self._drivers = drivers
        self._clock = clock
        self._secret = secret
        self._paths = paths
        self._times = times
        self._held: dict[VolumeId, _Held] = {}
        self._group: asyncio.TaskGroup | None = None
        self._ready = asyncio.Event()
        self._unreported: dict[VolumeId, bool] = {}
        """Unmounted volumes, and whether the current report includes each.

        A late answer to an earlier report is ignored.
        """
        self._to_report: dict[VolumeId, VolumeAssignment] = {}
        """Volumes that a manager wants unmounted and that may still have a mount, a directory or a record here."""
        self._reportable = asyncio.Event()
        self._infos: dict[str, tuple[CsiDriver, CSIInfo]] = {}

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            reading = partial(asyncio.to_thread, self.read_kept)
            for volume in await retry(reading, "volumes not read", clock=self._clock, longest_s=10.0):
                if volume.id not in self._held:
                    self._hold(volume, is_wanted=True).is_dormant = True
            self._group = group
            for id, held in list(self._held.items()):
                if not held.is_dormant:
                    self._spawn(id, held)
            self._ready.set()
            while True:
                await isolate(self._scan(), "volume drivers not found")
                await tick(self._clock, SCAN_S)

    async def wait_ready(self) -> None:
        """Wait until the volumes of an earlier process are known."""
        await self._ready.wait()

    @property
    def drivers(self) -> tuple[CSIInfo, ...]:
        """The drivers of this node for its description."""
        found, left = [], DESCRIPTION_BYTES_MAX
        for _, (_, info) in sorted(self._infos.items()):
            left -= len(to_json(info))
            if left >= 0:
                found.append(info)
        return tuple(found)

    # -- assignments and reports -----------------------------------------------------------------------------------

    def assign(self, change: AssignmentSet) -> None:
        """Apply the volumes of ``change``, after ``wait_ready``.  Returns at once."""
        for volume in change.volumes:
            self._unreported.pop(volume.id, None)
            self._to_report.pop(volume.id, None)
            self._want(volume, is_wanted=True)
        for volume in change.removed_volumes:
            self._to_report[volume.id] = volume
            if volume.id in self._held or self._has_traces(volume.id):
                self._want(volume, is_wanted=False)
        if change.complete:
            named = {volume.id for volume in (*change.volumes, *change.removed_volumes)}
            for id, held in list(self._held.items()):
                if id not in named:  # force-removed while this node was unreachable
                    self._want(held.volume, is_wanted=False)
        self._report_given_up()

    async def take_reports(self) -> Sequence[VolumeId]:
        """Wait for unmounted volumes and return them.  Each is returned again until ``reported`` is called with it."""
        while not self._unreported:
            self._reportable.clear()
            await self._reportable.wait()
        self._unreported = dict.fromkeys(sorted(self._unreported), True)
        return list(self._unreported)

    def reported(self, ids: Iterable[VolumeId]) -> None:
        """Record that a manager has accepted the reports."""
        for id in ids:
            if self._unreported.get(id):
                del self._unreported[id]

    # -- tasks -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def keep_mounted(
        self, attachments: Sequence[VolumeAttachment], wait_s: float = TASK_WAIT_S
    ) -> AsyncIterator[Sequence[PublishedVolume]]:
        """Mount a task's volumes and keep them mounted within the context.

        Yields them in the order of ``attachments``.

        Raises:
            Unavailable: A volume was not mounted within ``wait_s``.  The message has the reason.
        """
        taken: list[_Held] = []
        try:
            until = self._clock.monotonic() + wait_s
            for attachment in attachments:
                taken.append(await self._wait_mounted(VolumeId(attachment.id), attachment.source, until))
                taken[-1].holds += 1
            yield await asyncio.to_thread(lambda: [self._published(held.volume) for held in taken])
        finally:
            for held in taken:
                held.holds -= 1

    async def _wait_mounted(self, id: VolumeId, source: str, until: float) -> _Held:
        while True:
            held = self._held.get(id)
            if held is not None and held.usable.is_set():
                return held
            if held is not None and held.is_dormant:
                self._spawn(id, held)
            if self._clock.monotonic() >= until:
                why = held.obstacle if held is not None else NOT_PUBLISHED
                raise Unavailable(f"cluster volume {source} was not mounted in time: {why}")
            waiting = held.usable.wait() if held is not None else asyncio.Event().wait()
            with suppress(TimeoutError):
                await asyncio.wait_for(waiting, self._times.used_check_s)

    # -- one volume ------------------------------------------------------------------------------------------------

    def _want(self, volume: VolumeAssignment, *, is_wanted: bool) -> None:
        held = self._held.get(volume.id)
        if held is None:
            held = self._hold(volume, is_wanted=is_wanted)
            if self._group is not None:
                self._spawn(volume.id, held)
            return
        if held.is_dormant and self._group is not None:
            self._spawn(volume.id, held)
        if held.is_wanted != is_wanted or held.volume != volume:
            held.set(is_wanted=is_wanted, is_mounted=held.is_mounted and held.volume == volume)
            held.volume = volume
            held.changed.set()

    def _hold(self, volume: VolumeAssignment, *, is_wanted: bool) -> _Held:
        held = self._held[volume.id] = _Held(volume, is_wanted=is_wanted)
        return held

    def _spawn(self, id: VolumeId, held: _Held) -> None:
        assert self._group is not None
        held.is_dormant = False
        self._group.create_task(self._drive(id, held), name=f"volume-{id}")

    async def _drive(self, id: VolumeId, held: _Held) -> None:
        """Bring the volume to its desired state until it is unmounted.  Runs again after each change and failure."""
        backoff = Backoff(self._times.first_retry_s, self._times.longest_retry_s)
        while True:
            held.changed.clear()
            try:
                is_wanted = held.is_wanted
                if is_wanted:
                    if not held.is_mounted:
                        await self._mount(held)
                elif await self._give_up(held) and not held.is_wanted:
                    # It may be wanted again in the meantime.
                    del self._held[id]
                    self._report_given_up()
                    return
                held.why = ""
            except SkepError as error:
                held.why = str(error)
                log.warning("cluster volume not ready, will retry", volume=id, reason=held.why)
            except Exception as error:
                held.why = describe_error(error)
                log_error(error, "cluster volume not ready, will retry", volume=id)
            if not held.why:
                backoff.reset()
            if held.is_wanted and held.is_mounted:
                await held.changed.wait()
            else:
                delay_s = backoff.next_delay_s() if held.why else self._times.used_check_s
                with suppress(TimeoutError):
                    await asyncio.wait_for(held.changed.wait(), delay_s)

    async def _mount(self, held: _Held) -> None:
        """Mount a volume by its driver.  Raises: SkepError."""
        volume = held.volume
        secrets = {one.key: self._secret(one.secret) for one in volume.secrets}
        driver = await self._drivers.get(volume.driver.name)
        await asyncio.to_thread(self.keep, volume)
        await driver.node_publish(volume, self._staging(volume.id), self._target(volume.id), secrets)
        published = await asyncio.to_thread(self._published, volume)
        if volume.access_mode.block_volume is not None and not published.device:
            raise Unavailable("its driver reports it as published, but there is no block device")
        if volume.access_mode.block_volume is None and not await asyncio.to_thread(
            self._paths.is_mounted, published.path
        ):
            # Tasks would otherwise write to the node's own disk.
            raise Unavailable(
                "its driver reports it as mounted, but it is not: a driver in a container needs shared mounts"
            )
        if held.volume == volume:
            held.set(is_wanted=held.is_wanted, is_mounted=True)
            log.info("volume mounted", volume=volume.id, driver=volume.driver.name)

    def _published(self, volume: VolumeAssignment) -> PublishedVolume:
        """Return the volume as published on this node.  Blocks."""
        path = self._target(volume.id)
        return PublishedVolume(
            path, self._paths.device_at(path) if volume.access_mode.block_volume is not None else ""
        )

    async def _give_up(self, held: _Held) -> bool:
        """Unmount a volume unless it is used.

        Returns whether it is completely removed.  Raises: SkepError: the driver failed.
        """
        volume = held.volume
        users = self._paths.users_of(self._target(volume.id))
        if held.holds or users:
            held.why = ""
            return False
        held.set(is_wanted=held.is_wanted, is_mounted=False)
        driver = await self._drivers.get(volume.driver.name)
        await driver.node_unpublish(volume.volume_id, self._staging(volume.id), self._target(volume.id))
        await asyncio.to_thread(self.forget, volume.id)
        log.info("volume unmounted", volume=volume.id, driver=volume.driver.name)
        return True

    def _report_given_up(self) -> None:
        """Report volumes that are completely removed from this node.

        A recreated volume is also reported under its old id.
        """
        disks = {(held.volume.driver.name, held.volume.volume_id) for held in self._held.values()}
        for volume in list(self._to_report.values()):
            if volume.id not in self._held and (volume.driver.name, volume.volume_id) not in disks:
                del self._to_report[volume.id]
                self._unreported[volume.id] = False
                self._reportable.set()

    # -- files -----------------------------------------------------------------------------------------------------

    def _staging(self, id: VolumeId) -> Path:
        return self._folder / id / "staging"

    def _target(self, id: VolumeId) -> Path:
        return self._folder / id / "mount"

    def _file(self, id: VolumeId) -> Path:
        return self._folder / f"{id}.json"

    def _has_traces(self, id: VolumeId) -> bool:
        return os.path.lexists(self._file(id))

    def keep(self, volume: VolumeAssignment) -> None:
        """Record a volume on disk.  Blocks.  Raises: SkepError."""
        if not volume.id.isalnum():
            raise Unavailable("the volume has an invalid id")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # The record may contain credentials of the storage.
            replace_file(self._file(volume.id), to_json(volume), mode=0o600)
            self._staging(volume.id).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(f"cannot create the volume's directory: {describe_error(error)}") from error

    def forget(self, id: VolumeId) -> None:
        """Remove a volume's directories and record.  Blocks.

        Raises:
            Unavailable: The driver has left something in a directory, which is never removed by force.
        """
        for path in (self._target(id), self._staging(id), self._folder / id):
            try:
                os.rmdir(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise Unavailable(
                    f"the driver did not clean up {path.name}: {describe_error(error)}"
                ) from error
        self._file(id).unlink(missing_ok=True)

    def read_kept(self) -> list[VolumeAssignment]:
        """Return the recorded volumes.  Blocks."""
        found = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                found.append(leniently(path.read_bytes(), VolumeAssignment))
            except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
                log_error(error, "volume's file not read", path=str(path))
        return found

    # -- drivers ---------------------------------------------------------------------------------------------------

    async def _scan(self) -> None:
        present = await self._drivers.all()
        self._infos = {name: one for name, one in self._infos.items() if present.get(name) is one[0]}
        new = [driver for name, driver in present.items() if name not in self._infos]
        await asyncio.gather(*map(self._introduce, new))

    async def _introduce(self, driver: CsiDriver) -> None:
        try:
            info = await driver.node_info()
            if (size := len(to_json(info))) > DRIVER_BYTES_MAX:
                raise Unavailable(
                    f"its description of the node has {size} bytes, more than {DRIVER_BYTES_MAX}"
                )
            self._infos[driver.name] = driver, info
        except SkepError as error:  # a controller without a node service, or a driver that hangs
            log.info("driver does not describe the node", driver=driver.name, reason=str(error))
