"""The process that starts others, asked by somebody who does not always wait for the answer."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from skep.linux.processes import start_ticks_of
from skep.node.supervision import zygote
from skep.node.supervision.zygote import Zygote


def _end(_: Sequence[str]) -> None:
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 -- what pytest captures into is closed here
    raise SystemExit(7)


def _stay(_: Sequence[str]) -> None:
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    time.sleep(60)


def _write(arguments: Sequence[str]) -> None:
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    path, content = arguments
    Path(path).write_text(content)


@pytest.fixture
async def started() -> AsyncIterator[Zygote]:
    nothing = dict.fromkeys(("stay", "write"), lambda: None)
    process = zygote.start({"end": _end, "stay": _stay, "write": _write}, nothing)
    try:
        yield process
    finally:
        process.end()


async def test_an_answer_that_nobody_waited_for_is_not_taken_for_another(started: Zygote) -> None:
    os.kill(started.pid, signal.SIGSTOP)
    abandoned = asyncio.ensure_future(started.fork("stay", ()))
    await asyncio.sleep(0)  # it has asked
    abandoned.cancel()
    await asyncio.wait([abandoned])
    assert abandoned.cancelled()
    os.kill(started.pid, signal.SIGCONT)
    pid = await started.fork("end", ())
    assert await started.reap(pid) == 7
    left = _children(started)
    assert pid not in left
    for other in left:
        os.kill(other, signal.SIGKILL)
        assert await started.reap(other) == -9


async def test_a_zygote_that_has_ended_is_told_apart_from_one_that_cannot_start_something(
    started: Zygote,
) -> None:
    os.kill(started.pid, signal.SIGKILL)
    with pytest.raises(zygote.ZygoteGone):
        await started.fork("end", ())


async def test_what_stands_by_is_given_its_arguments(started: Zygote, tmp_path: Path) -> None:
    await started.stand_by("write", wanted=True)
    await started.stand_by("write", wanted=True)
    (standing_by,) = _children(started)
    written = tmp_path / "written"
    assert await started.fork("write", (str(written), "x" * 3000)) == standing_by
    await _wait_ended(standing_by)
    assert await started.reap(standing_by) == 0
    assert written.read_text() == "x" * 3000
    again = await started.fork("write", (str(written), "again"))
    assert again != standing_by  # nothing stands by any more
    await _wait_ended(again)
    assert await started.reap(again) == 0
    assert written.read_text() == "again"


async def test_what_stands_by_and_is_not_wanted_any_more_ends(started: Zygote) -> None:
    await started.stand_by("stay", wanted=False)
    await started.stand_by("stay", wanted=True)
    await started.stand_by("stay", wanted=False)
    assert _children(started) == []


async def test_one_that_died_standing_by_is_replaced(started: Zygote, tmp_path: Path) -> None:
    await started.stand_by("write", wanted=True)
    (standing_by,) = _children(started)
    os.kill(standing_by, signal.SIGKILL)
    await _wait_ended(standing_by)
    pid = await started.fork("write", (str(tmp_path / "written"), "by another"))
    assert pid != standing_by
    await _wait_ended(pid)
    assert await started.reap(pid) == 0
    assert (tmp_path / "written").read_text() == "by another"
    assert _children(started) == []


async def test_what_stands_by_ends_with_the_zygote(started: Zygote) -> None:
    await started.stand_by("stay", wanted=True)
    (standing_by,) = _children(started)
    os.kill(started.pid, signal.SIGKILL)
    await _wait_ended(standing_by)


def _children(process: Zygote) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(word) for word in path.read_text().split()]


async def _wait_ended(pid: int) -> None:
    async with asyncio.timeout(10):
        while start_ticks_of(pid):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
