"""Waiting for changes where inotify is to be had, and where it is not."""

import asyncio
import resource
from pathlib import Path

from skep.linux.descriptors import lowest_free
from skep.linux.filewatch import FileWatch


async def test_a_change_is_seen(tmp_path: Path) -> None:
    watch = FileWatch(tmp_path)
    (tmp_path / "a").touch()
    await asyncio.wait_for(watch.wait_changed(), 5)
    watch.close()


async def test_without_an_instance_of_inotify_it_is_looked_now_and_then(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free(), hard))
    try:
        watch = FileWatch(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await asyncio.wait_for(watch.wait_changed(), 5)
    watch.close()


async def test_a_directory_that_has_gone_is_no_error(tmp_path: Path) -> None:
    watch = FileWatch(tmp_path / "none")
    await asyncio.wait_for(watch.wait_changed(), 5)
    watch.close()
