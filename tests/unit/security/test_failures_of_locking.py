"""Whichever call on a file fails while a manager's keys are locked, rotated or unlocked: they can be read by a key."""

from contextlib import suppress
from pathlib import Path

import pytest

from skep.errors import SkepError
from skep.paths import Paths
from skep.security.locking import KeyLock, WrongUnlockKey
from tests.support.file_faults import Faults, walk

OLD, NEW = b"o" * 32, b"n" * 32


def paths_of(place: Path) -> Paths:
    return Paths(place / "data", place / "run")


@pytest.mark.parametrize(
    ("before", "after"), [(None, NEW), (OLD, NEW), (OLD, None)], ids=["lock", "rotate", "unlock"]
)
async def test_whichever_call_fails_the_keys_are_read_with_the_old_or_the_new_unlock_key(
    tmp_path: Path, before: bytes | None, after: bytes | None
) -> None:
    paths = paths_of(tmp_path / "template")
    for path in paths.locked_files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(path.name.encode())
    paths.run.mkdir()
    if before is not None:
        KeyLock(paths).turn(before)

    async def life(place: Path, faults: Faults) -> None:
        paths = paths_of(place)
        is_turned = False
        with suppress(OSError, SkepError):
            KeyLock(paths).turn(after)
            is_turned = True
        faults.end()
        if not is_turned:
            check(paths)
            restart(paths, before, after)
            KeyLock(paths).turn(after)
        check(paths)
        restart(paths, after)

    def check(paths: Paths) -> None:
        for path in paths.locked_files:
            assert KeyLock(paths).read(path) == path.name.encode()

    def restart(paths: Paths, *keys: bytes | None) -> None:
        """The machine is started again, and unlocked by the one of ``keys`` that fits."""
        lock = KeyLock(paths)
        lock.forget()
        if lock.is_locked:
            for key in keys:
                if key is not None:
                    with suppress(WrongUnlockKey):
                        lock.unlock(key)
        assert not lock.is_locked
        check(paths)

    assert await walk(tmp_path / "lives", life, template=tmp_path / "template") > 10
