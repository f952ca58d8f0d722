"""Containers that end with a rootless node get their stop signal, and their exit code is written."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from skep.engine.containers.container import Container, ContainerConfig, ContainerState
from skep.engine.runtime.processes import find
from skep.engine.runtime.runtime import end_all_gracefully
from skep.model.values.ids import ContainerId
from skep.model.values.times import SECOND_NS

OBEYS = "trap 'exit 7' TERM; echo $$; while :; do sleep 0.02; done"
IGNORES = "trap '' TERM; echo $$; while :; do sleep 0.02; done"


def a_container(first: int, monitor: int, grace_s: float) -> Container:
    return Container(
        id=ContainerId("c1"),
        name="c1",
        image="",
        image_id="",
        config=ContainerConfig(path="sh", stop_grace_ns=int(grace_s * SECOND_NS)),
        state=ContainerState.RUNNING,
        process=find(first),
        monitor=find(monitor),
    )


@contextmanager
def a_process(*words: str) -> Iterator[tuple[int, int]]:
    """Run a command that prints a pid.  Yields its own pid and the printed one."""
    with subprocess.Popen(["sh", "-c", *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())


async def test_the_monitor_has_written_the_exit_code_at_the_end(tmp_path: Path) -> None:
    script = f'sh -c "$1" & wait $!; code=$?; sleep 0.2; echo $code > {tmp_path}/code'
    with a_process(script, "sh", OBEYS) as (monitor, first):
        await end_all_gracefully([a_container(first, monitor, grace_s=30)])
        assert (tmp_path / "code").read_text() == "7\n"


@pytest.mark.timeout(20)
async def test_a_container_that_ignores_the_signal_holds_up_nothing_after_its_grace_period() -> None:
    with a_process(IGNORES) as (pid, _):
        await end_all_gracefully([a_container(pid, pid, grace_s=0.1)])
        os.kill(pid, signal.SIGKILL)
