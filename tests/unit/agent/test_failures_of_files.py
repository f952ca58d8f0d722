"""Whichever call on a file of an agent fails: secrets, configs and cluster volumes are whole or said to be missing."""

from contextlib import suppress
from pathlib import Path

import pytest

from skep.agent.executor.payloads import Payloads
from skep.agent.session.last_seen import LastSeenFile, seen_at
from skep.errors import SkepError
from skep.gotemplate import Struct
from skep.model.assignment import ConfigFile, SecretFile
from skep.model.container import (
    ConfigFileTarget,
    ConfigReference,
    ContainerSpec,
    SecretFileTarget,
    SecretReference,
)
from skep.model.values.ids import ConfigId, SecretId
from tests.support.file_faults import Faults, walk
from tests.unit.agent.test_cluster_volumes import V1, Rig

OLD, NEW = SecretFile(id=SecretId("s1"), data=b"old"), SecretFile(id=SecretId("s1"), data=b"new")
CONFIG = ConfigFile(id=ConfigId("c1"), data=b"config")
CONTAINER = ContainerSpec(
    image="app:1",
    secrets=(
        SecretReference(
            file=SecretFileTarget(name="s", uid="7", mode=0o440), secret_id=SecretId("s1"), secret_name="s"
        ),
    ),
    configs=(
        ConfigReference(
            file=ConfigFileTarget(name="/c", mode=0o444), config_id=ConfigId("c1"), config_name="c"
        ),
    ),
)
SEEN = Struct("x", {})


def files_of(directory: Path, key: str) -> dict[str, tuple[bytes, int, int]]:
    """Content, owner and mode of what a container sees."""
    return {
        path.name: (path.read_bytes(), path.stat().st_uid, path.stat().st_mode & 0o7777)
        for path in (directory / "files" / key).iterdir()
    }


def on_a_disk(directory: Path) -> Payloads:
    """Without a mount, so that it can be copied and removed."""
    return Payloads(directory, mount_ramfs=lambda _: None)


@pytest.mark.needs("root")
async def test_what_a_container_sees_of_its_secrets_is_whole_or_it_does_not_start(tmp_path: Path) -> None:
    async def life(place: Path, faults: Faults) -> None:
        kept = on_a_disk(place / "secrets")
        try:
            kept.open()
            kept.put((OLD,), (CONFIG,))
            kept.put((NEW,), ())
        except OSError:
            faults.end()
            kept.open()
            kept.put((NEW,), (CONFIG,))  # as the worker does, until it works
        is_made = False
        with suppress(SkepError, OSError):
            kept.materialize("one", CONTAINER, SEEN)
            is_made = True
        faults.end()
        again = on_a_disk(place / "secrets")  # what the next process finds
        again.open()
        assert again.has(CONTAINER)
        whole = {"0": (b"new", 7, 0o440), "1": (b"config", 0, 0o444)}
        assert not is_made or files_of(place / "secrets", "one") == whole
        again.materialize("one", CONTAINER, SEEN)
        assert files_of(place / "secrets", "one") == whole
        again.forget("one")
        assert not (place / "secrets/files/one").exists()

    assert await walk(tmp_path, life) > 30


@pytest.mark.needs("root")
async def test_a_secret_that_is_taken_back_is_gone_or_said_to_be_there(tmp_path: Path) -> None:
    first = on_a_disk(tmp_path / "template/secrets")
    first.open()
    first.put((OLD, SecretFile(id=SecretId("s2"), data=b"2")), (CONFIG,))

    async def life(place: Path, faults: Faults) -> None:
        kept = on_a_disk(place / "secrets")
        is_gone = False
        with suppress(OSError):
            kept.drop((SecretId("s1"),), ())
            kept.keep_only((), ())
            is_gone = True
        faults.end()
        left = list((place / "secrets/known").rglob("*1")) + list((place / "secrets/known").rglob("*2"))
        assert not (is_gone and left)
        assert not (is_gone and kept.has(CONTAINER))
        kept.drop((SecretId("s1"),), ())
        kept.keep_only((), ())
        assert not [path for path in (place / "secrets/known").rglob("*") if path.is_file()]

    assert await walk(tmp_path / "lives", life, template=tmp_path / "template") > 5


async def test_when_a_manager_last_responded_is_known_as_of_before_or_now(tmp_path: Path) -> None:
    (tmp_path / "template").mkdir()
    LastSeenFile(tmp_path / "template/seen", lambda: 10.0, "boot").record(1.0)

    async def life(place: Path, faults: Faults) -> None:
        seen = LastSeenFile(place / "seen", lambda: 20.0, "boot")
        assert seen.silence_s() in (11.0, float("inf"))
        seen.record(1.0)
        assert seen.silence_s() == 1.0
        faults.end()
        assert seen_at(place / "seen", "boot") in (9.0, 19.0)
        seen.record(2.0)
        assert seen_at(place / "seen", "boot") == 18.0

    assert await walk(tmp_path / "lives", life, template=tmp_path / "template") > 4


async def test_a_cluster_volume_that_may_be_mounted_is_remembered(tmp_path: Path) -> None:
    async def life(place: Path, faults: Faults) -> None:
        rig = Rig(place / "volumes")
        is_remembered = False
        with suppress(SkepError):
            rig.volumes.keep(V1)
            is_remembered = True
        if is_remembered:
            with suppress(SkepError, OSError):
                rig.volumes.forget(V1.id)
        faults.end()
        again = rig.made()
        found = [one.id for one in again.read_kept()]
        has_directory = (place / "volumes" / V1.id).exists()
        assert found or not has_directory, "a directory without a file is never taken up again"
        again.keep(V1)
        assert [one.id for one in again.read_kept()] == [V1.id]
        again.forget(V1.id)
        assert again.read_kept() == []
        assert not (place / "volumes" / V1.id).exists()

    assert await walk(tmp_path, life) > 8
