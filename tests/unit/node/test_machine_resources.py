"""What a node reads of its machine's files, and when it reads it again."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skep.aio.clock import SystemClock
from skep.configuration.configuration import Configuration
from skep.engine.confinement.cdi import Described, Edits
from skep.node.host import machine_resources
from skep.node.host.machine_resources import ResourceReader


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read: ``devices`` by a walk, ``cdi`` from files; the threads are asserted not to be the loop's."""
    found: list[str] = []
    loop_thread = threading.get_ident()

    def devices(dev: Path, _failed: Any) -> Iterator[str]:
        assert threading.get_ident() != loop_thread
        found.append("devices")
        yield from (f"/dev/{name}" for name in sorted(os.listdir(dev)))

    def described(directories: Any, _failed: Any) -> dict[str, Described]:
        assert threading.get_ident() != loop_thread
        found.append("cdi")
        return {
            f"vendor.com/class={path.stem}": Described(
                edits=Edits(env=(path.stem,)), file=path, shared=Edits()
            )
            for one in directories
            for path in one.iterdir()
        }

    monkeypatch.setattr(machine_resources, "device_paths", devices)
    monkeypatch.setattr(machine_resources, "described", described)
    return found


async def test_devices_are_read_in_a_thread_and_again_only_when_they_have_changed(
    tmp_path: Path, walks: list[str]
) -> None:
    dev, cdi = tmp_path / "dev", tmp_path / "cdi"
    for path in (dev, dev / "serial", cdi):
        path.mkdir()
        os.utime(path, (1, 1))
    reader = ResourceReader(SystemClock(), lambda: Configuration(cdi_spec_dirs=(cdi,)), dev)
    for _ in range(3):
        await reader.refresh()
    assert walks == ["devices", "cdi"]
    (dev / "serial/by-id").mkdir()
    (dev / "ttyUSB0").touch()
    await reader.refresh()
    assert walks == ["devices", "cdi", "devices"]
    assert "/dev/ttyUSB0" in reader.present.devices
    (cdi / "gpu.json").write_text("{}")
    await reader.refresh()
    assert reader.present.cdi_devices == ("vendor.com/class=gpu",)
    os.utime(cdi / "gpu.json", (1, 1))
    await reader.refresh()
    await reader.refresh()
    assert walks == ["devices", "cdi", "devices", "cdi", "cdi"]


async def test_a_node_without_containers_reads_no_devices(tmp_path: Path, walks: list[str]) -> None:
    reader = ResourceReader(SystemClock(), lambda: Configuration(executor="process"), tmp_path)
    await reader.refresh()
    assert walks == []
    assert reader.present.devices == ()


async def test_devices_are_offered_again_when_containers_run_again(tmp_path: Path, walks: list[str]) -> None:
    dev, cdi = tmp_path / "dev", tmp_path / "cdi"
    for path in (dev, cdi):
        path.mkdir()
    (dev / "ttyUSB0").touch()
    (cdi / "gpu.json").write_text("{}")
    configured = [Configuration(executor=name, cdi_spec_dirs=(cdi,)) for name in ("oci", "process", "oci")]
    reader = ResourceReader(SystemClock(), lambda: configured[0], dev)
    found = []
    while configured:
        await reader.refresh()
        found.append((reader.present.devices, reader.present.cdi_devices))
        del configured[0]
    offered = (("/dev/ttyUSB0",), ("vendor.com/class=gpu",))
    assert found == [offered, ((), ()), offered]


class SetClock(SystemClock):
    def __init__(self) -> None:
        self.time = 0.0

    def monotonic(self) -> float:
        return self.time


async def test_a_described_device_stays_counted_while_its_description_is_written_anew(
    tmp_path: Path, walks: list[str]
) -> None:
    clock, cdi = SetClock(), tmp_path / "cdi"
    for path in (cdi, tmp_path / "dev"):
        path.mkdir()
    reader = ResourceReader(clock, lambda: Configuration(cdi_spec_dirs=(cdi,)), tmp_path / "dev")
    (cdi / "gpu.json").touch()
    await reader.refresh()
    assert reader.present.cdi_units == ("vendor.com/class=gpu",)
    (cdi / "gpu.json").unlink()
    for time, units in ((30.0, ("vendor.com/class=gpu",)), (59.0, ("vendor.com/class=gpu",)), (61.0, ())):
        clock.time = time
        await reader.refresh()
        assert (reader.present.cdi_devices, reader.present.cdi_units) == ((), units), time
    assert walks.count("cdi") == 2
