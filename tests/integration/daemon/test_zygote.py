"""The process that starts others, asked by somebody who does not always wait for the answer."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from skep.node.supervision import zygote
from skep.node.supervision.zygote import Zygote


def _end(_: Sequence[str]) -> None:
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 -- what pytest captures into is closed here
    raise SystemExit(7)


def _stay(_: Sequence[str]) -> None:
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    time.sleep(60)


@pytest.fixture
async def started() -> AsyncIterator[Zygote]:
    process = zygote.start({"end": _end, "stay": _stay})
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
    left = [
        int(word) for word in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    ]
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
