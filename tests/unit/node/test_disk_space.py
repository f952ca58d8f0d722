"""How full the disks of a node are: by what is left to processes without privileges, and by inodes."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.agent.session.session_state import SessionState
from skep.aio.clock import SystemClock
from skep.api.telemetry.exposition import render
from skep.configuration.configuration import Configuration
from skep.engine.containers.container import ContainerConfig, ContainerState, MountPoint
from skep.errors import Unavailable
from skep.model.node_reports.conditions import DISK_PRESSURE_LABEL, ConditionName
from skep.node.host.conditions import Conditions
from skep.node.host.disk_space import (
    PERIOD_S,
    ROUNDS_BETWEEN,
    DiskMarks,
    DiskReader,
    DiskSpace,
    FileSystemUse,
    Fullness,
    mount_point_of,
    sources_of,
    space_of,
    use_of,
)
from skep.node.telemetry.metrics import disk_families
from tests.support.engine.stub_engine import a_container

MARKS = DiskMarks(full=95)


def a_disk(
    percent: float, *, inodes: float = 0.0, device: int = 1, is_own: bool = True, path: str = "/d"
) -> FileSystemUse:
    return FileSystemUse(
        path=path,
        device=device,
        free_bytes=1 << 30,
        used_percent=percent,
        inodes_percent=inodes,
        is_own=is_own,
    )


def a_statvfs(**fields: int) -> Any:
    """1,000 blocks of 4 KiB, of which root reserves 50."""
    found = {"f_blocks": 1000, "f_bfree": 1000, "f_bavail": 950, "f_frsize": 4096, "f_flag": 0}
    inodes = {"f_files": 100, "f_ffree": 100, "f_favail": 100}
    return SimpleNamespace(**{**found, **inodes, **fields})


def measured(**fields: int) -> FileSystemUse | None:
    return use_of(a_statvfs(**fields), "/", 1)


def test_the_disk_of_a_path_is_measured(tmp_path: Path) -> None:
    space = space_of(str(tmp_path), is_own=True)
    assert space is not None
    assert (space.path, space.device, space.is_own) == (str(tmp_path), tmp_path.stat().st_dev, True)
    assert space.free_bytes > 0


def test_blocks_that_root_reserves_are_not_free() -> None:
    space = measured(f_bfree=50, f_bavail=0)
    assert space is not None
    assert (space.used_percent, space.free_bytes, space.inodes_percent) == (100.0, 0, 0.0)
    half = measured(f_bfree=525, f_bavail=475)
    assert half is not None
    assert half.used_percent == 50.0


def test_inodes_count_where_the_file_system_has_a_number_of_them() -> None:
    space = measured(f_ffree=4, f_favail=4)
    assert space is not None
    assert space.percent == space.inodes_percent == 96.0
    none = measured(f_files=0, f_ffree=0, f_favail=0)
    assert none is not None
    assert none.inodes_percent == 0.0


@pytest.mark.parametrize("fields", [{"f_flag": os.ST_RDONLY}, {"f_blocks": 0, "f_bfree": 0, "f_bavail": 0}])
def test_a_file_system_that_nothing_is_written_to_is_none(fields: dict[str, int]) -> None:
    assert measured(**fields) is None


def test_the_conditions_come_at_their_marks_and_end_two_percent_below() -> None:
    fullness = Fullness()
    found = []
    for percent in (84.9, 85, 83.5, 82.9, 94.9, 95, 93.5, 92.9, 100, 10):
        near, full = fullness.judge([a_disk(percent)], MARKS)
        found.append("full" if full else "near" if near else "")
    assert found == ["", "near", "near", "", "near", "full", "full", "near", "full", ""]


def test_the_words_say_how_full_what_is_left_and_what_follows() -> None:
    near, _ = Fullness().judge([a_disk(87.9)], MARKS)
    assert near == "the disk at /d is 87 % full, 1.0 GiB left: remove files or enlarge the disk"
    _, full = Fullness().judge([replace(a_disk(96), free_bytes=412 << 20)], MARKS)
    assert full == "the disk at /d is 96 % full, 412 MiB left: no new tasks until it is below 93 %"
    near, _ = Fullness().judge([a_disk(10, inodes=90)], MARKS)
    assert near == "90 % of the inodes of the disk at /d are in use: remove files or enlarge the disk"


def test_the_words_change_with_every_second_percent_at_most() -> None:
    fullness = Fullness()
    texts = {fullness.judge([a_disk(85 + number / 10)], MARKS)[0] for number in range(100)}
    assert len(texts) == 5


def test_only_the_nodes_own_disk_keeps_tasks_away_and_zero_means_never() -> None:
    near, full = Fullness().judge([replace(a_disk(99, is_own=False), mount_point="/mnt")], MARKS)
    assert (near.startswith("the disk at /mnt is 99 % full"), full) == (True, "")
    assert Fullness().judge([a_disk(99)], DiskMarks(full=0))[1] == ""


def test_several_disks_are_named_the_fullest_first() -> None:
    disks = [a_disk(86 + number, device=number, path=f"/{number}") for number in range(5)]
    near, _ = Fullness().judge(disks, MARKS)
    assert [part.split()[3] for part in near.split("; ")] == ["/4", "/3", "/2"]


def test_a_disk_of_a_volume_has_no_path_of_its_stack() -> None:
    """Every user sees the condition, and not only those of the volume's stack."""
    blog = a_disk(90, is_own=False, path="/var/lib/skep/volumes/blog_db/_data")
    near, _ = Fullness().judge([blog], MARKS)
    assert near == "a volume's disk is 90 % full, 1.0 GiB left: remove files or enlarge the disk"
    near, _ = Fullness().judge([replace(blog, used_percent=1, inodes_percent=90)], MARKS)
    assert near.startswith("90 % of the inodes of a volume's disk are in use")


