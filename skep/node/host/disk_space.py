"""Free space of the disks that this node and its containers write to, and the conditions derived from it.

A disk's use is measured by the space left for unprivileged processes (``f_bavail``).  ext4 reserves 5 % of its blocks
for root, so writes by root still succeed long after writes in containers fail.  Inodes can run out while blocks are
left.

* The condition ``disk-space`` names each disk that is used to ``WARN_PERCENT`` or more.
* The condition ``disk-pressure`` names each disk with the node's own files that is used to the percentage in the
  setting ``disk-pressure`` or more.  Managers then assign no further tasks to the node (``scheduler.nodes.filters``).
  Disks that only have bind mounts or other volumes are never named, because other tasks do not need them.

Each condition is cleared ``HYSTERESIS`` percent below its mark.  Otherwise a disk near the mark would change the
cluster's state with each file that is created or removed.
"""

import os
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog
from msgspec.structs import replace

from skep.aio.blocking import BlockingCalls
from skep.aio.clock import Clock, tick
from skep.configuration.configuration import Configuration
from skep.engine.containers.container import Container
from skep.errors import Unavailable
from skep.model.node_reports.conditions import ConditionName
from skep.node.host.conditions import Conditions

log = structlog.get_logger()

WARN_PERCENT = 85
"""Use of a disk in percent at which the node warns.

By default, it also starts to remove unused images then (``image-gc-high``), as kubelet does.
"""
HYSTERESIS = 2
"""Percent below its mark at which a condition ends, so that single files do not change it."""
STEP_PERCENT = 2
"""A condition shows a new percentage only if it differs by this much, because each change is written to the cluster's
store.
"""
PERIOD_S = 5.0
"""Seconds between two measurements.  A fast disk may receive some gigabytes in this time.

Managers get a condition that begins, ends or changes at once.
"""
ROUNDS_BETWEEN = 12
"""Rounds after which a directory is measured again that was on the disk of another one.

Another disk may have been mounted there since.  Each measurement takes a thread.
"""
SILENT_S = 5.0
"""Seconds after which a disk that does not respond is left out, for example a network file system without its server.
"""
SOURCES_MAX = 200
"""Limit for the container mounts that are measured.  Each is measured in a separate thread."""
_NAMED_MAX = 3
"""Limit for the directories that one sentence names."""


class FileSystemUse(msgspec.Struct, frozen=True, kw_only=True):
    """Use of one file system."""

    path: str
    """A directory on it."""
    device: int
    free_bytes: int
    """Bytes that unprivileged processes can still write."""
    used_percent: float
    """Used percentage of the space for unprivileged processes, as in ``df``."""
    inodes_percent: float
    """Used percentage of inodes, or 0 on file systems that create inodes on demand."""
    is_own: bool = False
    """Whether the node's own files are on it."""
    purpose: str = ""
    """The node's own files on this disk (``data``, ``images``), or empty."""
    mount_point: str = ""
    """Mount point of a disk with containers' files.

    Empty if the path belongs to a stack, because every user can read conditions.
    """

    @property
    def name(self) -> str:
        """Name that reveals no path of the machine: the purpose, or else the device number."""
        return self.purpose or f"{os.major(self.device)}:{os.minor(self.device)}"

    @property
    def percent(self) -> float:
        """Used percentage of bytes or inodes, whichever is larger."""
        return max(self.used_percent, self.inodes_percent)


def space_of(path: str, *, is_own: bool = False) -> FileSystemUse | None:
    """Measure the file system of ``path``.  None if it is read-only or has no size of its own.  Raises: OSError."""
    return use_of(os.statvfs(path), path, os.stat(path).st_dev, is_own=is_own)


def use_of(found: os.statvfs_result, path: str, device: int, *, is_own: bool = False) -> FileSystemUse | None:
    """Return what statvfs(3) has ``found`` at ``path``, or None if nothing can be written there."""
    used = found.f_blocks - found.f_bfree
    if not used + found.f_bavail or found.f_flag & os.ST_RDONLY:
        return None
    inodes_used = found.f_files - found.f_ffree
    inodes = inodes_used + found.f_favail
    return FileSystemUse(
        path=path,
        device=device,
        free_bytes=found.f_bavail * found.f_frsize,
        used_percent=100 * used / (used + found.f_bavail),
        inodes_percent=100 * inodes_used / inodes if found.f_files and inodes else 0.0,
        is_own=is_own,
    )


