"""What ``skep node evict`` prints while the managers work."""

from typing import Any

import pytest
from click.testing import CliRunner

from skep.cli.main import main
from skep.cli.node import _Progress


def a_state(*done: bool, waits_for: str = "", complete: bool = False) -> dict[str, Any]:
    steps = [{"Text": f"step {number}", "Done": is_done} for number, is_done in enumerate(done)]
    return {
        "NodeID": "n3", "Hostname": "m3", "Steps": steps, "WaitsFor": waits_for, "Complete": complete
    }  # fmt: skip


def test_each_step_and_each_reason_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    progress = _Progress()
    assert not progress.show(a_state(False, False))
    assert not progress.show(a_state(True, False, waits_for="manager m2 cannot be reached"))
    assert not progress.show(a_state(True, False, waits_for="manager m2 cannot be reached"))
    assert progress.show(a_state(True, True, complete=True))
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "done: step 0",
        "done: step 1",
        "m3 is evicted: every key that it had is revoked or replaced.",
    ]
    assert err.split("\n") == ["      manager m2 cannot be reached", ""]


def test_nothing_happens_without_consent() -> None:
    done = CliRunner().invoke(main, ["--host", "unix:///nowhere", "node", "evict", "m3"], input="n\n")
    assert done.exit_code == 1
    assert "Remove m3" in done.output
