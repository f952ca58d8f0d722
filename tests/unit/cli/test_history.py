"""What ``skep history`` shows for entries that stand for several, and if no entry matches."""

from datetime import UTC, datetime

import pytest

from skep.cli.output import Screen
from skep.cli.see.history import lines_of, no_entries, query_of
from skep.errors import InvalidArgument

NOW = datetime(2026, 11, 29, 16, 0, 0, tzinfo=UTC)
PAGE = {"Entries": [], "Total": 7, "Oldest": "2026-11-29T14:00:00Z"}


@pytest.mark.parametrize(
    ("name", "since", "until", "line"),
    [
        (
            "",
            "10 min ago",
            "",
            "No entries match. Try an earlier --since: the oldest entry is from 2026-11-29 14:00:00.",
        ),
        (
            "web",
            "10 min ago",
            "",
            "No entries about web match. Try an earlier --since: the oldest entry is from ",
        ),
        ("web", "", "", "No entries about web match: the oldest entry is from 2026-11-29 14:00:00."),
        (
            "web",
            "5 hours ago",
            "",
            "No entries about web match: the oldest entry is from 2026-11-29 14:00:00.",
        ),
        (
            "",
            "",
            "13:00",
            "No entries match: the oldest entry is from 2026-11-29 14:00:00. Try a later --until.",
        ),
        (
            "",
            "12:00",
            "13:00",
            "No entries match: the oldest entry is from 2026-11-29 14:00:00. Try a later --until.",
        ),
    ],
)
def test_without_entries_only_a_time_that_could_help_is_advised(
    name: str, since: str, until: str, line: str
) -> None:
    assert no_entries(PAGE, name, query_of(name, since, until, None, NOW), NOW).startswith(line)


def test_a_start_after_the_end_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^--since 13:00 is after --until 12:00\. Use an earlier"):
        query_of("", "13:00", "12:00", None, NOW)


def test_only_a_request_that_stands_for_equal_ones_is_shown_with_a_factor() -> None:
    common = {"Time": "2026-11-29T15:00:00Z", "Severity": "info", "Count": 11}
    by = {"User": "ann", "Node": "m1"}
    request = {**common, "Kind": "request", "By": by, "Message": "update service web"}
    change = {**common, "Kind": "change", "Message": "task web.1 on m2 failed: exit 2 (the last of 11)"}
    page = {"Entries": [request, change], "Next": ""}
    _, first, second = lines_of(page, Screen(), NOW)
    assert first.split() == ["15:00:00", "ann@m1", "update", "service", "web", "(×11)"]
    assert second.endswith("task web.1 on m2 failed: exit 2 (the last of 11)")
