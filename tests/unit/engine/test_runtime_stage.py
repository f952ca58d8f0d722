"""How far a container has come, read off the runtime's files when it cannot say itself."""

import os
from pathlib import Path

import pytest

from skep.engine.runtime.runtime_state import RuntimeState
from skep.model.values.ids import ContainerId

ID = ContainerId("c" * 64)


def test_a_container_that_runc_does_not_know_has_no_stage(tmp_path: Path) -> None:
    assert RuntimeState(tmp_path).stage(ID) == RuntimeState(tmp_path).runtime(ID) == ""


@pytest.mark.parametrize(("runtime", "file"), [("runc", "state.json"), ("crun", "status")])
def test_it_is_created_while_its_first_process_waits_and_running_once_that_has_begun(
    tmp_path: Path, runtime: str, file: str
) -> None:
    home = tmp_path / ID
    home.mkdir()
    (home / file).write_text("{}")
    assert RuntimeState(tmp_path).runtime(ID) == runtime
    os.mkfifo(home / "exec.fifo")
    assert RuntimeState(tmp_path).stage(ID) == "created"
    (home / "exec.fifo").unlink()
    assert RuntimeState(tmp_path).stage(ID) == "running"