def test_the_mount_point_of_a_disk_is_shown_unless_it_is_of_a_volume() -> None:
    mounts = """\
20 1 8:1 / / rw - ext4 /dev/sda1 rw
21 20 8:17 / /mnt/big\\040disk rw shared:1 - ext4 /dev/sdb1 rw
22 21 8:17 / /var/lib/skep/volumes/blog_x rw - ext4 /dev/sdb1 rw
23 20 8:17 /blog /run/a rw - ext4 /dev/sdb1 rw
24 20 8:33 / /var/lib/skep/volumes/blog_y rw - ext4 /dev/sdc1 rw
25 20 8:49 / /srv/blog rw - ext4 /dev/sdd1 rw
"""

    def shown(minor: int) -> str:
        hidden = ("/var/lib/skep", "/srv/blog")
        return mount_point_of(os.makedev(8, minor), mounts, hidden)

    assert {minor: shown(minor) for minor in (1, 17, 33, 49, 65)} == {
        1: "/",
        17: "/mnt/big disk",
        33: "",  # the only mount is the volume
        49: "",  # a container's source
        65: "",  # a subvolume of btrfs has a device of its own
    }


async def test_a_full_disk_of_a_bind_mount_does_not_show_its_source(tmp_path: Path) -> None:
    points = (MountPoint(type="bind", destination="/b", source="/srv/blog-secret"),)
    config = ContainerConfig(path="sh", mounts=points)
    configuration, conditions = Configuration(data_dir=tmp_path), Conditions(SystemClock())
    device = os.stat("/proc").st_dev

    def measure(path: str, is_own: bool) -> FileSystemUse:
        return a_disk(10) if is_own else a_disk(90, device=device, is_own=False, path=path)

    containers, reader = [a_container(config=config)], DiskReader(measure=measure)
    check = DiskSpace(
        {"data": tmp_path},
        lambda: containers,
        lambda: configuration,
        conditions,
        SystemClock(),
        reader=reader,
    )
    await check.measure()
    assert conditions.present()[ConditionName.DISK_SPACE].startswith("the disk at /proc is 90 % full")


