"""Without root nothing else is even looked at."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.node.host import requirements


@pytest.fixture
def not_root() -> Iterator[None]:
    user = os.geteuid()
    if user == 0:
        os.seteuid(1000)
    yield
    os.seteuid(user)


@pytest.mark.usefixtures("not_root")
def test_a_daemon_without_root_gets_an_error() -> None:
    with pytest.raises(requirements.Unfit, match="must run as root: start it with sudo"):
        requirements.check(Path("/nonexistent"), {requirements.RUNC: "/nonexistent"}, lambda: (3, 5, 26))
