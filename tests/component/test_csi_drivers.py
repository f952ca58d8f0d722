"""Calls of a CSI driver in a process of its own, by another implementation of gRPC."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.csi import csi_pb2 as pb
from skep.csi.driver import call, discrepancy
from skep.csi.drivers import Drivers
from skep.errors import NotFound, SkepError, Unavailable
from skep.model.node import Topology
from skep.model.values.ids import VolumeId
from skep.model.values.meta import Driver
from skep.model.volume import (
    AccessMode,
    CapacityRange,
    TopologyRequirement,
    TypeBlock,
    TypeMount,
    Volume,
    VolumeAssignment,
    VolumeInfo,
    VolumeSpec,
)
from skep.rpc import frames
from tests.support.storage.csi_driver import NAME
from tests.support.storage.csi_storage import Storage

pytestmark = pytest.mark.needs("root")
MODE = AccessMode(mount_volume=TypeMount())
A = Topology(segments={"zone": "a"})


class Process:
    """A running driver, and its storage."""

    def __init__(self, folder: Path) -> None:
        self.sockets, self.storage = folder / "sockets", folder / "storage"
        self.storage.mkdir()

    def state(self) -> Storage:
        return Storage(json.loads((self.storage / "state.json").read_text()))

    def faults(self, **faults: Any) -> None:
        (self.storage / "faults.json").write_text(json.dumps(faults))


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Process]:
    made = Process(tmp_path)
    command = [sys.executable, "-m", "tests.support.storage.csi_driver", str(made.sockets / "d.sock")]
    with subprocess.Popen([*command, str(made.storage), "node-1", "a"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield made
        process.kill()


def a_volume(name: str = "data", **spec: Any) -> Volume:
    return Volume(
        id=VolumeId("v1"), spec=VolumeSpec(name=name, driver=Driver(name=NAME), access_mode=MODE, **spec)
    )


async def test_a_volume_goes_through_its_life(driver: Process, tmp_path: Path) -> None:
    drivers = Drivers(driver.sockets, SystemClock())
    disks = await drivers.get(NAME)
    with pytest.raises(NotFound, match='driver "other" not found'):
        await drivers.get("other")
    info = await disks.node_info()
    assert (info.node_id, info.accessible_topology) == ("node-1", A)
    where = TopologyRequirement(requisite=(A,))
    volume = a_volume(capacity_range=CapacityRange(required_bytes=7), accessibility_requirements=where)
    made = await disks.create(volume, {"user": "me"})
    assert (made.capacity_bytes, made.accessible_topology) == (7, (A,))
    assert made.volume_context == {"secrets": "user=me"}
    assert await disks.create(volume, {"user": "me"}) == made
    volume = Volume(id=volume.id, spec=volume.spec, info=made)
    context = await disks.publish(volume, "node-1", {})
    assigned = VolumeAssignment(
        id=volume.id, volume_id=made.volume_id, publish_context=context, access_mode=MODE
    )
    staging, target = tmp_path / "staging", tmp_path / "mount"
    staging.mkdir()
    for _ in range(2):
        await disks.node_publish(assigned, staging, target, {})
    (target / "file").write_text("kept")
    assert (driver.storage / made.volume_id / "file").read_text() == "kept"
    for _ in range(2):
        await disks.node_unpublish(made.volume_id, staging, target)
    assert not target.exists()
    for _ in range(2):
        await disks.unpublish(made.volume_id, "node-1", {})
    for _ in range(2):
        await disks.delete(made.volume_id, {})
    state = driver.state()
    assert (state.volumes, state.violations, state.created) == ({}, [], ["data"])


async def test_a_block_volume_is_a_device_at_its_target(driver: Process, tmp_path: Path) -> None:
    disks = await Drivers(driver.sockets, SystemClock()).get(NAME)
    mode = AccessMode(block_volume=TypeBlock())
    volume = a_volume()
    volume = replace(volume, spec=replace(volume.spec, access_mode=mode))
    volume = replace(volume, info=await disks.create(volume, {}))
    assert volume.info is not None
    context = await disks.publish(volume, "node-1", {})
    id = volume.info.volume_id
    assigned = VolumeAssignment(id=volume.id, volume_id=id, publish_context=context, access_mode=mode)
    staging, target = tmp_path / "staging", tmp_path / "mount"
    staging.mkdir()
    for _ in range(2):
        await disks.node_publish(assigned, staging, target, {})
    assert target.is_block_device()
    with target.open("wb") as device:
        device.write(b"written")
    assert (driver.storage / id / "disk").read_bytes()[:7] == b"written"
    for _ in range(2):
        await disks.node_unpublish(id, staging, target)
    assert not target.exists()
    assert list(driver.storage.glob("*.loop")) == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"id": ""}, "no usable volume id"),
        ({"id": "x" * 257}, "no usable volume id"),
        ({"size": -1}, "invalid numbers"),
        ({"zone": "z" * 9000}, "more than 8192 bytes"),
        ({"fail": 1}, "CreateVolume: CreateVolume fails"),
    ],
)
async def test_what_a_driver_says_is_checked(driver: Process, fault: dict[str, Any], words: str) -> None:
    disks = await Drivers(driver.sockets, SystemClock()).get(NAME)
    driver.faults(CreateVolume=fault)
    with pytest.raises(SkepError, match=words):
        await disks.create(a_volume(), {})


def test_a_volume_that_is_not_as_requested_is_recognized() -> None:
    asked = a_volume(
        capacity_range=CapacityRange(required_bytes=5, limit_bytes=9),
        accessibility_requirements=TopologyRequirement(requisite=(A,)),
    )
    made = VolumeInfo(volume_id="x", capacity_bytes=7, accessible_topology=(A,))
    assert discrepancy(asked, made) == ""
    assert discrepancy(asked, replace(made, capacity_bytes=0)) == ""
    assert "5 are required" in discrepancy(asked, replace(made, capacity_bytes=4))
    assert "the limit is 9" in discrepancy(asked, replace(made, capacity_bytes=10))
    elsewhere = Topology(segments={"zone": "b"})
    assert "topologies" in discrepancy(asked, replace(made, accessible_topology=(elsewhere,)))


async def test_a_driver_that_hangs_ends_at_the_deadline_and_holds_up_no_other_call(
    driver: Process,
) -> None:
    disks = await Drivers(driver.sockets, SystemClock()).get(NAME)
    await disks.create(a_volume("first"), {})
    driver.faults(CreateVolume={"hang": 30})
    with pytest.raises(Unavailable, match="did not respond in time"):
        await disks.call(
            "Controller/CreateVolume",
            pb.CreateVolumeRequest(name="x"),
            pb.CreateVolumeResponse,
            0.2,
        )
    assert (await disks.node_info()).node_id == "node-1"


async def test_sockets_that_are_no_drivers_are_passed_over(driver: Process) -> None:
    (driver.sockets / "no.sock").write_text("")
    (driver.sockets / "folder").mkdir()
    (driver.sockets / "folder" / "csi.sock").symlink_to(driver.sockets / "d.sock")
    drivers = Drivers(driver.sockets, SystemClock())
    assert list(await drivers.all()) == [NAME]
    (driver.sockets / "d.sock").unlink()
    assert await drivers.all() == {}


@contextmanager
def another(driver: Process, socket: Path) -> Iterator[None]:
    """A second driver of the same name, at ``socket``."""
    command = [
        sys.executable,
        "-m",
        "tests.support.storage.csi_driver",
        str(socket),
        str(driver.storage),
        "node-1",
        "a",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


async def test_a_folder_is_a_name(driver: Process) -> None:
    """It gets the secrets of that driver's volumes, so it may not say that it is another."""
    drivers = Drivers(driver.sockets, SystemClock())
    with another(driver, driver.sockets / "aaa" / "csi.sock"):
        disks = await drivers.get(NAME)
        (driver.sockets / "d.sock").unlink()
        assert await drivers.all() == {}
    with another(driver, driver.sockets / NAME / "csi.sock"):
        assert await drivers.get(NAME) is not disks


