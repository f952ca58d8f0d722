"""Whichever call on a file of a control group fails: no process is taken for gone, and no group for removed."""

import os
import threading
from pathlib import Path

from skep.engine.cgroups import Cgroups
from skep.engine.container import Container, ContainerConfig
from skep.errors import Unavailable
from skep.model.ids import ContainerId
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
    cgroups.is_v2, cgroups._roots = is_v2, {"" if is_v2 else "pids": place}
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
