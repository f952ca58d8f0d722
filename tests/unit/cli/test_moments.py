"""Points in time as people write them."""

import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis.strategies import text

from skep.cli.see.points_in_time import local_now, moment_of, moment_or_revision
from skep.errors import InvalidArgument

NOW = datetime(2026, 1, 31, 15, 30, 0, tzinfo=timezone(timedelta(hours=2)))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("now", "2026-01-31T13:30:00Z"),
        ("10 min ago", "2026-01-31T13:20:00Z"),
        ("10m", "2026-01-31T13:20:00Z"),
        ("an hour ago", "2026-01-31T12:30:00Z"),
        ("2 Days ago", "2026-01-29T13:30:00Z"),
        ("1h30m ago", "2026-01-31T12:00:00Z"),
        ("14:00", "2026-01-31T12:00:00Z"),
        ("today 9:05", "2026-01-31T07:05:00Z"),
        ("yesterday 14:00", "2026-01-30T12:00:00Z"),
        ("yesterday", "2026-01-29T22:00:00Z"),
        ("2026-01-02", "2026-01-01T22:00:00Z"),
        ("2026-01-02 03:04:05", "2026-01-02T01:04:05Z"),
        ("2026-01-02T03:04", "2026-01-02T01:04:00Z"),
        ("2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z"),
        ("2026-01-02t03:04:05.25+01:00", "2026-01-02T02:04:05.25Z"),
    ],
)
def test_times_are_read_in_the_zone_of_the_user(text: str, meant: str) -> None:
    assert moment_of(text, NOW) == meant


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "soon", "25:00", "2026-02-30", "10 parsecs ago", "99999999999 min ago"),
        *("999999 weeks ago", "999999999h"),  # before the year 1
    ],
)
def test_what_is_no_time_is_refused_with_examples(text: str) -> None:
    with pytest.raises(InvalidArgument, match="Use '10 min ago'"):
        moment_of(text, NOW)


def test_a_revision_is_no_time_but_is_taken_where_one_is_meant() -> None:
    assert moment_or_revision("revision:42", NOW) == "revision:42"
    assert moment_or_revision("10m", NOW) == "2026-01-31T13:20:00Z"


def test_a_revision_is_named_only_where_one_is_taken() -> None:
    with pytest.raises(InvalidArgument, match="or revision:N"):
        moment_or_revision("soon", NOW)
    with pytest.raises(InvalidArgument) as refused:
        moment_of("revision:3", NOW)
    assert "revision:N" not in str(refused.value)


@given(text())
def test_any_text_is_a_time_or_refused(words: str) -> None:
    try:
        moment_or_revision(words, NOW)
    except InvalidArgument:
        pass


@pytest.fixture(params=["Europe/Berlin", ":Europe/Berlin", "CET-1CEST", "Nowhere/Else", ""])
def zone(request: pytest.FixtureRequest) -> Iterator[str]:
    """This process in a zone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", request.param)
        time.tzset()
        yield request.param
    time.tzset()


def test_a_time_has_the_offset_of_its_own_day(zone: str) -> None:
    """Also half a year before or after the clocks were changed, as the end of a freeze may be."""
    if "Berlin" in zone:
        found = [moment_of(f"2026-{month}-15 14:00", local_now()) for month in ("01", "07")]
        assert found == ["2026-01-15T13:00:00Z", "2026-07-15T12:00:00Z"]
    else:  # a zone that is not in the database
        assert local_now().utcoffset() == datetime.now().astimezone().utcoffset()
