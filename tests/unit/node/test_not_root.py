"""Without root nothing else is even looked at."""

import os
from pathlib import Path

import pytest

from skep.node.host import requirements


def test_a_daemon_without_root_gets_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(requirements.Unfit, match="must run as root: start it with sudo"):
        requirements.check(Path("/nonexistent"), {requirements.RUNC: "/nonexistent"}, lambda: (3, 5, 26))
