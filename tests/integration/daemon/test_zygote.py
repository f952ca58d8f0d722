"""The process that starts others, with clients that do not always wait for the response."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from skep.linux.processes import start_ticks_of
from skep.node.supervision import zygote
from tests.support.engine import zygote_rig
from tests.support.engine.zygote_rig import StartedZygote
from tests.support.machines.daemon_rig import is_running, wait_until


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
async def started() -> AsyncIterator[StartedZygote]:
    nothing = dict.fromkeys(("stay", "write"), lambda: None)
    process = zygote_rig.start({"end": _end, "stay": _stay, "write": _write}, nothing)
    try:
        yield process
    finally:
        process.end()


async def test_a_late_response_is_not_taken_for_that_of_another_request(started: StartedZygote) -> None:
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


async def test_a_dead_zygote_is_distinguished_from_a_failed_start(
    started: StartedZygote,
) -> None:
    os.kill(started.pid, signal.SIGKILL)
    with pytest.raises(zygote.ZygoteGone):
        await started.fork("end", ())


async def test_what_stands_by_is_given_its_arguments(started: StartedZygote, tmp_path: Path) -> None:
    await started.keep_spare("write", wanted=True)
    await started.keep_spare("write", wanted=True)
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


async def test_what_stands_by_and_is_not_wanted_any_more_ends(started: StartedZygote) -> None:
    await started.keep_spare("stay", wanted=False)
    await started.keep_spare("stay", wanted=True)
    await started.keep_spare("stay", wanted=False)
    assert _children(started) == []


async def test_one_that_died_standing_by_is_replaced(started: StartedZygote, tmp_path: Path) -> None:
    await started.keep_spare("write", wanted=True)
    (standing_by,) = _children(started)
    os.kill(standing_by, signal.SIGKILL)
    await _wait_ended(standing_by)
    pid = await started.fork("write", (str(tmp_path / "written"), "by another"))
    assert pid != standing_by
    await _wait_ended(pid)
    assert await started.reap(pid) == 0
    assert (tmp_path / "written").read_text() == "by another"
    assert _children(started) == []


async def test_what_stands_by_ends_with_the_zygote(started: StartedZygote) -> None:
    await started.keep_spare("stay", wanted=True)
    (standing_by,) = _children(started)
    os.kill(started.pid, signal.SIGKILL)
    await _wait_ended(standing_by)


# --- the node process of a zygote -------------------------------------------------------------------------------------

HOST = """
import os, sys, time
from pathlib import Path
from skep.node.supervision import zygote

zygote.LASTED_S = float(sys.argv[2])
started = Path(sys.argv[1])

def node(parent):
    with started.open("a") as file:
        file.write(f"{os.getpid()}\\n")
    ACT

sys.exit(zygote.host({}, {}, node))
"""
"""A zygote whose node process writes its pid and then does something."""
FAILS_ONCE = """
    if len(started.read_text().split()) == 1:
        raise RuntimeError("injected")
    time.sleep(60)
"""


@pytest.fixture
def hosted(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], Path]]]:
    """Start a zygote; gives it, and the file of its node processes."""
    running: list[subprocess.Popen[bytes]] = []

    def start(act: str = "time.sleep(60)", lasted_s: float = 0.0) -> tuple[subprocess.Popen[bytes], Path]:
        file = tmp_path / "started"
        words = [sys.executable, "-c", HOST.replace("ACT", act.strip()), str(file), str(lasted_s)]
        running.append(subprocess.Popen(words, stderr=subprocess.DEVNULL))
        wait_until(lambda: nodes_of(file), "the node process runs")
        return running[0], file

    yield start
    for process in running:
        process.kill()
        process.wait(10)


def nodes_of(file: Path) -> list[int]:
    """Pids of the node processes, the first one first."""
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


def test_a_node_process_that_is_killed_is_forked_again(hosted: Any) -> None:
    process, file = hosted()
    os.kill(nodes_of(file)[0], signal.SIGKILL)
    assert wait_until(lambda: nodes_of(file)[1:], "another node process")
    assert process.poll() is None


def test_a_node_process_that_fails_is_forked_again(hosted: Any) -> None:
    process, file = hosted(FAILS_ONCE)
    assert wait_until(lambda: nodes_of(file)[1:], "another node process")
    assert process.poll() is None


def test_one_that_fails_at_once_ends_its_zygote_so_that_all_is_started_anew(hosted: Any) -> None:
    process, file = hosted(FAILS_ONCE, lasted_s=1000.0)
    assert process.wait(20) == os.EX_SOFTWARE
    assert len(nodes_of(file)) == 1


def test_a_node_process_that_ends_by_itself_ends_its_zygote(hosted: Any) -> None:
    process, file = hosted("return 1")
    assert process.wait(20) == 1
    assert len(nodes_of(file)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_zygote_is_the_node_processs(hosted: Any, number: signal.Signals) -> None:
    process, file = hosted()
    process.send_signal(number)
    process.wait(20)
    assert len(nodes_of(file)) == 1
    assert not is_running(nodes_of(file)[0])


def test_a_node_process_ends_with_its_zygote(hosted: Any) -> None:
    process, file = hosted()
    process.kill()
    wait_until(lambda: not is_running(nodes_of(file)[0]), "the node process has ended")


def _children(process: StartedZygote) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(word) for word in path.read_text().split()]


async def _wait_ended(pid: int) -> None:
    async with asyncio.timeout(10):
        while start_ticks_of(pid):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