def test_containers_write_to_volumes_and_bind_mounts_that_are_not_read_only() -> None:
    points = (
        MountPoint(type="volume", destination="/a", source="/v/a"),
        MountPoint(type="bind", destination="/b", source="/mnt/b"),
        MountPoint(type="bind", destination="/c", source="/mnt/c", read_only=True),
        MountPoint(type="bind", destination="/d", source="/secret", internal=True),
        MountPoint(type="tmpfs", destination="/e"),
    )
    config = ContainerConfig(path="sh", mounts=points)
    ended = a_container(config=config, state=ContainerState.EXITED, process=None)
    assert sources_of([a_container(config=config)]) == ["/mnt/b", "/v/a"]
    assert sources_of([ended]) == []


def checking(
    tmp_path: Path,
    conditions: Conditions,
    measure: Callable[[str, bool], FileSystemUse | None],
    **settings: int,
) -> DiskSpace:
    configuration = replace(Configuration(data_dir=tmp_path), **settings)
    reader = DiskReader(measure=measure)
    return DiskSpace(
        {"data": tmp_path}, tuple, lambda: configuration, conditions, SystemClock(), reader=reader
    )


async def test_a_full_disk_is_two_conditions_and_a_label_for_managers(tmp_path: Path) -> None:
    conditions = Conditions(SystemClock())
    percents = iter((90.0, 96.0, 50.0))
    check = checking(tmp_path, conditions, lambda path, _: a_disk(next(percents), path=path))
    found, labels = [], []
    for _ in range(3):
        await check.measure()
        found.append(sorted(conditions.present()))
        labels.append([*conditions.labels()])
    assert labels[1] == [DISK_PRESSURE_LABEL], "90 % full beside 96 % full would be untrue"
    assert found == [[ConditionName.DISK_SPACE], [ConditionName.DISK_PRESSURE], []]
    assert DISK_PRESSURE_LABEL in conditions.labels()  # until it has been there for half a minute
    page = render(disk_families(check.disks)).decode()
    assert 'skep_disk_used_ratio{disk="data"} 0.5' in page
    assert str(tmp_path) not in page


def test_managers_know_within_a_period_that_a_full_disk_has_space_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session sends the node's description as soon as the event is set."""
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    percents = [97.0]
    reader = DiskReader(measure=lambda path, _: a_disk(percents[0], path=path))
    conditions = Conditions(clock)
    configuration = Configuration(data_dir=tmp_path)
    session = SessionState(clock)
    changed = session.description_changed
    check = DiskSpace(
        {"data": tmp_path}, tuple, lambda: configuration, conditions, clock, changed.set, reader
    )

    async def call(work: Callable[[], FileSystemUse], within_s: float) -> FileSystemUse:
        return work()

    monkeypatch.setattr(check.own_calls, "call", call)

    async def space_again() -> float:
        running = loop.create_task(check.run())
        await clock.sleep(120)
        assert DISK_PRESSURE_LABEL in conditions.labels()
        percents[0], freed_at = 40.0, clock.monotonic()
        while DISK_PRESSURE_LABEL in conditions.labels():
            changed.clear()
            await changed.wait()
        running.cancel()
        return clock.monotonic() - freed_at

    try:
        assert loop.run_until_complete(space_again()) <= PERIOD_S
    finally:
        loop.close()


async def test_managers_get_a_condition_at_once_and_nothing_while_it_stays(tmp_path: Path) -> None:
    percents = [50.0]
    reader = DiskReader(measure=lambda path, _: a_disk(percents[0], path=path))
    session, clock = SessionState(SystemClock()), SystemClock()
    configuration = Configuration(data_dir=tmp_path)
    check = DiskSpace(
        {"data": tmp_path},
        tuple,
        lambda: configuration,
        Conditions(clock),
        clock,
        session.description_changed.set,
        reader,
    )
    told = []
    for percent in (50.0, 86.0, 86.5, 97.0, 97.0, 50.0, 50.0):
        percents[0] = percent
        await check.measure()
        told.append(session.description_changed.is_set())
        session.description_changed.clear()
    assert told == [False, True, False, True, False, True, False]


async def test_the_mark_is_a_setting(tmp_path: Path) -> None:
    conditions = Conditions(SystemClock())
    await checking(tmp_path, conditions, lambda _path, _is_own: a_disk(90), disk_pressure=90).measure()
    assert sorted(conditions.present()) == [ConditionName.DISK_PRESSURE]


