import os
import stat
from pathlib import Path

import pytest

from skep.linux.files import NEW_SUFFIX, file_exists, replace_file


@pytest.mark.parametrize("is_durable", [True, False])
def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path, is_durable: bool) -> None:
    for content in (b"old and longer", b"new"):
        replace_file(tmp_path / "file", content, is_durable=is_durable)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_secret_is_written_over_what_a_crash_left_readable(tmp_path: Path) -> None:
    (tmp_path / f"key{NEW_SUFFIX}").write_bytes(b"half")
    (tmp_path / f"key{NEW_SUFFIX}").chmod(0o666)
    replace_file(tmp_path / "key", b"secret", mode=0o600)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path) -> None:
    replace_file(tmp_path / "file", b"old")
    (tmp_path / f"file{NEW_SUFFIX}").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_file_that_a_failing_disk_hides_is_not_missing(tmp_path: Path) -> None:
    assert not file_exists(tmp_path / "none" / "inner")
    assert file_exists(tmp_path)
    with pytest.raises(OSError, match="File name too long"):
        file_exists(tmp_path / ("n" * 300))
