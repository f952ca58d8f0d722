"""Whichever call on a file fails while a node looks at itself: it tells nothing false, and the next look is whole."""

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec.structs import replace

from skep.configuration.configuration import Configuration
from skep.engine.capacity import Programs, capacity_of
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.containers.container import Container, ContainerState, ExecConfig, ProcessName
from skep.engine.containers.execs import Execs
from skep.engine.events import Events
from skep.engine.metrics import stats
from skep.engine.runtime.bundle import Bundles
from skep.engine.runtime.runtime import Runtime, StartedExec
from skep.engine.volumes.volume_plugins import VolumePlugins
from skep.engine.volumes.volumes import Volumes
from skep.errors import SkepError, Unavailable
from skep.linux.network.ports import read_listening_ports
from skep.model.values.ids import ContainerId
from skep.node.host.machine_resources import MachineResources, ResourceReader
from tests.support.engine.oci_rig import QuickClock
from tests.support.file_faults import Faults, walk
from tests.support.storage.volume_plugin import TestPlugin
from tests.unit.engine.test_specification import a_container

ROUTES = (
    "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n"
    "eth0\t0000A8C0\t00000000\t0001\t0\t0\t0\t0000FFFF\n"
)
SOCKETS = "sl local rem st\n0: 00000000:0016 00000000:0000 0A\n"
CDI = '{"cdiVersion": "0.5.0", "kind": "vendor.com/gpu", "devices": [{"name": "one", "containerEdits": {}}]}'


def a_machine(directory: Path) -> None:
    for path, content in (
        ("proc/net/route", ROUTES),
        ("proc/net/tcp", SOCKETS),
        ("proc/sys/net/ipv4/ip_local_port_range", "40000 50000\n"),
        ("cdi/gpu.json", CDI),
        ("dev/serial/.keep", ""),
    ):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(content)


def is_usb(path: str) -> bool:
    """Instead of the rule for what is below /dev."""
    return path.endswith("usb0")


