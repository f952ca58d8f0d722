"""Volumes that are removed while containers are made of them, and while those that remove them go away."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request
from aiohttp.web import StreamResponse

from skep.api.http.server import application
from skep.engine.api import volumes as routes
from skep.engine.containers.container import Container, ContainerConfig, MountPoint
from skep.engine.engine import Engine
from skep.engine.volumes.volume_plugins import VolumePlugins
from skep.engine.volumes.volumes import Listing, VolumeInUse, Volumes
from skep.errors import NotFound
from skep.linux import trees
from skep.model.container import Mount
from tests.support.engine.oci_rig import Machine, memory_engine
from tests.support.engine.stub_engine import ID, a_container
from tests.support.file_faults import file_faults
from tests.support.managers.wire_rig import until
from tests.support.storage.volume_plugin import TestPlugin

DATA = Mount(type="volume", source="data", target="/data")


@pytest.fixture
def volumes(tmp_path: Path) -> Volumes:
    volumes = Volumes(tmp_path / "volumes")
    (volumes.ensure("data") / "old").write_text("data")
    return volumes


class Gate:
    """Trees are removed once it is open."""

    def __init__(self) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()

    def open(self) -> None:
        self._opened.set()

    def remove_tree(self, path: Path, stop: threading.Event | None = None, keep: str = "") -> None:
        self.reached.set()
        while not self._opened.wait(0.005):
            if stop is not None and stop.is_set():
                raise trees.RemovalStopped
        remove_tree(path, stop, keep)


remove_tree = trees.remove_tree


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(trees, "remove_tree", gate.remove_tree)
    yield gate
    gate.open()


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    engine = memory_engine(tmp_path, Machine())
    (engine.volumes.ensure("data") / "old").write_text("data")
    async with engine.running():
        yield engine


async def removed(volumes: Volumes, containers: Listing = list) -> StreamResponse:
    """The response to ``DELETE /volumes/data``."""
    request = make_mocked_request("DELETE", "/volumes/data", match_info={"name": "data"})
    return await routes.remove_volume(routes.VolumeRoutes(volumes, containers), request)


def a_user(name: str = "data") -> Container:
    mount = MountPoint(type="volume", name=name, destination="/data", anonymous=True)
    return msgspec.structs.replace(a_container(), config=ContainerConfig(path="sh", mounts=(mount,)))


async def test_a_container_has_a_new_volume_while_the_old_one_is_emptied(
    volumes: Volumes, gate: Gate
) -> None:
    removal = asyncio.create_task(removed(volumes))
    await until(gate.reached.is_set)
    assert volumes.names() == []
    (point,) = volumes.mount_points([DATA], ())
    new = Path(point.source) / "new"
    new.write_text("data")
    gate.open()
    assert (await removal).status == 204
    assert [entry.name for entry in new.parent.iterdir()] == ["new"]
    assert [entry.name for entry in new.parent.parent.parent.iterdir()] == ["data"]
    actions = [event.action for event in volumes.events.recent(0)]
    assert actions == ["create", "destroy", "create"]


async def test_a_volume_whose_removal_is_given_up_goes_whole(engine: Engine, gate: Gate) -> None:
    removal = asyncio.create_task(removed(engine.volumes, engine.list))
    await until(gate.reached.is_set)
    removal.cancel()
    await asyncio.wait([removal])
    assert removal.cancelled()
    assert engine.volumes.names() == []
    gate.open()
    await until(lambda: not list(engine.volumes.directory.iterdir()))


async def test_what_an_earlier_process_has_not_deleted_is_no_volume_and_goes(
    tmp_path: Path, gate: Gate
) -> None:
    engine = memory_engine(tmp_path, Machine())
    engine.volumes.ensure("data")
    removal = asyncio.create_task(removed(engine.volumes))
    await until(gate.reached.is_set)
    (left,) = engine.volumes.directory.iterdir()
    removal.cancel()
    await asyncio.wait([removal])
    assert left.exists()
    assert not engine.volumes.has(left.name)
    assert engine.volumes.names() == []
    with pytest.raises(NotFound):
        await routes.inspected_volume(engine.volumes, left.name)
    gate.open()
    async with engine.running():
        await until(lambda: not left.exists())


async def test_a_volume_stays_that_a_container_has_by_the_time_it_would_go(volumes: Volumes) -> None:
    containers: list[Container] = []
    async with volumes.lock_of("data"):
        removal = asyncio.create_task(removed(volumes, lambda: containers))
        await asyncio.wait([removal], timeout=0)
        containers.append(a_user())
    with pytest.raises(VolumeInUse, match=rf"remove data: volume is in use - \[{ID}\]"):
        await removal
    assert (volumes.path("data") / "old").exists()


async def test_a_volume_that_is_unmounted_for_its_removal_stays_if_a_container_comes(tmp_path: Path) -> None:
    begun, go_on = tmp_path / "begun", tmp_path / "go-on"
    unmount = ("sh", "-c", f"touch {begun}; while [ ! -e {go_on} ]; do sleep 0.01; done")
    volumes = Volumes(tmp_path / "volumes", command=unmount, is_mount_point=lambda _: not go_on.exists())
    volumes.ensure("data", None, {"type": "tmpfs", "device": "tmpfs"})
    containers: list[Container] = []
    removal = asyncio.create_task(removed(volumes, lambda: containers))
    await until(begun.exists)
    containers.append(a_user())
    go_on.touch()
    with pytest.raises(VolumeInUse):
        await removal
    assert volumes.options("data") == {"type": "tmpfs", "device": "tmpfs"}


async def test_a_plug_in_is_not_asked_to_remove_what_a_container_has(tmp_path: Path) -> None:
    async with TestPlugin(tmp_path / "disks").listening(tmp_path / "sockets" / "disks.sock") as plugin:
        volumes = Volumes(tmp_path / "volumes", plugins=VolumePlugins(tmp_path / "sockets", ()))
        await volumes.create("data", "disks", {}, {})
        with pytest.raises(VolumeInUse):
            await volumes.remove("data", lambda: [a_user()], force=True)
        assert plugin.methods == ["Create"]
        await volumes.remove("data", list)
        assert plugin.methods == ["Create", "Remove"]
        assert volumes.names() == []


async def test_an_anonymous_volume_stays_as_long_as_another_container_has_it(volumes: Volumes) -> None:
    points = a_user().config.mounts
    await volumes.remove_anonymous(points, lambda: [a_user()])
    assert (volumes.path("data") / "old").exists()
    await volumes.remove_anonymous(points, lambda: [a_user("other")])
    assert volumes.names() == []


async def test_pruning_leaves_a_volume_that_a_container_has_by_then(volumes: Volumes, tmp_path: Path) -> None:
    (volumes.ensure("free") / "file").write_text("free")
    containers: list[Container] = []

    def create_first(_call: str, path: Path) -> None:
        if path == volumes.path("data"):
            containers[:] = [a_user()]

    app = application(routes.volume_routes(volumes, lambda: containers))
    async with TestClient(TestServer(app)) as api:
        twice = await api.post('/v1.42/volumes/prune?filters={"all":["1","true"]}')
        refusal = "invalid filter 'all=[1 true]': only one value is expected"
        assert (twice.status, (await twice.json())["message"]) == (400, refusal)
        assert containers == []
        with file_faults(tmp_path) as faults:
            faults.before_each = create_first
            response = await api.post('/v1.42/volumes/prune?filters={"all":["1"]}')
        assert await response.json() == {"VolumesDeleted": ["free"], "SpaceReclaimed": 4}
    assert volumes.names() == ["data"]
