"""A test that lacks something fails, unless a developer asked for a skip."""

import pytest

from tests.conftest import may_skip, missing


def test_a_missing_command_is_named_and_a_present_one_is_not() -> None:
    assert missing(["sh", "no-such-command"]) == ["no-such-command"]


@pytest.mark.parametrize(
    ("environment", "skips"),
    [
        ({}, False),
        ({"SKEP_SKIP": "1"}, True),
        ({"SKEP_SKIP": "1", "CI": "true"}, False),
        ({"CI": "true"}, False),
        ({"SKEP_SKIP": "0"}, False),
    ],
)
def test_only_a_developer_may_skip(environment: dict[str, str], skips: bool) -> None:
    assert may_skip(environment) == skips


def test_every_test_has_a_deadline(request: pytest.FixtureRequest) -> None:
    assert 0 < float(request.config.getini("timeout")) <= 60
    own = [marker.args[0] for item in request.session.items for marker in item.iter_markers("timeout")]
    assert all(0 < seconds <= 1500 for seconds in own)
