"""Change freezes and maintenance windows: which ones are possible, and when a window is open."""

from datetime import UTC, datetime, timedelta

import pytest

from skep.errors import InvalidArgument
from skep.model.options.freezes import (
    CLUSTER,
    REASON_CHARACTERS_MAX,
    FreezeRequest,
    MaintenanceWindow,
    checked_freeze,
    checked_window,
    ended,
    never_meet,
    window_at,
)
from skep.model.values.times import SECOND_NS, Timestamp, timestamp

HOUR_NS = 3600 * SECOND_NS
NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)


def ns(at: datetime) -> int:
    return round(at.timestamp()) * SECOND_NS


def wanted(**after: float) -> FreezeRequest:
    return FreezeRequest(until=timestamp(ns(NOON + timedelta(**after))), reason="holidays\nand more")


def test_a_freeze_names_its_end_its_author_and_its_reason() -> None:
    made = checked_freeze(wanted(hours=2), "alice", ns(NOON))
    assert (
        made.words(CLUSTER) == "the cluster is frozen until 2026-06-01 14:00 UTC by alice: holidays and more"
    )
    assert made.words("shop").startswith("stack shop is frozen until 2026-06-01 14:00 UTC")


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (FreezeRequest(), "a freeze needs an end: use --for DURATION or --until TIME"),
        (wanted(hours=-1), "the freeze would end in the past: 2026-06-01 11:00 UTC"),
        (wanted(), "the freeze would end in the past"),
        (wanted(days=91), "a freeze lasts at most 90 days"),
        (FreezeRequest(until=Timestamp("soon")), "soon"),
        (FreezeRequest(until=wanted(hours=1).until, reason="x" * (REASON_CHARACTERS_MAX + 1)), "shorten it"),
    ],
)
def test_a_freeze_without_a_possible_end_is_refused(request_: FreezeRequest, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        checked_freeze(request_, "", ns(NOON))


def test_a_freeze_is_over_at_its_end() -> None:
    freezes = {"shop": checked_freeze(wanted(hours=1), "", ns(NOON))}
    assert ended(freezes, ns(NOON) + HOUR_NS - 1) == []
    assert ended(freezes, ns(NOON) + HOUR_NS) == ["shop"]


def a_window(cron: str = "0 2 * * *", hours: float = 2, zone: str = "Europe/Berlin") -> MaintenanceWindow:
    return MaintenanceWindow(cron=cron, time_zone=zone, length=round(hours * HOUR_NS))


@pytest.mark.parametrize(
    ("at", "until"),
    [
        (datetime(2026, 6, 1, 0, 0, tzinfo=UTC), ""),  # 02:00 in Berlin
        (datetime(2026, 6, 1, 1, 59, tzinfo=UTC), ""),
        (datetime(2026, 6, 1, 2, 0, tzinfo=UTC), "2026-06-02T00:00:00Z"),
        (datetime(2026, 12, 1, 0, 30, tzinfo=UTC), "2026-12-01T01:00:00Z"),  # winter time
    ],
)
def test_a_window_is_open_from_each_due_time_in_its_time_zone(at: datetime, until: str) -> None:
    assert checked_window(a_window(), ns(at)).closed_until == until


def test_a_window_stays_open_while_its_openings_overlap() -> None:
    window = a_window("0 2 * * *; 0 3 * * *", zone="UTC")
    assert [window_at(window, ns(NOON.replace(hour=hour))).closed_until == "" for hour in range(7)] == [
        *(False, False, True, True, True, False, False)
    ]


@pytest.mark.parametrize(
    ("window", "why"),
    [
        (a_window("0 0 30 2 *"), "it would never open"),
        (a_window("@hourly", 1), "it would never close|the window would never close"),
        (a_window("61 * * * *"), "invalid window 61"),
        (a_window(zone="Mars/Olympus"), "invalid time zone Mars/Olympus"),
        (a_window(hours=0), "set its length with --for"),
        (a_window(hours=24 * 8), "to 7 days"),
    ],
)
def test_a_window_that_never_opens_or_never_closes_is_refused(window: MaintenanceWindow, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        checked_window(window, ns(NOON))


def test_a_window_with_a_time_zone_that_this_machine_lacks_is_open() -> None:
    assert window_at(a_window(zone="Mars/Olympus"), ns(NOON)).closed_until == ""


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        (a_window("0 2 * * *", 2), a_window("0 3 * * *", 1), False),
        (a_window("0 2 * * *", 2), a_window("0 5 * * *", 1), True),
        (a_window("0 2 * * *", 2), a_window("0 4 * * *", 1), False),  # when summer time begins
        (a_window("0 2 * * *", 2), a_window("0 4 * * *", 1, zone="UTC"), True),
        (a_window("0 2 * * *", 2), a_window("0 1 * * *", 1, zone="UTC"), False),  # in winter
        (a_window("0 2 * * SAT", 4), a_window("0 2 * * SUN", 4), True),
        (a_window("0 2 * * SAT", 24), a_window("0 2 1 * *", 1), False),
        (a_window("0 2 1 1 *", 1), a_window("*/5 * * 1 *", 1 / 60), False),
        (a_window("0 2 1 1 *", 1), a_window("*/5 * * 2 *", 1 / 60), True),
        (a_window("0 2 * * *"), a_window(zone="Mars/Olympus"), False),
    ],
)
def test_windows_that_are_never_open_at_the_same_time_are_noticed(
    one: MaintenanceWindow, other: MaintenanceWindow, apart: bool
) -> None:
    assert never_meet(one, other, ns(NOON)) is never_meet(other, one, ns(NOON)) is apart


def test_a_window_that_is_open_now_meets_another_one_that_opens_before_it_closes() -> None:
    once = a_window("0 10 1 6 *", 3, zone="UTC")
    assert not never_meet(once, a_window("30 12 1 6 *", 1, zone="UTC"), ns(NOON))
