import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from skep.api.formats.timestamps import parse_time
from skep.engine.api.responses.container_responses import age
from skep.errors import InvalidArgument
from skep.model.values.times import duration_ns

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


digits = st.text("0123456789", max_size=400)
units = st.sampled_from(["", "ns", "us", "ms", "s", "m", "h", ".", "-", "+"])
durations = st.lists(st.tuples(digits, units)).map(lambda parts: "".join(map("".join, parts)))
years = st.integers(0, 9999).map(lambda year: f"{year:04}")
places = st.sampled_from(["-01-01", "-12-31", "-12-31T23:59:59", "-01-01T00:00:00.5"])
zones = st.sampled_from(["", "Z", "+00:01", "-00:01", "+99:99", "-99:99"])
dates = st.tuples(years, places, zones).map("".join)


@given(st.text(max_size=30) | durations | dates | st.from_regex(r"-?\d{1,20}(\.\d*)?", fullmatch=True))
@example("9" * 400 + "s")
@example("0001-01-01T00:00:00+01:00")
@example("9999-12-31T23:59:59-01:00")
def test_any_text_is_a_moment_or_refused(text: str):
    try:
        parse_time(text, NOW)
    except InvalidArgument:
        return


@given(st.text(max_size=30) | durations)
@example("9" * 400 + "s")
def test_any_text_is_a_duration_of_64_bits_or_none(text: str):
    found = duration_ns(text)
    assert found is None or -(2**63) <= found < 2**63


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("1h30m", 5400 * SECOND),
        ("-1.5s", -3 * SECOND // 2),
        ("+5s", 5 * SECOND),
        ("-0", 0),
        ("-+5s", None),
        ("", None),
        ("-", None),
        ("٣s", None),
        ("2562047h", 2562047 * 3600 * SECOND),
        ("2562048h", None),
    ],
)
def test_durations_are_those_of_go(text: str, nanoseconds: int | None):
    assert duration_ns(text) == nanoseconds


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
