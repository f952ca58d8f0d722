"""Volumes of plug-ins by Docker's protocol: what is asked of them, and what one that hangs or lies stops."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from skep.agent.executor.interface import Controller
from skep.agent.executor.oci import OciExecutor
from skep.api.http.server import application
from skep.engine.api.volumes import volume_routes
from skep.engine.volumes.volume_plugins import TIMES, PluginTimes, VolumePlugins
from skep.errors import SkepError
from skep.linux.mounting import mount_targets
from skep.model.container import Mount, VolumeOptions
from skep.model.values.meta import Driver
from skep.playground.images.busybox import busybox_archive
from tests.integration.node.conftest import eventually
from tests.integration.node.test_oci_tasks import a_task, output
from tests.support.engine.runc_lab import Lab
from tests.support.machines.plain_engine import docker, plain_engine
from tests.support.storage.volume_plugin import TestPlugin

Api = TestClient[Any, Any]


@pytest.fixture
def plugins(tmp_path: Path, request: pytest.FixtureRequest) -> VolumePlugins:
    times = getattr(request, "param", TIMES)
    return VolumePlugins(tmp_path / "sockets", (tmp_path / "specs",), times=times)


@pytest.fixture
async def disks(tmp_path: Path) -> AsyncIterator[TestPlugin]:
    async with TestPlugin(tmp_path / "disks").listening(tmp_path / "sockets" / "disks.sock") as plugin:
        yield plugin


@pytest.fixture
async def executor(lab: Lab, plugins: VolumePlugins) -> AsyncIterator[OciExecutor]:
    executor = lab.executor()
    executor.engine.volumes.plugins = plugins
    async with executor.running():
        yield executor


@pytest.fixture
async def api(executor: OciExecutor) -> AsyncIterator[Api]:
    engine = executor.engine
    async with TestClient(TestServer(application(volume_routes(engine.volumes, engine.list)))) as api:
        yield api


def of_plugin(source: str, *, driver: str = "disks", target: str = "/data", **options: str) -> Mount:
    given = VolumeOptions(driver_config=Driver(name=driver, options=options))
    return Mount(type="volume", source=source, target=target, volume_options=given)


async def refusal(executor: OciExecutor, mount: Mount) -> str:
    """Why a task with this mount does not run."""
    controller = executor.controller(a_task("true", mounts=(mount,)))
    try:
        return await _failure(_run(controller))
    finally:
        await controller.remove()


async def _run(controller: Controller) -> None:
    await controller.prepare()
    await controller.start()


async def test_a_task_has_a_plug_ins_volume_from_its_start_to_its_end(
    lab: Lab, executor: OciExecutor, disks: TestPlugin, plugins: VolumePlugins
) -> None:
    await plugins.scan()
    assert plugins.drivers == ["disks"]
    mount = of_plugin("one", size="5g")
    script = "echo kept >/data/file; sleep 100"
    first = executor.controller(a_task("sh", "-c", script, mounts=(mount,)))
    await first.prepare()
    assert (disks.methods, disks.volumes) == (["Create"], {"one": {"size": "5g"}})
    await first.start()
    file = disks.directory / "volumes/one/file"
    await eventually(file.exists, "the task writes to the plug-in's directory")
    assert await output(executor, a_task("cat", "/data/file", mounts=(mount,))) == "kept\n"
    assert disks.methods == ["Create", "Mount", "Mount", "Unmount"]
    ids = [asked["ID"] for method, asked in disks.calls if method == "VolumeDriver.Mount"]
    assert len(set(ids)) == 2
    assert {len(id) for id in ids} == {64}
    await first.terminate()
    await first.wait()
    await eventually(lambda: disks.mounts == {"one": set()}, "the last user is given back")
    assert str(executor.engine.volumes.path("one")) not in mount_targets()
    await first.remove()
    await executor.engine.volumes.remove("one", executor.engine.list)
    assert disks.volumes == {}
    assert lab.remains() == []


async def test_users_that_end_while_no_node_process_runs_are_given_back(
    lab: Lab, disks: TestPlugin, plugins: VolumePlugins
) -> None:
    task = a_task("sleep", "1000", mounts=(of_plugin("one"),))
    one = lab.executor()
    one.engine.volumes.plugins = plugins
    async with one.running():
        controller = one.controller(task)
        await controller.prepare()
        await controller.start()
        volumes = one.engine.volumes
        await volumes.mount("one that ends with the process", volumes.mount_points([of_plugin("one")], ()))
    assert len(disks.mounts["one"]) == 2
    other = lab.executor()
    other.engine.volumes.plugins = plugins
    async with other.running():
        await eventually(lambda: len(disks.mounts["one"]) == 1, "the ended user is given back")
        assert str(other.engine.volumes.path("one")) in mount_targets(), "the task has it"
        controller = other.controller(task)
        await controller.terminate()
        await controller.wait()
        await eventually(lambda: not disks.mounts["one"], "so is the other")
        await controller.remove()


async def test_a_plug_in_that_lies_fails_its_own_tasks_with_the_reason(
    tmp_path: Path, executor: OciExecutor, disks: TestPlugin
) -> None:
    assert "it has no room" in await refusal(executor, of_plugin("full", refuse="yes"))
    assert "full" not in executor.engine.volumes.names()
    (tmp_path / "link").symlink_to("/etc")
    (tmp_path / "own").symlink_to(executor.engine.volumes.directory)
    for response, said in (
        ("{", "its response cannot be read"),
        ("[]", "its response cannot be read"),
        ('{"Mountpoint": 7}', "its response cannot be read"),
        ("[" * 100_000, "its response cannot be read"),
        ("x" * (2 << 20), "its response is larger than 1048576 bytes"),
        (json.dumps({"Err": "the disk is on fire"}), "the disk is on fire"),
        (json.dumps({"Mountpoint": ""}), "returned no path for the volume"),
        (json.dumps({"Mountpoint": "volumes/one"}), "returned an invalid volume path"),
        (json.dumps({"Mountpoint": "/srv/../etc"}), "returned an invalid volume path"),
        (json.dumps({"Mountpoint": "/"}), "cannot be a volume: it leads to /"),
        (json.dumps({"Mountpoint": "/proc/1"}), "cannot be a volume: it leads to /proc/1"),
        (json.dumps({"Mountpoint": str(tmp_path / "link")}), "cannot be a volume: it leads to /etc"),
        (json.dumps({"Mountpoint": str(tmp_path / "own")}), "cannot be a volume: it leads to"),
        (json.dumps({"Mountpoint": str(tmp_path / "nosuch")}), "no such file or directory"),
        (json.dumps({"Mountpoint": "/etc/passwd"}), "not a directory"),
    ):
        disks.answers["VolumeDriver.Mount"] = response
        assert said in await refusal(executor, of_plugin("one")), response[:100]
    del disks.answers["VolumeDriver.Mount"]
    assert await output(executor, a_task("echo", "fine", mounts=(of_plugin("one"),))) == "fine\n"
    assert not disks.mounts["one"], "every failed user was given back"
    assert 'plugin "nosuch" not found' in await refusal(executor, of_plugin("two", driver="nosuch"))
    assert "needs a name" in await refusal(executor, of_plugin(""))
    executor.engine.volumes.ensure("mine")
    assert "driver 'local' already has volume 'mine'" in await refusal(executor, of_plugin("mine"))


@pytest.mark.parametrize("plugins", [PluginTimes(list_s=0.5, change_s=1.0)], indirect=True)
async def test_a_plug_in_that_hangs_stops_its_own_tasks_alone_and_is_left_alone_for_a_while(
    executor: OciExecutor, disks: TestPlugin, api: Api
) -> None:
    controller = executor.controller(a_task("true", mounts=(of_plugin("one"),)))
    await controller.prepare()
    disks.answers = {"VolumeDriver.Mount": None, "VolumeDriver.Unmount": None, "VolumeDriver.List": None}
    async with asyncio.TaskGroup() as group:
        start = group.create_task(_failure(controller.start()))
        assert await output(executor, a_task("echo", "hello", slot=99)) == "hello\n"
    assert "no response within 1 s" in start.result()
    asked = len(disks.calls)
    assert "does not respond; next attempt in" in await refusal(executor, of_plugin("one"))
    assert len(disks.calls) == asked
    executor.engine.volumes.plugins.known("disks").silent_until = 0.0  # type: ignore[union-attr]
    listed = await (await api.get("/v1.41/volumes")).json()
    assert [one["Name"] for one in listed["Volumes"]] == ["one"]
    (warning,) = listed["Warnings"]
    assert "no response within 0.5 s" in warning
    await controller.remove()


async def _failure(work: object) -> str:
    with pytest.raises(SkepError) as failed:
        await work  # type: ignore[misc]
    return str(failed.value)


async def test_volumes_of_plug_ins_are_made_listed_shown_and_removed(
    executor: OciExecutor, disks: TestPlugin, plugins: VolumePlugins, api: Api
) -> None:
    await plugins.scan()
    body = {"Name": "one", "Driver": "disks", "DriverOpts": {"size": "5g"}, "Labels": {"a": "b"}}
    made = await api.post("/volumes/create", json=body)
    assert made.status == 201
    shown = await (await api.get("/volumes/one")).json()
    assert {key: shown[key] for key in ("Driver", "Scope", "Options", "Labels", "Mountpoint", "Status")} == {
        "Driver": "disks",
        "Scope": "global",
        "Options": {"size": "5g"},
        "Labels": {"a": "b"},
        "Mountpoint": str(disks.directory / "volumes/one"),
        "Status": {"disks": 2},
    }
    disks.volumes["theirs"] = {}
    await api.post("/volumes/create", json={"Name": "mine"})
    for query, names in (
        ("", ["mine", "one", "theirs"]),
        ('?filters={"driver":["disks"]}', ["one", "theirs"]),
        ('?filters={"driver":["local"]}', ["mine"]),
    ):
        listed = await (await api.get(f"/volumes{query}")).json()
        assert sorted(one["Name"] for one in listed["Volumes"]) == names
    assert (await (await api.get("/volumes/theirs")).json())["Driver"] == "disks"
    clash = await api.post("/volumes/create", json={"Name": "mine", "Driver": "disks"})
    assert clash.status == 409
    unknown = await api.post("/volumes/create", json={"Name": "x1", "Driver": "nosuch"})
    assert unknown.status == 404
    await api.post("/volumes/prune", params={"filters": '{"all":["true"]}'})
    assert sorted(disks.volumes) == ["one", "theirs"], "what a plug-in has is not pruned"
    for name in ("one", "theirs"):
        assert (await api.delete(f"/volumes/{name}")).status == 204
    assert disks.volumes == {}
    await api.post("/volumes/create", json={"Name": "two", "Driver": "disks"})
    disks.answers["VolumeDriver.Remove"] = '{"Err": "it is busy"}'
    assert "it is busy" in (await (await api.delete("/volumes/two")).json())["message"]
    assert (await api.delete("/volumes/two?force=1")).status == 204
    assert executor.engine.volumes.names() == []


async def test_plug_ins_are_found_as_an_engine_finds_them(tmp_path: Path, plugins: VolumePlugins) -> None:
    specs = tmp_path / "specs"
    (specs / "deep").mkdir(parents=True)
    async with (
        TestPlugin(tmp_path / "a").listening(tmp_path / "sockets/deeper/deeper.sock"),
        TestPlugin(tmp_path / "b").listening(tmp_path / "b.sock"),
        TestPlugin(tmp_path / "c").listening(tmp_path / "sockets/net.sock") as network,
    ):
        network.answers["Plugin.Activate"] = '{"Implements": ["NetworkDriver"]}'
        (specs / "text.spec").write_text(f"unix://{tmp_path}/b.sock\n")
        (specs / "deep" / "deep.json").write_text(
            json.dumps({"Name": "x", "Addr": f"unix://{tmp_path}/b.sock"})
        )
        (specs / "broken.json").write_text("{")
        (specs / "odd.spec").write_text("no protocol")
        (specs / "away.spec").write_text(f"unix://{tmp_path}/nosuch.sock")
        await plugins.scan()
        assert plugins.drivers == ["deep", "deeper", "text"]
        (specs / "text.spec").unlink()
        await plugins.scan()
        assert plugins.drivers == ["deep", "deeper"]
        with pytest.raises(SkepError, match="does not implement VolumeDriver"):
            await plugins.get("net")


@pytest.mark.slow
@pytest.mark.needs("dockerd")
@pytest.mark.timeout(400)
async def test_a_plug_in_is_asked_what_an_engine_asks_it(
    tmp_path: Path, executor: OciExecutor, disks: TestPlugin, api: Api
) -> None:
    async with TestPlugin(tmp_path / "theirs").listening(tmp_path / "theirs.sock") as theirs:
        await asyncio.to_thread(_use_by_an_engine, tmp_path / "theirs.sock")
    options = {"size": "5g"}
    await api.post("/volumes/create", json={"Name": "one", "Driver": "disks", "DriverOpts": options})
    await output(executor, a_task("true", mounts=(of_plugin("one", **options),)))
    await api.delete("/volumes/one")
    assert disks.methods == theirs.methods == ["Create", "Mount", "Unmount", "Remove"]
    for plugin in (disks, theirs):  # ids are each engine's own
        for _, asked in plugin.calls:
            if "ID" in (asked or {}):
                assert len(asked["ID"]) == 64
                asked["ID"] = "id"  # type: ignore[index]
    bodies = [dict(plugin.calls) for plugin in (disks, theirs)]
    assert bodies[0].items() >= {key: body for key, body in bodies[1].items() if "Path" not in key}.items()


def _use_by_an_engine(plugin: Path) -> None:
    """Make a volume, use it in a container and remove it, by a real engine."""
    with plain_engine() as socket:
        assert docker(socket, "load", stdin=asyncio.run(busybox_archive()).data).returncode == 0
        specs = socket.parent / "etc" / "plugins"
        specs.mkdir()
        (specs / "disks.spec").write_text(f"unix://{plugin}")
        for words in (
            ("volume", "create", "-d", "disks", "-o", "size=5g", "one"),
            ("run", "--rm", "-v", "one:/data", "busybox:1", "true"),
            ("volume", "rm", "one"),
        ):
            done = docker(socket, *words)
            assert done.returncode == 0, done.stderr.decode()
