"""Where a manager keeps the key to its store."""

import stat
from pathlib import Path

import pytest

from skep.errors import FailedPrecondition
from skep.manager.keys import load_wrapping_key, save_wrapping_key
from skep.paths import Paths

KEY = b"k" * 32


def test_the_wrapping_key_is_kept_for_root_alone(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "data", tmp_path / "run")
    with pytest.raises(FailedPrecondition, match="is missing"):
        load_wrapping_key(paths)
    save_wrapping_key(paths, KEY)
    assert load_wrapping_key(paths) == KEY
    assert stat.S_IMODE(paths.wrapping_key.stat().st_mode) == 0o600
    paths.wrapping_key.write_bytes(b"short")
    with pytest.raises(FailedPrecondition, match="damaged"):
        load_wrapping_key(paths)
