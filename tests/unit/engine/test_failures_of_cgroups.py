"""Whichever call on a file of a control group fails: no process is taken for gone, and no group for removed."""

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.engine.confinement.cgroups import Cgroups
from skep.engine.containers.container import Container, ContainerConfig, ContainerState, ProcessName
from skep.errors import Unavailable
from skep.model.values.ids import ContainerId
from tests.support.file_faults import Faults, walk

CONTAINER = Container(
    id=ContainerId("c1"), name="c1", image="", image_id="", config=ContainerConfig(path="sh")
)
GROUP = "skep/ctr/c1"
REAL_STAT = os.stat
"""It does not count, and does not fail."""


def groups(place: Path, *, is_v2: bool = True) -> Cgroups:
    """A hierarchy of ordinary directories."""
    cgroups = Cgroups("skep", place)
    cgroups.is_v2, cgroups.own_roots = is_v2, {"" if is_v2 else "pids": place}
    return cgroups


def is_there(path: Path) -> bool:
    try:
        REAL_STAT(path)
    except FileNotFoundError:
        return False
    return True


async def test_processes_of_a_container_are_all_of_them_or_an_error(tmp_path: Path) -> None:
    async def life(place: Path, faults: Faults) -> None:
        try:
            found = groups(place).pids(CONTAINER)
        except Unavailable:
            assert faults.hits
        else:
            assert found == {1, 2, 3}
        faults.end()
        assert groups(place).pids(CONTAINER) == {1, 2, 3}

    nested = tmp_path / "template" / GROUP / "nested"
    nested.mkdir(parents=True)
    (nested.parent / "cgroup.procs").write_text("1\n2\n")
    (nested / "cgroup.procs").write_text("3\n")
    assert await walk(tmp_path / "lives", life, template=tmp_path / "template") > 3


async def test_a_group_is_removed_or_said_to_be_left(tmp_path: Path) -> None:
    async def life(place: Path, faults: Faults) -> None:
        cgroups = groups(place)
        try:
            is_gone = cgroups.remove(CONTAINER)
        except OSError:
            is_gone = False
        assert not is_gone or not is_there(place / GROUP)
        faults.end()
        assert cgroups.remove(CONTAINER)
        assert not is_there(place / GROUP)

    (tmp_path / "template" / GROUP / "nested/deep").mkdir(parents=True)
    assert await walk(tmp_path / "lives", life, template=tmp_path / "template") > 3


async def test_monitors_are_started_whichever_group_refuses_them(tmp_path: Path) -> None:
    async def life(place: Path, faults: Faults) -> None:
        cgroups = groups(place, is_v2=False)
        cgroups.enter_monitors()
        groups(place).join_monitors(7)
        faults.end()
        cgroups.enter_monitors()
        groups(place).join_monitors(7)
        monitors = place / "skep/monitors"
        assert (monitors / "tasks").read_text() == str(threading.get_native_id())
        assert (monitors / "cgroup.procs").read_text() == "7"

    assert await walk(tmp_path, life) > 4


def own_groups() -> str:
    return Path("/proc/thread-self/cgroup").read_text()


def own_group(place: Path, *, is_v2: bool) -> Path:
    """Where the calling thread is, in a hierarchy at ``place``."""
    lines = [line.split(":", 2) for line in own_groups().splitlines()]
    (path,) = [path for _, names, path in lines if ("" if is_v2 else "pids") in names.split(",")]
    return place / path.lstrip("/")


@pytest.mark.parametrize(("is_v2", "name"), [(False, "tasks"), (True, "cgroup.threads")])
def test_a_move_is_expected_by_one_of_the_thread_to_where_it_is(
    tmp_path: Path, is_v2: bool, name: str
) -> None:
    group, before = own_group(tmp_path, is_v2=is_v2), own_groups()
    Cgroups("skep").expect_move()
    assert own_groups() == before
    group.mkdir(parents=True, exist_ok=True)
    groups(tmp_path, is_v2=is_v2).expect_move()
    assert not (group / name).exists(), "nothing is created outside of a control group"
    (group / name).touch()
    groups(tmp_path, is_v2=is_v2).expect_move()
    assert (group / name).read_text() == str(threading.get_native_id())


@pytest.mark.parametrize("is_v2", [False, True])
async def test_a_move_that_cannot_be_expected_costs_time_alone(tmp_path: Path, is_v2: bool) -> None:
    async def life(place: Path, faults: Faults) -> None:
        groups(place, is_v2=is_v2).expect_move()

    for template in (tmp_path / "with", tmp_path / "without"):
        template.mkdir()
    group = own_group(tmp_path / "with", is_v2=is_v2)
    group.mkdir(parents=True, exist_ok=True)
    for name in ("tasks", "cgroup.threads"):
        (group / name).touch()
    assert await walk(tmp_path / "a", life, template=tmp_path / "with") >= 2, "open and write"
    assert await walk(tmp_path / "b", life, template=tmp_path / "without") >= 1


def test_a_node_without_delegated_groups_finds_processes_by_their_mounts(tmp_path: Path) -> None:
    cgroups = groups(tmp_path)
    cgroups.is_usable, cgroups.own_roots = False, {}
    assert cgroups.path_of(CONTAINER) == ""
    assert cgroups.controllers == frozenset()
    with subprocess.Popen(["unshare", "--mount", "sh", "-c", "sleep 100 & echo; wait"], stdout=-1) as first:
        assert first.stdout is not None
        first.stdout.readline()
        running = replace(CONTAINER, process=ProcessName(first.pid, 0, ""), state=ContainerState.RUNNING)
        found = cgroups.pids(running)
        for pid in found:
            os.kill(pid, signal.SIGKILL)
    assert first.pid in found
    assert len(found) == 2
    assert cgroups.pids(running) == frozenset(), "nothing once it has ended"


def test_processes_of_the_node_itself_are_never_taken_for_a_container(tmp_path: Path) -> None:
    cgroups = groups(tmp_path)
    cgroups.is_usable = False
    own = replace(CONTAINER, process=ProcessName(os.getpid(), 0, ""), state=ContainerState.RUNNING)
    assert cgroups.pids(own) == frozenset()


def test_nothing_is_removed_where_no_groups_are_delegated(tmp_path: Path) -> None:
    (tmp_path / "unified").mkdir()
    cgroups = groups(tmp_path)
    cgroups.is_usable = False
    assert cgroups.remove(CONTAINER)
    assert (tmp_path / "unified").is_dir()