def mount_point_of(device: int, mounts: str, hidden: Iterable[str]) -> str:
    """Return where the file system of ``device`` is mounted, or an empty string if all its mount points are below
    ``hidden``.

    ``mounts`` is the text of /proc/self/mountinfo.
    """
    number, below = f"{os.major(device)}:{os.minor(device)}", tuple(f"{one.rstrip('/')}/" for one in hidden)
    entries = (line.split(" ", 5) for line in mounts.splitlines())
    points = [_unescaped(one[4]) for one in entries if one[2] == number and one[3] == "/"]
    return min((one for one in points if not f"{one}/".startswith(below)), key=len, default="")


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def sources_of(containers: Iterable[Container]) -> list[str]:
    """Return the machine's directories that running containers can write to: volumes and bind mounts."""
    found = {
        point.source: None
        for container in containers
        if container.is_running
        for point in container.config.mounts
        if point.type in ("bind", "volume") and point.source and not point.read_only and not point.internal
    }
    return sorted(found)[:SOURCES_MAX]


class DiskReader(msgspec.Struct, frozen=True, kw_only=True):
    """Measures disks."""

    measure: Callable[[str, bool], FileSystemUse | None] = lambda path, is_own: space_of(path, is_own=is_own)
    """Measures the disk of a path, and whether the path is the node's own.  It may block."""
    silent_s: float = SILENT_S


SYSTEM_DISKS = DiskReader()


class DiskMarks(msgspec.Struct, frozen=True):
    """Percentages at which conditions are set.  From ``full`` on, the node gets no new tasks, unless ``full`` is 0."""

    full: int
    warn: int = WARN_PERCENT


class _Shown(msgspec.Struct, frozen=True):
    """The message shown last about a disk."""

    percent: int
    words: str
    is_full: bool


class Fullness:
    """Decides on the texts of the conditions.  Remembers the last texts and is pure otherwise."""

    def __init__(self) -> None:
        self._shown: dict[int, _Shown] = {}

    def judge(self, disks: Sequence[FileSystemUse], marks: DiskMarks) -> tuple[str, str]:
        """Return the texts of ``disk-space`` and ``disk-pressure``.  An empty text clears the condition.

        A disk that is full is not also named as nearly full.
        """
        shown = {disk.device: one for disk in disks if (one := self._judge(disk, marks)) is not None}
        self._shown = shown
        worst = sorted(disks, key=lambda disk: (-disk.percent, disk.path))
        found = [shown[disk.device] for disk in worst if disk.device in shown]
        near = [one.words for one in found if not one.is_full][:_NAMED_MAX]
        full = [one.words for one in found if one.is_full][:_NAMED_MAX]
        return "; ".join(near), "; ".join(full)

    def _judge(self, disk: FileSystemUse, marks: DiskMarks) -> _Shown | None:
        before = self._shown.get(disk.device)
        was_full = before is not None and before.is_full
        is_full = bool(disk.is_own and marks.full) and _is_above(disk, marks.full, was_above=was_full)
        if not is_full and not _is_above(disk, marks.warn, was_above=before is not None):
            return None
        if (
            before is not None
            and before.is_full == is_full
            and abs(disk.percent - before.percent) < STEP_PERCENT
        ):
            return before
        return _Shown(int(disk.percent), _words(disk, marks, is_full=is_full), is_full)


def _is_above(disk: FileSystemUse, mark: int, *, was_above: bool) -> bool:
    return disk.percent >= (mark - HYSTERESIS if was_above else mark)


def _words(disk: FileSystemUse, marks: DiskMarks, *, is_full: bool) -> str:
    place = disk.path if disk.is_own else disk.mount_point
    name = f"the disk at {place}" if place else "a volume's disk"
    if disk.inodes_percent > disk.used_percent:
        state = f"{int(disk.inodes_percent)} % of the inodes of {name} are in use"
    else:
        state = f"{name} is {int(disk.used_percent)} % full, {_amount(disk.free_bytes)} left"
    if is_full:
        return f"{state}: no new tasks until it is below {marks.full - HYSTERESIS} %"
    return f"{state}: remove files or enlarge the disk"


def _amount(size: int) -> str:
    if size >= 1 << 30:
        return f"{size / (1 << 30):.1f} GiB"
    return f"{size / (1 << 20):.0f} MiB"


