"""A test marked ``alone`` runs without others beside it, and does not wait for ever."""

import threading
from pathlib import Path

import pytest

from tests.support.harness.alone import Turns


@pytest.fixture
def turns(tmp_path: Path) -> Turns:
    for name in ("room", "door"):
        (tmp_path / name).touch()
    return Turns(tmp_path / "room", tmp_path / "door")


def test_others_are_beside_each_other(turns: Turns) -> None:
    with turns.taken(alone=False), turns.taken(alone=False):
        pass


def test_one_that_is_alone_waits_for_others_and_they_for_it_in_the_order_in_which_they_came(
    turns: Turns,
) -> None:
    reported: list[str] = []

    def enter(name: str, *, alone: bool) -> None:
        with turns.taken(alone=alone):
            reported.append(name)

    with turns.taken(alone=False):
        waiting = threading.Thread(target=enter, args=("alone",), kwargs={"alone": True})
        waiting.start()
        waiting.join(0.2)
        other = threading.Thread(target=enter, args=("other",), kwargs={"alone": False})
        other.start()
        other.join(0.2)
        assert reported == []
    waiting.join(5)
    other.join(5)
    assert reported == ["alone", "other"]
