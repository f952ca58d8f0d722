"""The cluster volumes of a node: mounted as assigned, given up when out of use, whatever ends between."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace

from skep.agent.tasks.cluster_volumes import TASK_WAIT_S, ClusterVolumes, PathQueries, VolumeTimes
from skep.aio.clock import Clock, SystemClock
from skep.errors import NotFound, Unavailable
from skep.model.assignment import AssignmentSet
from skep.model.node import CSIInfo, Topology
from skep.model.task import VolumeAttachment
from skep.model.values.ids import VolumeId
from skep.model.values.meta import Driver
from skep.model.volume import AccessMode, TypeBlock, VolumeAssignment, VolumeSecret
from tests.support.store.etcd_calls import until

V1 = VolumeAssignment(id=VolumeId("v1"), volume_id="disk-1", driver=Driver(name="d"))
HURRIED = VolumeTimes(used_check_s=0.01, first_retry_s=0.01)
V2 = VolumeAssignment(id=VolumeId("v2"), volume_id="disk-2", driver=Driver(name="slow"))


class FakeDriver:
    def __init__(self, name: str) -> None:
        self.name = name
        self.mounted: dict[str, Mapping[str, str]] = {}
        self.error = ""
        self.hangs = False
        self.leaves = False
        self.pretends = False
        self.topology: Topology | None = None

    async def node_info(self) -> CSIInfo:
        return CSIInfo(plugin_name=self.name, node_id="n1", accessible_topology=self.topology)

    async def node_publish(
        self, volume: VolumeAssignment, staging: Path, target: Path, secrets: Mapping[str, str]
    ) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.error:
            raise Unavailable(self.error)
        assert staging.is_dir()
        if volume.access_mode.block_volume is not None and not self.pretends:
            target.touch()
        else:
            target.mkdir(exist_ok=True)
        if self.pretends:
            return
        self.mounted[volume.volume_id] = secrets

    async def node_unpublish(self, volume_id: str, staging: Path, target: Path) -> None:
        if self.error:
            raise Unavailable(self.error)
        self.mounted.pop(volume_id, None)
        if self.leaves:
            return
        if target.is_file():
            target.unlink()
        elif target.exists():
            target.rmdir()


class Rig:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.drivers = {"d": FakeDriver("d"), "slow": FakeDriver("slow")}
        self.users: list[str] = []
        self.volumes = self.made()

    def made(self, times: VolumeTimes = HURRIED, clock: Clock | None = None) -> ClusterVolumes:
        return ClusterVolumes(
            self.folder,
            cast("Any", self),
            clock or SystemClock(),
            secret="data of {}".format,
            paths=PathQueries(
                users_of=lambda _: self.users, is_mounted=self.is_mounted, device_at=self.device_at
            ),
            times=times,
        )

    def is_mounted(self, path: Path) -> bool:
        assert path.name == "mount"
        return any(driver.mounted for driver in self.drivers.values())

    def device_at(self, path: Path) -> str:
        assert path.name == "mount"
        return "7:5" if path.is_file() else ""

    async def all(self) -> Mapping[str, FakeDriver]:
        return self.drivers

    async def get(self, name: str) -> FakeDriver:
        if name not in self.drivers:
            raise NotFound(f"driver {name} not found")
        return self.drivers[name]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ClusterVolumes]:
        task = asyncio.create_task(self.volumes.run())
        await self.volumes.wait_ready()
        try:
            yield self.volumes
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def refusal(self, *volumes: VolumeAssignment) -> None:
        """As ``path``, where the volumes are not expected."""
        await self.path(*volumes, wait_s=0.5)

    async def path(self, *volumes: VolumeAssignment, wait_s: float = TASK_WAIT_S) -> list[Path]:
        attachments = [VolumeAttachment(id=one.id, source=one.id, target="/d") for one in volumes]
        async with self.volumes.keep_mounted(attachments, wait_s) as published:
            return [one.path for one in published]


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "csi")


def given(*volumes: VolumeAssignment, complete: bool = False) -> AssignmentSet:
    return AssignmentSet(complete=complete, volumes=volumes)


def removed(*volumes: VolumeAssignment, complete: bool = False) -> AssignmentSet:
    return AssignmentSet(complete=complete, removed_volumes=volumes)


async def test_a_volume_is_mounted_for_its_task_and_reported_when_it_is_given_up(rig: Rig) -> None:
    secrets = (VolumeSecret(key="k", secret="s1"),)
    volume = VolumeAssignment(id=V1.id, volume_id="disk-1", driver=V1.driver, secrets=secrets)
    async with rig.running() as volumes:
        volumes.assign(given(volume))
        assert await rig.path(volume) == [rig.folder / "v1" / "mount"]
        assert rig.drivers["d"].mounted == {"disk-1": {"k": "data of s1"}}
        rig.users = ["c1"]
        volumes.assign(removed(volume))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(volumes.take_reports(), 0.1)
        rig.users = []
        assert await volumes.take_reports() == ["v1"]
        assert await volumes.take_reports() == ["v1"]  # until a manager has taken it
        volumes.reported(["v1"])
        assert rig.drivers["d"].mounted == {}
        assert list(rig.folder.iterdir()) == []


async def test_a_volume_that_was_never_here_is_reported_at_once(rig: Rig) -> None:
    async with rig.running() as volumes:
        volumes.assign(removed(V1, complete=True))
        assert await volumes.take_reports() == ["v1"]


async def test_a_driver_that_hangs_fails_its_task_and_holds_up_no_other(rig: Rig) -> None:
    rig.drivers["slow"].hangs = True
    async with rig.running() as volumes:
        volumes.assign(given(V2, V1))
        assert await rig.path(V1)
        with pytest.raises(Unavailable, match="cluster volume v2 was not mounted in time"):
            await rig.refusal(V2)


async def test_a_task_fails_with_the_drivers_words_and_the_next_succeeds(rig: Rig) -> None:
    rig.drivers["d"].error = "no such disk"
    async with rig.running() as volumes:
        volumes.assign(given(V1))
        with pytest.raises(Unavailable, match="no such disk"):
            await rig.refusal(V1)
        rig.drivers["d"].error = ""
        assert await rig.path(V1)


async def test_what_a_driver_leaves_is_not_removed_and_not_reported(rig: Rig) -> None:
    async with rig.running() as volumes:
        volumes.assign(given(V1))
        (path,) = await rig.path(V1)
        (path / "data").write_text("x")
        rig.drivers["d"].leaves = True
        volumes.assign(removed(V1))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(volumes.take_reports(), 0.2)
        assert (path / "data").read_text() == "x"


async def test_after_a_restart_a_volume_is_taken_up_or_given_up_as_the_manager_says(rig: Rig) -> None:
    async with rig.running() as volumes:
        volumes.assign(given(V1, V2))
        await rig.path(V1, V2)
    driver = rig.drivers["d"]
    driver.mounted.clear()  # the machine was started anew
    rig.volumes = rig.made()
    async with rig.running() as volumes:
        await asyncio.sleep(0.05)
        assert driver.mounted == {}  # nothing is done until it is named: it may be on another node by now
        volumes.assign(given(V1, complete=True))
        assert await rig.path(V1)
        assert "disk-1" in driver.mounted
        # removed with force while the node was away
        await until(lambda: not rig.drivers["slow"].mounted)
    rig.volumes = rig.made()
    async with rig.running():
        assert await rig.path(V1)  # a task of a node without a manager


async def test_the_node_describes_its_drivers(rig: Rig) -> None:
    async with rig.running() as volumes:
        await until(lambda: volumes.drivers)
        assert [one.plugin_name for one in volumes.drivers] == ["d", "slow"]


async def test_a_task_whose_volume_is_being_given_up_or_mounted_anew_waits_without_turning(
    rig: Rig,
) -> None:
    looks = 0

    class Counting(SystemClock):
        def monotonic(self) -> float:
            nonlocal looks
            looks += 1
            return super().monotonic()

    rig.volumes = rig.made(replace(HURRIED, used_check_s=0.1), Counting())
    async with rig.running() as volumes:
        volumes.assign(given(V1))
        await rig.path(V1)
        rig.users = ["c1"]
        volumes.assign(removed(V1))  # removed with force while a container has it
        looks = 0
        with pytest.raises(Unavailable, match="not mounted in time: it is being unmounted"):
            await rig.refusal(V1)
        assert looks < 20
        rig.drivers["d"].error = "no such disk"
        volumes.assign(given(replace(V1, publish_context={"device": "new"})))
        looks = 0
        with pytest.raises(Unavailable, match="no such disk"):
            await rig.refusal(V1)
        assert looks < 20


async def test_a_driver_that_only_says_that_it_has_mounted_gives_tasks_no_directory_of_the_node(
    rig: Rig,
) -> None:
    rig.drivers["d"].pretends = True  # or its mount is not seen outside its container
    async with rig.running() as volumes:
        volumes.assign(given(V1))
        with pytest.raises(Unavailable, match="its driver reports it as mounted, but it is not"):
            await rig.refusal(V1)
        rig.drivers["d"].pretends = False
        assert await rig.path(V1)


async def test_a_block_volume_is_its_device_and_no_task_gets_anything_else(rig: Rig) -> None:
    disk = replace(V1, access_mode=AccessMode(block_volume=TypeBlock()))
    rig.drivers["d"].pretends = True
    async with rig.running() as volumes:
        volumes.assign(given(disk))
        with pytest.raises(
            Unavailable, match="its driver reports it as published, but there is no block device"
        ):
            await rig.refusal(disk)
        (rig.folder / "v1" / "mount").rmdir()
        rig.drivers["d"].pretends = False
        attachment = VolumeAttachment(id=disk.id, source="disk", target="/dev/disk")
        async with volumes.keep_mounted([attachment]) as published:
            assert published == [(rig.folder / "v1" / "mount", "7:5")]
        volumes.assign(removed(disk))
        assert await volumes.take_reports() == ["v1"]
        assert list(rig.folder.iterdir()) == []


async def test_drivers_that_say_too_much_are_left_out_of_the_nodes_description(rig: Rig) -> None:
    """They would take the room of its other parts."""
    rig.drivers["d"].topology = Topology(segments={"zone": "\0" * 8000})
    async with rig.running() as volumes:
        await until(lambda: volumes.drivers)
        assert [one.plugin_name for one in volumes.drivers] == ["slow"]


async def test_a_late_answer_to_a_report_does_not_take_the_next_one(rig: Rig) -> None:
    async with rig.running() as volumes:
        volumes.assign(removed(V1))
        sent = await volumes.take_reports()
        volumes.assign(given(V1))  # the manager has it, and its answer is on the way
        await rig.path(V1)
        volumes.assign(removed(V1))
        await until(lambda: not rig.drivers["d"].mounted and not list(rig.folder.iterdir()))
        volumes.reported(sent)
        assert await asyncio.wait_for(volumes.take_reports(), 5) == ["v1"]
        volumes.reported(["v1"])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(volumes.take_reports(), 0.05)


async def test_a_volume_is_reported_when_nothing_with_its_drivers_id_is_left(rig: Rig) -> None:
    """It was removed with force, or the store is older than it, and it was created again by its name."""
    again = replace(V1, id=VolumeId("v1again"))
    async with rig.running() as volumes:
        volumes.assign(given(V1))
        await rig.path(V1)
        rig.users = ["c1"]
        volumes.assign(removed(again, complete=True))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(volumes.take_reports(), 0.1)
        assert "disk-1" in rig.drivers["d"].mounted
        rig.users = []
        assert await volumes.take_reports() == ["v1again"]
        assert rig.drivers["d"].mounted == {}