class DiskSpace:
    """Keeps the conditions ``disk-space`` and ``disk-pressure`` current.

    Args:
        directories: Folders with the node's own files, by purpose.
        containers: Returns the node's containers.
        configuration: Returns the present configuration, which may be reloaded.
        changed: Called when a condition has begun, ended or changed.
        reader: Measures the disks.
    """

    def __init__(
        self,
        directories: Mapping[str, Path],
        containers: Callable[[], Iterable[Container]],
        configuration: Callable[[], Configuration],
        conditions: Conditions,
        clock: Clock,
        changed: Callable[[], None] = lambda: None,
        reader: DiskReader = SYSTEM_DISKS,
    ) -> None:
        self._directories = directories
        self._containers = containers
        self._configuration = configuration
        self._conditions = conditions
        self._clock = clock
        self._changed = changed
        self._reader = reader
        self.own_calls = BlockingCalls()
        self.calls = BlockingCalls()
        """Separate threads for containers' mounts.

        Mounts without a responding server must not use up the threads for the node's own directories.
        """
        self._waiting: set[str] = set()
        """Paths whose earlier measurement has not ended."""
        self._own: dict[str, FileSystemUse | None] = {}
        """The last measurement of each own directory."""
        self._rounds = 0
        self._fullness = Fullness()
        self._silent: set[str] = set()
        self.disks: Sequence[FileSystemUse] = ()
        """The last measurements, one for each file system."""

    async def prepare(self) -> Callable[[], Coroutine[Any, Any, None]]:
        """Measure once, so that the node's first description has the conditions.  Return ``run``."""
        await self.measure()
        return self.run

    async def run(self) -> None:
        """Measure every ``PERIOD_S`` until cancelled."""
        while True:
            await tick(self._clock, PERIOD_S)
            await self.measure()

    async def measure(self) -> None:
        """Measure now, and set or clear the conditions."""
        found: dict[int, FileSystemUse] = {}
        is_thorough = self._rounds % ROUNDS_BETWEEN == 0
        self._rounds += 1
        for purpose, directory in self._directories.items():
            last = self._own.get(str(directory))
            if is_thorough or last is None or last.device not in found:
                await self._add(str(directory), found, purpose=purpose)
        sources = sources_of(self._containers())
        for path in sources:
            await self._add(path, found)
        if not all(disk.is_own for disk in found.values()):
            mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
            hidden = (*map(str, self._directories.values()), *sources)
            for device, disk in found.items():
                found[device] = replace(disk, mount_point=mount_point_of(device, mounts, hidden))
        self.disks = tuple(found.values())
        near, full = self._fullness.judge(self.disks, DiskMarks(self._configuration().disk_pressure))
        before = self._conditions.present()
        if full and not near:
            self._conditions.drop(ConditionName.DISK_SPACE)
        else:
            self._conditions.report(ConditionName.DISK_SPACE, near)
        self._conditions.report(ConditionName.DISK_PRESSURE, full)
        if self._conditions.present() != before:
            self._changed()

    async def _add(self, path: str, found: dict[int, FileSystemUse], *, purpose: str = "") -> None:
        """Measure the disk of ``path`` unless it was measured already.

        A disk that cannot be measured is left out.  An own directory keeps its last measurement, because its disk may
        still be full.
        """
        is_own = bool(purpose)
        try:
            space = await self._measure_in_thread(path, is_own=is_own)
        except FileNotFoundError:  # not created yet, or removed with its container
            self._own.pop(path, None)
            return
        except (OSError, TimeoutError, Unavailable) as error:
            if path not in self._silent:
                self._silent.add(path)
                log.info("free space of disk unknown", path=path, reason=str(error) or "no answer")
            space = self._own.get(path)
        else:
            self._silent.discard(path)
            if is_own:
                self._own[path] = space
        if space is not None:
            found.setdefault(space.device, replace(space, purpose=purpose))

    async def _measure_in_thread(self, path: str, *, is_own: bool) -> FileSystemUse | None:
        """Measure in a thread, with at most one pending call for each path.

        Raises: OSError; TimeoutError; Unavailable.
        """
        if path in self._waiting:
            raise Unavailable("an earlier measurement has not ended")

        def measure() -> FileSystemUse | None:
            try:
                return self._reader.measure(path, is_own)
            finally:
                self._waiting.discard(path)

        calls = self.own_calls if is_own else self.calls
        self._waiting.add(path)
        try:
            return await calls.call(measure, self._reader.silent_s)
        except Unavailable:  # no thread was started
            self._waiting.discard(path)
            raise
