"""Files of users and groups that a container has replaced by something else."""

import os
from pathlib import Path

import pytest

from skep.engine.confinement import users
from skep.engine.confinement.users import ProcessUser
from tests.support.managers.counted_calls import calls_of

pytestmark = pytest.mark.needs("root")


@pytest.mark.parametrize("number", [os.makedev(1, 5), 0], ids=["device", "fifo"])
def test_what_is_no_regular_file_is_not_opened_for_users(tmp_path: Path, number: int) -> None:
    (tmp_path / "etc").mkdir()
    if number:
        os.mknod(tmp_path / "etc/passwd", 0o20666, number)  # /dev/zero, of which there is much to read
    else:
        os.mkfifo(tmp_path / "etc/passwd")
    (tmp_path / "etc/group").write_text("staff:x:7:\n")
    with calls_of(users.resolve) as resolved:
        assert users.identity(tmp_path, "5:staff") == ProcessUser(uid=5, gid=7)
    assert [call["passwd"] for call in resolved.of(users.resolve)] == [""]