async def test_offers_of_a_machine_that_cannot_be_read_are_not_taken_for_gone(tmp_path: Path) -> None:
    a_machine(tmp_path / "template")

    async def life(place: Path, faults: Faults) -> None:
        os.mknod(place / "dev/serial/usb0", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        configuration = Configuration(cdi_spec_dirs=(place / "cdi",))
        ports = partial(read_listening_ports, place / "proc/net", place / "proc/sys/net/ipv4", None)
        reader = ResourceReader(
            QuickClock(), lambda: configuration, place / "dev", place / "proc", ports, is_usb
        )
        await reader.refresh()
        first = reader.present
        await reader.refresh()
        for name in MachineResources.__struct_fields__:
            assert getattr(first, name) in (
                getattr(MachineResources(), name),
                getattr(reader.present, name),
            ), name
        faults.end()
        await reader.refresh()
        present = reader.present
        assert present.devices == (f"{place}/dev/serial/usb0",)
        assert present.cdi_devices == ("vendor.com/gpu=one",)
        assert [str(route.subnet) for route in present.routes] == ["192.168.0.0/16"]
        assert present.listening == {("tcp", 22)}

    assert await walk(tmp_path / "lives", life, template=tmp_path / "template") > 20


@pytest.fixture
async def plugin(tmp_path: Path) -> AsyncIterator[TestPlugin]:
    """It listens beside the directories in which calls fail; ``template`` names it in both ways."""
    server, template = TestPlugin(tmp_path / "disks"), tmp_path / "template"
    for name in ("sockets", "specs"):
        (template / name).mkdir(parents=True)
    (template / "sockets/disks.sock").symlink_to(tmp_path / "disks.sock")
    (template / "specs/named.spec").write_text(f"unix://{tmp_path}/disks.sock")
    async with server.listening(tmp_path / "disks.sock"):
        yield server


async def test_what_never_can_be_read_keeps_no_other_from_being_found(
    tmp_path: Path, plugin: TestPlugin
) -> None:
    """Links that lead to themselves, here: of a plug-in that is badly installed, or a mount that is broken."""
    a_machine(tmp_path / "template")
    place = tmp_path / "template"
    for loop in ("sockets/bad.sock", "specs/worse", "dev/serial/broken", "cdi/broken.json"):
        (place / loop).symlink_to(place / loop)
    os.mknod(place / "dev/serial/usb0", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    plugins = VolumePlugins(place / "sockets", (place / "specs",), QuickClock())
    await plugins.scan()
    assert plugins.drivers == ["disks", "named"]
    configuration = Configuration(cdi_spec_dirs=(place / "cdi",))
    reader = ResourceReader(
        QuickClock(), lambda: configuration, place / "dev", place / "proc", may_have=is_usb
    )
    await reader.refresh()
    assert reader.present.devices == (f"{place}/dev/serial/usb0",)
    assert reader.present.cdi_devices == ("vendor.com/gpu=one",)


async def test_volume_plug_ins_that_cannot_be_looked_for_are_not_taken_for_gone(
    tmp_path: Path, plugin: TestPlugin
) -> None:
    async def life(place: Path, faults: Faults) -> None:
        plugins = VolumePlugins(place / "sockets", (place / "specs",), QuickClock())
        await plugins.scan()
        first = plugins.drivers
        await plugins.scan()
        assert set(first) <= set(plugins.drivers)
        faults.end()
        await plugins.scan()
        assert plugins.drivers == ["disks", "named"]

    assert await walk(tmp_path / "lives", life, template=tmp_path / "template") > 10


@pytest.mark.parametrize("is_to_go", [False, True])
@pytest.mark.parametrize(
    ("driver", "options"),
    [("disks", {}), ("local", {"type": "tmpfs", "device": "tmpfs"})],
    ids=["plug-in", "options"],
)
async def test_a_volume_that_is_elsewhere_is_whole_or_not_there(
    tmp_path: Path, plugin: TestPlugin, driver: str, options: dict[str, str], is_to_go: bool
) -> None:
    """Without the file that says so it would be a plain one, and empty."""

    async def life(place: Path, faults: Faults) -> None:
        plugins = VolumePlugins(place / "sockets", (place / "specs",), QuickClock())
        volumes = Volumes(place / "volumes", plugins=plugins)
        is_made = is_removed = False
        with suppress(SkepError, OSError):
            await volumes.create("data", driver, {}, options)
            is_made = True
        if is_to_go:
            with suppress(SkepError, OSError):
                await volumes.remove("data", list)
                is_removed = True
        faults.end()
        later = Volumes(place / "volumes", plugins=plugins)
        if not is_to_go:
            assert not is_made or "data" in later.names(), "it was acknowledged"
        assert not is_removed or "data" not in later.names(), "it was acknowledged"
        if "data" in later.names():
            assert (later.driver("data"), later.options("data")) == (driver, options)
        await later.create("data", driver, {}, options)
        assert (later.driver("data"), later.options("data")) == (driver, options)
        await later.remove("data", list, force=True)
        assert not plugin.volumes
        assert "data" not in later.names()

    assert await walk(tmp_path / "lives", life, template=tmp_path / "template") > 10


async def test_statistics_that_cannot_be_read_are_an_error_and_no_zeros(tmp_path: Path) -> None:
    files = {
        "cpu.stat": "usage_usec 5\n",
        "memory.current": "7\n",
        "memory.max": "max\n",
        "pids.current": "3\n",
    }
    template = tmp_path / "template"
    template.mkdir()
    for name, content in files.items():
        (template / name).write_text(content)
    running = replace(
        a_container(), state=ContainerState.RUNNING, process=ProcessName(os.getpid(), 1, "boot")
    )

    async def life(place: Path, faults: Faults) -> None:
        cgroups = cast("Cgroups", SimpleNamespace(is_v2=True, directory=lambda *_: place))
        before = len(os.listdir("/proc/self/fd"))
        found = None
        with suppress(Unavailable):
            found = stats.sample(running, cgroups, 1)
        assert len(os.listdir("/proc/self/fd")) == before
        faults.end()
        whole = stats.sample(running, cgroups, 1)
        assert (whole.memory_stats.usage, whole.pids_stats.current) == (7, 3)
        assert found is None or found.memory_stats == whole.memory_stats

    assert await walk(tmp_path / "lives", life, template=template) > 3


class Processes:
    """Starts execs that end at once."""

    def expect_exec(self) -> None:
        pass

    async def exec(self, container: Container, exec_id: str, path: Path, **_: Any) -> StartedExec:
        (path / container.id).write_text("0")
        return StartedExec(1, None, cast("Any", SimpleNamespace(close=lambda: None)))

    async def wait_exec(self, container: Container, path: Path, monitor: ProcessName | None) -> int:
        return int((path / container.id).read_text())


async def test_an_exec_that_fails_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    running = replace(a_container(), id=ContainerId("c" * 64), state=ContainerState.RUNNING)

    async def life(place: Path, faults: Faults) -> None:
        cgroups = Cgroups("none")
        capacity = capacity_of(cgroups, Programs())
        bundles = Bundles(place / "containers", place / "bundles", cgroups, capacity, place / "resolv.conf")
        tasks: list[asyncio.Task[None]] = []

        def spawn(work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
            tasks.append(asyncio.create_task(work, name=name))
            return tasks[-1]

        execs = Execs(
            bundles,
            cast("Runtime", Processes()),
            Events(QuickClock()),
            QuickClock(),
            container=lambda _: running,
            spawn=spawn,
        )
        first = execs.create(running.id, ExecConfig(command=("true",)))
        with suppress(SkepError, OSError):
            await execs.start(first)
        code = (await execs.wait(first)).exit_code
        assert code in (0, 126)
        await asyncio.gather(*tasks)
        faults.end()
        second = execs.create(running.id, ExecConfig(command=("true",)))
        await execs.start(second)
        assert (await execs.wait(second)).exit_code == 0
        await asyncio.gather(*tasks)
        left = [path.name for path in bundles.exec_path(running.id, "").iterdir()]
        assert not left or (code == 0 and faults.hits), "only a removal that failed leaves something"

    assert await walk(tmp_path / "lives", life) > 3
