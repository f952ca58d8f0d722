"""How far a container has come, read off runc's files when runc itself cannot say."""

import os
from pathlib import Path

from skep.engine.runtime.runc_state import RuncState
from skep.model.values.ids import ContainerId

ID = ContainerId("c" * 64)


def test_a_container_that_runc_does_not_know_has_no_stage(tmp_path: Path) -> None:
    assert RuncState(tmp_path).stage(ID) == ""


def test_it_is_created_while_its_first_process_waits_and_running_once_that_has_begun(tmp_path: Path) -> None:
    home = tmp_path / ID
    home.mkdir()
    (home / "state.json").write_text("{}")
    os.mkfifo(home / "exec.fifo")
    assert RuncState(tmp_path).stage(ID) == "created"
    (home / "exec.fifo").unlink()
    assert RuncState(tmp_path).stage(ID) == "running"
