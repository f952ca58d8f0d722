"""Which processes are killed in the name of an exec; they are real ones."""

import asyncio
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from skep.engine.capacity import Capacity, Programs
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.containers.container import Container
from skep.engine.runtime.bundle import Bundles
from skep.engine.runtime.processes import find, wait_gone
from skep.engine.runtime.runtime import Runtime
from tests.unit.engine.test_specification import a_container

EXEC_ID = "e" * 64


class Group:
    """In the place of ``Cgroups``: the processes of the only container."""

    def __init__(self) -> None:
        self.members: set[int] = set()

    def pids(self, container: Container) -> frozenset[int]:
        return frozenset(self.members)


@pytest.fixture
def group() -> Group:
    return Group()


@pytest.fixture
def runtime(tmp_path: Path, group: Group) -> Runtime:
    return Runtime(
        programs=Programs(runtimes={"runc": tmp_path}, conmon=tmp_path),
        root=tmp_path,
        bundles=cast("Bundles", None),
        cgroups=cast("Cgroups", group),
        capacity=cast("Capacity", None),
    )


@pytest.fixture
def process() -> Iterator["subprocess.Popen[bytes]"]:
    """One that waits, with the exec's id among its arguments."""
    with subprocess.Popen(["sh", "-c", "read _", EXEC_ID], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.fixture
def conmon() -> Iterator["subprocess.Popen[bytes]"]:
    """One in the place of a conmon with a runc, whose own process says its pid."""
    line = "sh -c 'sleep 1000 & echo $!; wait' & wait"
    with subprocess.Popen(["sh", "-c", line, EXEC_ID], stdout=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_only_a_process_of_the_container_is_killed(
    runtime: Runtime, group: Group, process: "subprocess.Popen[bytes]"
) -> None:
    runtime.kill_exec(a_container(), process.pid)
    assert process.poll() is None
    group.members.add(process.pid)
    runtime.kill_exec(a_container(), process.pid)
    assert process.wait(10) == -signal.SIGKILL
    runtime.kill_exec(a_container(), process.pid)  # it is gone


@pytest.mark.parametrize("exec_id", [EXEC_ID, "f" * 64])
async def test_a_conmon_that_does_not_respond_is_killed_if_it_is_that_of_the_exec(
    tmp_path: Path, runtime: Runtime, process: "subprocess.Popen[bytes]", exec_id: str
) -> None:
    path = tmp_path / exec_id
    await runtime.end_exec(a_container(), path)  # it has not even begun
    path.mkdir()
    (path / "conmon.pid").write_text(str(process.pid))
    await runtime.end_exec(a_container(), path)
    if exec_id == EXEC_ID:
        assert process.wait(10) == -signal.SIGKILL
    else:
        assert process.poll() is None, "another process has its pid now"


async def test_what_the_conmon_has_started_ends_with_it(
    tmp_path: Path, runtime: Runtime, conmon: "subprocess.Popen[bytes]"
) -> None:
    assert conmon.stdout is not None
    started = find(int(conmon.stdout.readline()))
    assert started is not None
    path = tmp_path / EXEC_ID
    path.mkdir()
    (path / "conmon.pid").write_text(str(conmon.pid))
    await runtime.end_exec(a_container(), path)
    assert conmon.wait(10) == -signal.SIGKILL
    async with asyncio.timeout(10):
        await wait_gone(started)


async def test_the_process_of_an_exec_whose_conmon_does_not_respond_is_killed(
    tmp_path: Path, runtime: Runtime, group: Group, process: "subprocess.Popen[bytes]"
) -> None:
    (tmp_path / "pidfile").write_text(str(process.pid))
    group.members.add(process.pid)
    await runtime.end_exec(a_container(), tmp_path)
    assert process.wait(10) == -signal.SIGKILL
