"""Schedules: what the labels of a job say, and the times that follow."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from time import process_time
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.errors import InvalidArgument
from skep.model.options.labels import JOB_TTL
from skep.model.options.schedules import (
    CRON,
    CRON_CONCURRENCY,
    CRON_DEADLINE,
    CRON_MAX_ATTEMPTS,
    CRON_SUSPEND,
    CRON_TIME_ZONE,
    Concurrency,
    Schedule,
    check_schedule,
    max_attempts_of,
    parsed_schedule,
    schedule_of,
)

BERLIN = {CRON_TIME_ZONE: "Europe/Berlin"}


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp())


def times(expression: str, after: str, until: str, **labels: str) -> list[str]:
    """The due times in the zone of the schedule, with its offset."""
    schedule = parsed_schedule({CRON: expression, **labels})
    found, now = [], at(after)
    while (following := schedule.next_after(now)) is not None and following <= at(until):
        found.append(datetime.fromtimestamp(following, schedule.zone).isoformat(timespec="minutes"))
        now = following
    return found


def test_a_schedule_has_five_fields_a_word_or_several_of_them() -> None:
    assert times("*/20 8 * * *", "2026-11-24T00:00Z", "2026-11-25T00:00Z") == [
        "2026-11-24T08:00+00:00",
        "2026-11-24T08:20+00:00",
        "2026-11-24T08:40+00:00",
    ]
    assert times("@hourly", "2026-11-24T00:00Z", "2026-11-24T01:30Z") == ["2026-11-24T01:00+00:00"]
    # Tuesday the 24th; the weekdays of one expression and the weekend of the other.
    assert times("0 9 * * MON-FRI; 0 11 * * 6,0", "2026-11-27T00:00Z", "2026-11-29T12:00Z") == [
        "2026-11-27T09:00+00:00",
        "2026-11-28T11:00+00:00",
        "2026-11-29T11:00+00:00",
    ]
    assert times("0 0 L * *", "2026-02-01T00:00Z", "2026-03-31T12:00Z") == [
        "2026-02-28T00:00+00:00",
        "2026-03-31T00:00+00:00",
    ]


def test_a_due_time_of_two_expressions_is_one() -> None:
    assert len(times("0 * * * *; */30 * * * *", "2026-11-24T00:00Z", "2026-11-24T02:00Z")) == 4


def test_an_hour_that_does_not_exist_runs_a_fixed_time_once_after_it() -> None:
    """Berlin, 29 March 2026: 02:00 is 03:00."""
    span = ("2026-03-28T12:00Z", "2026-03-29T10:00Z")
    assert times("30 2 * * *", *span, **BERLIN) == ["2026-03-29T03:00+02:00"]
    assert times("0 2,3 * * *", *span, **BERLIN) == ["2026-03-29T03:00+02:00"]
    every = times("*/30 * * * *", "2026-03-29T00:30Z", "2026-03-29T01:30Z", **BERLIN)
    assert every == ["2026-03-29T03:00+02:00", "2026-03-29T03:30+02:00"]


def test_an_hour_that_comes_twice_runs_a_fixed_time_once_and_intervals_in_both() -> None:
    """Berlin, 25 October 2026: 03:00 is 02:00 again."""
    span = ("2026-10-24T12:00Z", "2026-10-25T10:00Z")
    assert times("30 2 * * *", *span, **BERLIN) == ["2026-10-25T02:30+02:00"]
    assert times("30 * * * *", "2026-10-24T23:45Z", "2026-10-25T02:00Z", **BERLIN) == [
        "2026-10-25T02:30+02:00",
        "2026-10-25T02:30+01:00",
    ]


def test_in_the_second_of_two_equal_hours_a_fixed_time_is_not_due_again() -> None:
    schedule = parsed_schedule({CRON: "30 2 * * *", **BERLIN})
    assert schedule.next_after(at("2026-10-25T02:10+01:00")) == at("2026-10-26T02:30+01:00")


def _matches(moment: datetime, minutes: set[int], hours: set[int]) -> bool:
    return moment.minute in minutes and moment.hour in hours


MINUTES, HOURS = st.sets(st.integers(0, 59), min_size=1, max_size=5), st.sets(st.integers(0, 23), min_size=1)


@given(minutes=MINUTES, hours=HOURS, start=st.integers(0, 4 * 365 * 1440))
def test_without_changes_of_the_clock_it_is_every_minute_that_fits(
    minutes: set[int], hours: set[int], start: int
) -> None:
    """Beside a search minute by minute."""
    begin = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(minutes=start)
    expression = f"{','.join(map(str, minutes))} {','.join(map(str, hours))} * * *"
    day = [begin + timedelta(minutes=number) for number in range(1, 1441)]
    expected = [one for one in day if _matches(one, minutes, hours)]
    schedule = Schedule(expressions=(expression,))
    found, now = [], int(begin.timestamp())
    while (following := schedule.next_after(now)) is not None and following <= day[-1].timestamp():
        found.append(datetime.fromtimestamp(following, UTC))
        now = following
    assert found == expected


ZONES = st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"])
EXPRESSIONS = st.sampled_from(
    [
        "* * * * *",
        "30 2 * * *",
        "0 2,3 * * *",
        "*/7 1-4 * * *",
        "15 */5 * * 1",
        "0 0 29 2 *",
        "30 1 * 3,10,11 0",
    ]
)


@given(zone=ZONES, expression=EXPRESSIONS, start=st.integers(1_700_000_000, 1_800_000_000))
def test_times_only_grow_and_none_is_passed_over_by_looking_from_between(
    zone: str, expression: str, start: int
) -> None:
    schedule = Schedule(expressions=(expression,), zone=UTC if zone == "UTC" else ZoneInfo(zone))
    found, now = [], start
    for _ in range(5):
        following = schedule.next_after(now)
        assert following is not None
        assert following > now
        assert schedule.next_after((now + following) // 2) == following
        found.append(following)
        now = following
    assert all(one < other for one, other in pairwise(found))
    assert schedule.last_until(start, now) == now
    assert schedule.last_until(start, now - 1) == found[-2]
    assert schedule.last_until(now, schedule.next_after(now) or 0) == schedule.next_after(now)


CHANGES = st.sampled_from(
    ["2026-03-29", "2026-10-25", "2026-03-08", "2026-11-01", "2026-04-05", "2011-12-30"]
)
"""Days on which a zone changes its clock.  Apia has no 30 December 2011."""


@given(
    zone=ZONES | st.just("Pacific/Apia"),
    expression=EXPRESSIONS,
    day=CHANGES,
    minute=st.integers(-1500, 3000),
    back_s=st.integers(1, 40 * 24 * 3600),
)
def test_the_last_time_is_the_last_of_all_when_clocks_change(
    zone: str, expression: str, day: str, minute: int, back_s: int
) -> None:
    schedule = Schedule(expressions=(expression,), zone=UTC if zone == "UTC" else ZoneInfo(zone))
    until = at(f"{day}T00:00Z") + 60 * minute
    after = max(until - back_s, until - 3 * 3600 if expression.startswith("*") else 0)
    expected, following = None, schedule.next_after(after)
    while following is not None and following <= until:
        expected, following = following, schedule.next_after(following)
    assert schedule.last_until(after, until) == expected


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin"])
@pytest.mark.parametrize("expression", ["* * * 1-4 *", "* * 1-30 1-11 *", "0 0 29 2 *", "* 0 1 1 *"])
def test_a_last_time_months_ago_takes_no_long_search(expression: str, zone: str) -> None:
    schedule = parsed_schedule({CRON: expression, CRON_TIME_ZONE: zone})
    until = at("2026-12-31T23:59Z")
    began = process_time()
    for minute in range(20):
        assert schedule.last_until(at("2017-01-01T00:00Z"), until - 60 * minute) is not None
    assert process_time() - began < 0.4, "each takes below a millisecond, and took 100 of them"


def test_the_last_of_millions_of_times_is_found() -> None:
    schedule = parsed_schedule({CRON: "* 0-11 * * *"})
    assert schedule.last_until(at("1990-01-01T00:00Z"), at("2026-11-24T23:59Z")) == at("2026-11-24T11:59Z")
    yearly = parsed_schedule({CRON: "@yearly"})
    assert yearly.last_until(at("1990-01-01T00:00Z"), at("2026-11-24T23:59Z")) == at("2026-01-01T00:00Z")
    assert yearly.last_until(at("2026-01-01T00:00Z"), at("2026-11-24T23:59Z")) is None


FIELDS = "expected five fields (minute, hour, day of the month, month, day of the week) or @yearly"


@pytest.mark.parametrize(
    ("cron", "words"),
    [
        ("", FIELDS),
        ("* * * *", FIELDS),
        ("0 * * * * *", FIELDS),
        ("* * * * *;", FIELDS),
        ("@reboot", FIELDS),
        ("@every 5m", FIELDS),
        ("٣ * * * *", FIELDS),
        (f"{'1' * 5000} * * * *", FIELDS),
        ("60 * * * *", "invalid label skep.cron=60 * * * *: its minute (0 to 59) is invalid"),
        ("*/0 * * * *", "its minute (0 to 59) is invalid"),
        ("* 24 * * *", "its hour (0 to 23) is invalid"),
        ("* * 32 * *", "its day of the month (1 to 31, L) is invalid"),
        ("* * * 13 *", "its month (1 to 12, JAN to DEC) is invalid"),
        ("* * * * MOON", "its day of the week (0 to 7, SUN to SAT) is invalid"),
        ("* * * * 5L/2", "day of the week"),
        ("0 0 30 2 *", "invalid label skep.cron=0 0 30 2 *: there is no such day, it would never run"),
        ("@daily; 0 0 31 4,6 *", "invalid label skep.cron=0 0 31 4,6 *: there is no such day"),
        (";".join(["@daily"] * 11), "it has 11 expressions, 10 are possible"),
    ],
)
def test_an_expression_that_cannot_be_read_or_never_fires_is_refused_by_its_field(
    cron: str, words: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check_schedule({CRON: cron}, "replicated-job")
    assert words in str(refused.value)
    assert len(str(refused.value)) < 700
    assert schedule_of({CRON: cron}) is None


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (
            {CRON_TIME_ZONE: "Mars/Olympus"},
            "invalid label skep.cron.time-zone=Mars/Olympus: expected a name of the IANA",
        ),
        ({CRON_TIME_ZONE: "../../../etc/passwd"}, "invalid label skep.cron.time-zone="),
        ({CRON_TIME_ZONE: "Europe"}, "invalid label skep.cron.time-zone="),
        ({CRON_TIME_ZONE: "localtime"}, "invalid label skep.cron.time-zone="),
        ({CRON_TIME_ZONE: ""}, "invalid label skep.cron.time-zone="),
        (
            {CRON_CONCURRENCY: "allow"},
            "invalid label skep.cron.concurrency=allow: expected forbid or replace",
        ),
        (
            {CRON_DEADLINE: "soon"},
            "invalid label skep.cron.deadline=soon: expected a duration like 30s or 2h, from 1s",
        ),
        ({CRON_DEADLINE: "0s"}, "invalid label skep.cron.deadline=0s"),
        ({CRON_SUSPEND: "yes"}, "invalid label skep.cron.suspend=yes: expected true or false"),
        ({JOB_TTL: "1h"}, "labels skep.cron and skep.job-ttl cannot be used together"),
    ],
)
def test_settings_that_mean_nothing_are_refused(labels: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check_schedule({CRON: "@daily", **labels}, "global-job")
    assert words in str(refused.value)


def test_a_schedule_is_for_jobs_and_its_settings_are_for_a_schedule() -> None:
    with pytest.raises(
        InvalidArgument, match="expected mode replicated-job or global-job, the service is replicated"
    ):
        check_schedule({CRON: "@daily"}, "replicated")
    with pytest.raises(InvalidArgument, match=r"label skep.cron.suspend needs label skep.cron"):
        check_schedule({CRON_SUSPEND: "true"}, "replicated-job")
    check_schedule({}, "replicated")


def test_settings_have_defaults() -> None:
    schedule = parsed_schedule({CRON: "@daily"})
    assert (schedule.zone, schedule.concurrency, schedule.deadline_s) == (UTC, Concurrency.FORBID, None)
    assert not schedule.is_suspended
    given = {CRON: "@daily", CRON_CONCURRENCY: "replace", CRON_DEADLINE: "2h", CRON_SUSPEND: "true", **BERLIN}
    schedule = parsed_schedule(given)
    assert schedule.zone == ZoneInfo("Europe/Berlin")
    assert (schedule.concurrency, schedule.deadline_s) == (Concurrency.REPLACE, 7200.0)
    assert schedule.is_suspended


@pytest.mark.parametrize(("text", "attempts"), [(None, 6), ("0", 0), ("1", 1), ("1000", 1000)])
def test_a_run_has_a_limit_of_attempts(text: str | None, attempts: int) -> None:
    labels = {CRON: "@daily"} | ({CRON_MAX_ATTEMPTS: text} if text is not None else {})
    assert max_attempts_of(labels) == attempts


@pytest.mark.parametrize("text", ["", "-1", "many", "1001", "1.5", "²", "00006"])
def test_a_limit_of_attempts_is_a_number(text: str) -> None:
    with pytest.raises(InvalidArgument, match="expected a number from 1 to 1000, or 0 for no limit"):
        parsed_schedule({CRON: "@daily", CRON_MAX_ATTEMPTS: text})


def test_without_a_schedule_that_can_be_read_the_limit_is_the_default() -> None:
    assert max_attempts_of({CRON_MAX_ATTEMPTS: "3"}) == 0
    assert max_attempts_of({CRON: "nonsense", CRON_MAX_ATTEMPTS: "3"}) == 6
