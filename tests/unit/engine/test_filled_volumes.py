"""Volumes that get the image's files, while the copy fails or is cut off, or a second container is created."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from skep.engine.containers.container import Conflicting, ContainerState
from skep.engine.volumes.volumes import Volumes
from skep.errors import Unavailable
from skep.model.container import Mount
from skep.model.values.times import ZERO_TIME
from tests.support.engine.stub_engine import ID, StubEngine, a_container, on_virtual_time
from tests.support.managers.wire_rig import until

DATA = Mount(type="volume", source="data", target="/data")
COPY = "touch $4/a; touch {directory}/begun; while [ ! -e {directory}/go-on ]; do sleep 0.01; done; "

Cp: TypeAlias = Callable[[str], None]


@pytest.fixture
def volumes(tmp_path: Path) -> Volumes:
    for name in ("a", "b"):
        (tmp_path / "root/data").mkdir(parents=True, exist_ok=True)
        (tmp_path / "root/data" / name).write_text(name)
    os.chown(tmp_path / "root/data", 5, 6)
    (tmp_path / "root/data").chmod(0o2750)
    return Volumes(tmp_path / "volumes")


@pytest.fixture
def cp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cp:
    """Replace cp by a script."""

    def replace(script: str) -> None:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/cp").write_text(f"#!/bin/sh\n{script.format(directory=tmp_path)}")
        (tmp_path / "bin/cp").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    return replace


async def fill(volumes: Volumes) -> None:
    points = volumes.mount_points([DATA], ())
    await volumes.fill("c", points, [DATA], volumes.directory.parent / "root")


def files(volumes: Volumes) -> list[str]:
    return sorted(path.read_text() for path in volumes.path("data").iterdir())


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_volume_that_could_not_be_filled_is_filled_for_the_next_container(
    volumes: Volumes, tmp_path: Path, cp: Cp, *, is_cancelled: bool
) -> None:
    cp(COPY + "echo No space left on device >&2; exit 1")
    filling = asyncio.create_task(fill(volumes))
    await until((tmp_path / "begun").exists)
    if is_cancelled:
        filling.cancel()
    (tmp_path / "go-on").touch()
    with pytest.raises((Unavailable, asyncio.CancelledError)):
        await filling
    assert files(volumes) == []
    (tmp_path / "bin/cp").unlink()
    await fill(volumes)
    assert files(volumes) == ["a", "b"]
    status = volumes.path("data").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (5, 6, 0o2750)
    assert os.listdir(volumes.directory) == ["data"]


async def test_of_two_containers_none_begins_with_a_part_of_the_files(
    volumes: Volumes, tmp_path: Path, cp: Cp
) -> None:
    cp(COPY + 'PATH=/usr/bin:/bin; exec cp "$@"')
    filling = [asyncio.create_task(fill(volumes)) for _ in range(2)]
    await until((tmp_path / "begun").exists)
    await asyncio.wait(filling, timeout=0.05)
    assert not any(one.done() for one in filling)
    assert files(volumes) == []
    (tmp_path / "go-on").touch()
    await asyncio.gather(*filling)
    assert files(volumes) == ["a", "b"]


async def test_a_file_that_another_container_writes_meanwhile_stays(
    volumes: Volumes, tmp_path: Path, cp: Cp
) -> None:
    cp(COPY + 'PATH=/usr/bin:/bin; exec cp "$@"')
    filling = asyncio.create_task(fill(volumes))
    await until((tmp_path / "begun").exists)
    (volumes.path("data") / "a").write_text("its own")
    (tmp_path / "go-on").touch()
    await filling
    assert files(volumes) == ["its own"]


def test_a_container_whose_volumes_were_not_filled_before_a_crash_is_removed(tmp_path: Path) -> None:
    """Its task is prepared again.  Otherwise it would start with empty volumes."""

    async def body(stubs: StubEngine) -> None:
        with pytest.raises(Conflicting, match="its volumes are not filled yet"):
            await stubs.engine.start(ID)
        await asyncio.sleep(1)
        assert not stubs.bundles.saved

    unfilled = a_container(
        state=ContainerState.CREATED, process=None, started_at=ZERO_TIME, plain=None, is_unfilled=True
    )
    on_virtual_time(body, tmp_path, unfilled)