async def test_a_disk_that_does_not_answer_hides_no_other(tmp_path: Path) -> None:
    config = ContainerConfig(path="sh", mounts=(MountPoint(type="bind", destination="/b", source="/nfs"),))
    configuration = Configuration(data_dir=tmp_path)

    def measure(path: str, _is_own: bool) -> FileSystemUse:
        if path == "/nfs":
            raise OSError(5, "Input/output error")
        return a_disk(10, path=path)

    check = DiskSpace(
        {"data": tmp_path},
        lambda: [a_container(config=config)],
        lambda: configuration,
        Conditions(SystemClock()),
        SystemClock(),
        reader=DiskReader(measure=measure),
    )
    await check.measure()
    assert [one.path for one in check.disks] == [str(tmp_path)]


async def test_a_silent_mount_costs_one_thread_and_hides_no_full_disk(tmp_path: Path) -> None:
    config = ContainerConfig(path="sh", mounts=(MountPoint(type="bind", destination="/b", source="/nfs"),))
    configuration = Configuration(data_dir=tmp_path)
    conditions = Conditions(SystemClock())
    containers = [a_container(config=config)]
    may_end, looks = threading.Event(), []

    def measure(path: str, is_own: bool) -> FileSystemUse:
        if path == "/nfs":
            looks.append(path)
            may_end.wait(30)
        return a_disk(97 if is_own else 10, path=path)

    reader = DiskReader(measure=measure, silent_s=0.01)
    check = DiskSpace(
        {"data": tmp_path},
        lambda: containers,
        lambda: configuration,
        conditions,
        SystemClock(),
        reader=reader,
    )
    try:
        for _ in range(5):
            await check.measure()
            assert sorted(conditions.present()) == [ConditionName.DISK_PRESSURE]
        assert looks == ["/nfs"]
    finally:
        may_end.set()


async def test_directories_on_one_disk_take_one_thread_until_they_may_have_moved(tmp_path: Path) -> None:
    configuration = Configuration(data_dir=tmp_path)
    looks: list[str] = []
    devices = {str(tmp_path): 1, "/images": 1, "/logs": 2}

    def measure(path: str, _: bool) -> FileSystemUse:
        looks.append(path)
        return a_disk(10, path=path, device=devices[path])

    check = DiskSpace(
        {"data": tmp_path, "images": Path("/images"), "logs": Path("/logs")},
        *(tuple, lambda: configuration, Conditions(SystemClock()), SystemClock()),
        reader=DiskReader(measure=measure),
    )
    await check.measure()
    assert looks == [str(tmp_path), "/images", "/logs"]
    for _ in range(ROUNDS_BETWEEN - 1):
        looks.clear()
        await check.measure()
        assert looks == [str(tmp_path), "/logs"]
    devices["/images"] = 3
    await check.measure()
    assert [one.device for one in check.disks] == [1, 3, 2]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), TimeoutError(), Unavailable("full")])
async def test_an_own_disk_that_does_not_answer_is_as_full_as_before(
    tmp_path: Path, error: Exception
) -> None:
    conditions = Conditions(SystemClock())
    outcomes: list[Exception | None] = [None, error, FileNotFoundError()]

    def measure(path: str, _is_own: bool) -> FileSystemUse:
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome
        return a_disk(97, path=path)

    check = checking(tmp_path, conditions, measure)
    found, labels = [], []
    for _ in range(3):
        await check.measure()
        found.append(sorted(conditions.present()))
        labels.append([*conditions.labels()])
    assert labels[1] == [DISK_PRESSURE_LABEL], "90 % full beside 96 % full would be untrue"
    assert found == [[ConditionName.DISK_PRESSURE], [ConditionName.DISK_PRESSURE], []]


def test_a_disk_of_a_bind_mount_has_its_device_as_name() -> None:
    disks = [a_disk(10, path="/d"), a_disk(20, device=os.makedev(8, 17), path="/srv/secret", is_own=False)]
    page = render(disk_families([replace(disks[0], purpose="data"), disks[1]])).decode()
    assert 'skep_disk_free_bytes{disk="8:17"}' in page
    assert "/srv" not in page
