"""Devices of the machine that a container is given."""

import os
from pathlib import Path

import pytest

from skep.engine.confinement.devices import device_paths, look_up
from skep.engine.confinement.machine import DeviceMapping, MachineOptions
from skep.errors import FailedPrecondition


def test_devices_are_listed_with_the_links_that_name_them(tmp_path: Path) -> None:
    (tmp_path / "serial" / "by-id").mkdir(parents=True)
    (tmp_path / "pts").mkdir()
    (tmp_path / "plain").touch()
    for path in ("ttyUSB0", "pts/0"):
        os.mknod(tmp_path / path, 0o20600, os.makedev(1, 3))
    (tmp_path / "serial" / "by-id" / "adapter").symlink_to("../../ttyUSB0")
    (tmp_path / "gone").symlink_to("nosuch")
    failed: list[OSError] = []
    shown = [path.removeprefix(f"{tmp_path}/") for path in device_paths(tmp_path, failed.append)]
    assert shown == ["ttyUSB0", "serial/by-id/adapter"]


def test_a_link_stands_for_its_device(tmp_path: Path) -> None:
    (tmp_path / "adapter").symlink_to("/dev/null")
    (node,) = look_up(
        MachineOptions(devices=(DeviceMapping(path_on_host=str(tmp_path / "adapter")),)), ()
    ).nodes
    assert (node.path, node.type, node.major, node.minor, node.access) == (
        str(tmp_path / "adapter"),
        "c",
        1,
        3,
        "rwm",
    )


def test_a_directory_with_too_many_files_is_refused(tmp_path: Path) -> None:
    for number in range(10_001):
        (tmp_path / str(number)).touch()
    with pytest.raises(FailedPrecondition, match="more than 10000 files are in this directory"):
        look_up(MachineOptions(devices=(DeviceMapping(path_on_host=str(tmp_path)),)), ())
