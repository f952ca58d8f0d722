"""Mounts of containers and builds are removed, wherever their files are."""

import os
from pathlib import Path

from skep.engine.containers.image_mounts import unmount_all
from skep.linux.mounting import is_target
from skep.linux.syscalls import MS_BIND, mount, unmount_if_mounted


def a_bind(source: Path, target: Path) -> Path:
    """Bind a directory or file at a place of the same file system, where ``os.path.ismount`` does not see it."""
    mount(str(source), target, None, MS_BIND)
    assert is_target(target)
    assert not os.path.ismount(target)
    return target


def test_a_bind_within_one_file_system_is_unmounted(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for directory in (source, target):
        directory.mkdir()
    a_bind(source, target)
    mount(str(source), target, None, MS_BIND)  # twice: the second covers the first
    unmount_if_mounted(target)
    assert not is_target(target)


def test_bound_files_and_directories_of_images_are_unmounted(tmp_path: Path) -> None:
    source, place = tmp_path / "source", tmp_path / "place"
    source.mkdir()
    place.mkdir()
    (source / "file").write_text("content")
    (place / "0").mkdir()
    (place / "0.part").touch()
    a_bind(source, place / "0")
    a_bind(source / "file", place / "0.part")
    unmount_all(place)
    assert not is_target(place / "0")
    assert not is_target(place / "0.part")
    assert (source / "file").read_text() == "content"


def test_what_is_not_mounted_or_not_there_stays_as_it_is(tmp_path: Path) -> None:
    unmount_if_mounted(tmp_path)
    unmount_if_mounted(tmp_path / "missing")
    unmount_all(tmp_path / "missing")
    assert tmp_path.is_dir()
