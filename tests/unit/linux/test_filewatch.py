"""Waiting for changes where inotify is to be had, and where it is not."""

import asyncio
from pathlib import Path

import pytest

from skep.linux import filewatch
from skep.linux.filewatch import FileWatch


async def test_a_change_is_seen(tmp_path: Path) -> None:
    watch = FileWatch(tmp_path)
    (tmp_path / "a").touch()
    await asyncio.wait_for(watch.wait_changed(), 5)
    watch.close()


async def test_without_an_instance_of_inotify_it_is_looked_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(directory: Path) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(filewatch, "_watching", refuse)
    watch = FileWatch(tmp_path)
    await asyncio.wait_for(watch.wait_changed(), 5)
    watch.close()


async def test_a_directory_that_has_gone_is_no_error(tmp_path: Path) -> None:
    watch = FileWatch(tmp_path / "none")
    await asyncio.wait_for(watch.wait_changed(), 5)
    watch.close()
