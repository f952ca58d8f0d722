"""What ``skep notify`` sends and shows."""

from pathlib import Path
from typing import Any

import click
import pytest

from skep.cli.cluster.notify import _body, shown_targets
from skep.cli.output import Screen

NOTHING: dict[str, Any] = {
    "secret": "",
    "secret_file": None,
    "topics": "",
    "stacks": (),
    "allow_internal": False,
}


def test_a_secret_comes_from_a_file_without_its_last_end_of_line(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("hush\n")
    body = _body("ops", "https://example.org/", **NOTHING | {"secret_file": tmp_path / "key"})
    assert body["Secret"] == "hush"
    with pytest.raises(click.UsageError, match="either"):
        _body("ops", "u", **NOTHING | {"secret_file": tmp_path / "key", "secret": "x"})


def test_topics_are_checked() -> None:
    assert _body("ops", "u", **NOTHING | {"topics": "node,backup"})["On"] == ["node", "backup"]
    with pytest.raises(click.UsageError, match="Unknown topic wether"):
        _body("ops", "u", **NOTHING | {"topics": "node,wether"})


def test_a_target_that_fails_says_why_below_the_list() -> None:
    target = {
        "Name": "ops",
        "To": "https://hooks.example.org:443",
        "On": ["node", "disk"],
        "Stacks": [],
        "Sent": 3,
        "Waiting": 2,
        "Dropped": 1,
        "FailingSince": "2027-01-15T08:00:00Z",
        "Error": "it responded 503",
    }
    assert list(shown_targets([target]).lines(Screen())) == [
        "NAME  TO                             ON         STACKS  SENT  WAITING  STATE",
        "ops   https://hooks.example.org:443  node,disk  -       3     2        failing",
        "ops fails since 2027-01-15 08:00 UTC: it responded 503, 1 notice dropped",
    ]
    assert "No targets" in "".join(shown_targets([]).lines(Screen()))