async def test_the_first_driver_of_a_name_stays_and_one_called_by_it_comes_before(driver: Process) -> None:
    drivers = Drivers(driver.sockets, SystemClock())
    first = await drivers.get(NAME)
    with another(driver, driver.sockets / "aaa.sock"):
        assert (await drivers.all())[NAME] is first
        assert (await Drivers(driver.sockets, SystemClock()).get(NAME)).socket == first.socket
        os.chmod(driver.sockets / "d.sock", 0o600)  # it is made anew for who goes by the time alone
        with another(driver, driver.sockets / f"{NAME}.sock"):
            assert (await drivers.all())[NAME].socket == driver.sockets / f"{NAME}.sock"


class SetClock(SystemClock):
    """Its time is what the test says."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


async def test_a_driver_whose_socket_is_older_but_that_gives_its_name_later_takes_nothing(
    driver: Process,
) -> None:
    clock = SetClock()
    drivers = Drivers(driver.sockets, clock)
    driver.faults(GetPluginInfo={"refuse": "still starting"})
    assert await drivers.all() == {}
    driver.faults()
    with another(driver, driver.sockets / "later.sock"):
        first = await drivers.get(NAME)
        assert first.socket == driver.sockets / "later.sock"
        clock.now += 30.0  # the older one is asked again
        assert (await drivers.all())[NAME] is first


@asynccontextmanager
async def a_silent_socket(path: Path, greeting: bytes = b"") -> AsyncIterator[asyncio.Queue[Any]]:
    """Accepts connections, says ``greeting`` and nothing more, and reads nothing; gives the connections."""
    accepted: asyncio.Queue[Any] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        accepted.put_nowait((reader, writer))

    server = await asyncio.start_unix_server(accept, path, limit=1024)
    try:
        yield accepted
    finally:
        server.close()
        while not accepted.empty():
            accepted.get_nowait()[1].transport.abort()


async def test_a_socket_that_gives_no_name_holds_up_no_other_driver(driver: Process) -> None:
    drivers = Drivers(driver.sockets, SystemClock())
    disks = await drivers.get(NAME)
    async with a_silent_socket(driver.sockets / "silent.sock") as accepted:
        looking = asyncio.create_task(drivers.all())
        connection = await accepted.get()
        assert await drivers.get(NAME) is disks
        assert not looking.done()
        connection[1].transport.abort()
        assert list(await looking) == [NAME]


async def test_nothing_is_left_of_a_call_to_a_driver_that_does_not_read(tmp_path: Path) -> None:
    greeting = frames.settings({frames.INITIAL_WINDOW_SIZE: 2**30}) + frames.window_update(0, 2**30)
    size = 4 * 1024 * 1024
    async with a_silent_socket(tmp_path / "d.sock", greeting) as accepted:
        request = pb.CreateVolumeRequest(name="x" * size)
        with pytest.raises(Unavailable, match="did not respond in time"):
            await call(tmp_path / "d.sock", "Controller/CreateVolume", request, pb.CreateVolumeResponse, 0.5)
        reader, _ = accepted.get_nowait()
        received = 0
        with suppress(ConnectionError):
            while data := await reader.read(64 * 1024):
                received += len(data)
        assert received < size


async def test_an_error_of_a_driver_shows_neither_its_secrets_nor_what_a_terminal_would_obey(
    driver: Process,
) -> None:
    disks = await Drivers(driver.sockets, SystemClock()).get(NAME)
    driver.faults(
        CreateVolume={"refuse": "cannot log in:\n\x1b[2J{'password': 'correct horse', 'user': 'me'}"}
    )
    with pytest.raises(SkepError) as raised:
        await disks.create(a_volume(), {"password": "correct horse\n", "user": "me"})
    assert str(raised.value).endswith("cannot log in: [2J{'password': '***', 'user': 'me'}")
