"""Where a manager keeps the key to its store."""

import stat
from pathlib import Path

import pytest

from skep.errors import FailedPrecondition, InvalidArgument
from skep.manager.storage.keys import WrappingKeys, load_wrapping_keys, save_wrapping_keys
from skep.paths import Paths

KEY = b"k" * 32


def test_the_wrapping_key_is_kept_for_root_alone(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "data", tmp_path / "run")
    with pytest.raises(FailedPrecondition, match="is missing"):
        load_wrapping_keys(paths)
    save_wrapping_keys(paths, KEY)
    assert load_wrapping_keys(paths) == KEY
    assert stat.S_IMODE(paths.wrapping_key.stat().st_mode) == 0o600
    paths.wrapping_key.write_bytes(b"short")
    with pytest.raises(FailedPrecondition, match="damaged"):
        load_wrapping_keys(paths)


async def test_keys_that_may_be_used_soon_stand_behind_the_one_that_is(tmp_path: Path) -> None:
    """Until the store is under one of them: that and later ones stay."""
    keys = WrappingKeys(Paths(tmp_path / "data", tmp_path / "run"))
    save_wrapping_keys(Paths(tmp_path / "data", tmp_path / "run"), KEY)
    others = [bytes([number]) * 32 for number in range(3)]
    for key in (*others, others[0]):
        await keys.add(key)
    assert keys.load() == KEY + b"".join(others)
    await keys.settle(KEY)
    assert keys.load() == KEY + b"".join(others)
    await keys.settle(others[1])
    assert keys.load() == others[1] + others[2]
    with pytest.raises(InvalidArgument):
        await keys.add(b"short")
    for number in range(100):
        await keys.add(bytes([100 + number]) * 32)
    assert keys.load().startswith(others[1])
    assert len(keys.load()) == 16 * 32
