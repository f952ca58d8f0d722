"""What a node says of a disk that it cannot write to."""

import asyncio
import errno
import threading
from pathlib import Path

import pytest

from skep.aio.clock import SystemClock
from skep.manager.process import _write_mark
from skep.node.host.conditions import Conditions
from skep.node.host.disk_check import DiskCheck
from tests.support.file_faults import ERRNOS, file_faults


class SlowlessClock(SystemClock):
    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("number", ERRNOS)
async def test_the_condition_comes_and_goes_with_the_fault(tmp_path: Path, number: int) -> None:
    conditions = Conditions(SystemClock())
    check = DiskCheck((tmp_path,), conditions, SlowlessClock())
    with file_faults(tmp_path) as faults:
        faults.plan(0, number, 1 << 30)
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            running = group.create_task(check.run())
            while not conditions.warnings():  # noqa: ASYNC110  # a condition announces nothing
                await asyncio.sleep(0.001)
            assert conditions.warnings()[0].startswith(f"cannot write to {tmp_path}: ")
            faults.end()
            while conditions.warnings():  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            running.cancel()


@pytest.mark.parametrize(("percent", "is_named"), [(100.0, True), (99.9, False), (0.0, False)])
async def test_a_disk_without_inodes_is_not_called_full(
    tmp_path: Path, percent: float, is_named: bool
) -> None:
    """The kernel's error is the same for both, and freed space would not help."""
    check = DiskCheck((tmp_path,), Conditions(SystemClock()), SystemClock(), inodes=lambda _: percent)
    with file_faults(tmp_path) as faults:
        faults.plan(0, errno.ENOSPC, 1 << 30)
        found = await check.look()
    assert ("no inodes left (the disk has space" in found) is is_named
    assert ("free some space" in found) is not is_named


async def test_what_a_managers_store_lacks_is_a_condition_until_there_is_room(tmp_path: Path) -> None:
    """Written by the manager, whose process gets it from the supervisor of its etcd."""
    mark, conditions = tmp_path / "manager.full", Conditions(SystemClock())
    check = DiskCheck((tmp_path,), conditions, SlowlessClock(), mark)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        running = group.create_task(check.run())
        _write_mark(mark, "/x: 80 MB of disk space are missing. Make room: it goes on by itself.")
        while not conditions.present():  # noqa: ASYNC110  # a condition announces nothing
            await asyncio.sleep(0.001)
        said = "/x: 80 MB of disk space are missing. Make room: it goes on by itself"
        assert conditions.present() == {"store-full": said}
        _write_mark(mark, "")
        _write_mark(mark, "")
        while conditions.present():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        running.cancel()


async def test_a_disk_that_hangs_is_said_and_no_threads_pile_up(tmp_path: Path) -> None:
    go, calls = threading.Event(), list[Path]()

    def hang(call: str, path: Path) -> None:
        if call == "open" and path != tmp_path:
            calls.append(path)
            go.wait(10)

    check = DiskCheck((tmp_path,), Conditions(SystemClock()), SystemClock())
    with file_faults(tmp_path) as files:
        files.before_each = hang
        for _ in range(3):
            assert "does not answer" in await check.look(within_s=0.01)
        assert len(calls) == 1
        go.set()
        assert await check.look(within_s=10) == ""
        assert len(calls) == 1, "no further writes were waiting behind it"
