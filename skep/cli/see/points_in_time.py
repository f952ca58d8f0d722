"""Points in time as people write them: ``10 min ago``, ``yesterday 14:00``, ``14:00``, RFC 3339.

The command parses them, and not a manager, because they are in this machine's time zone.
"""

import os
import re
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from skep.errors import InvalidArgument
from skep.model.values.times import SECOND_NS, Timestamp, duration_ns, timestamp, unix_ns

_UNITS_S = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 24 * 3600),
    **dict.fromkeys(("w", "week", "weeks"), 7 * 24 * 3600),
}
_AGO = re.compile(r"(?P<number>\d{1,6}|an?)\s*(?P<unit>[a-z]+)(?:\s+ago)?")
_CLOCK = re.compile(
    r"(?:(?P<day>today|yesterday|\d{4}-\d\d-\d\d)(?:[ t]|$)\s*)?(?P<time>\d{1,2}:\d\d(?::\d\d)?)?"
)
_REVISION = re.compile(r"revision:\d{1,18}")
_EXAMPLES = "'10 min ago', 'yesterday 14:00', '14:00'"


def local_now() -> datetime:
    """Return the present time in this machine's zone.

    The zone has the offset of each time.  The present offset alone would be wrong before or after a change of the
    clocks.
    """
    name = os.environ.get("TZ", "").removeprefix(":")
    try:
        if name:
            return datetime.now(ZoneInfo(name))
        with open("/etc/localtime", "rb") as file:
            return datetime.now(ZoneInfo.from_file(file))
    except (OSError, ValueError, LookupError):  # no such file, or a zone written as rules
        return datetime.now().astimezone()


def moment_of(text: str, now: datetime) -> Timestamp:
    """Return the time that ``text`` means.  ``now``: in the user's time zone.  Raises: InvalidArgument."""
    return _moment_of(text, now, "2026-01-31T12:00:00Z")


def _moment_of(text: str, now: datetime, last: str) -> Timestamp:
    """See ``moment_of``.  ``last``: the last example in the error."""
    words = " ".join(text.lower().split())
    if words == "now":
        return timestamp(_ns(now))
    try:
        return timestamp(unix_ns(text.strip().upper()))
    except InvalidArgument:
        pass
    try:
        if (ns := duration_ns(words.removesuffix(" ago"))) is not None:
            return timestamp(_ns(now) - ns)
        if (ago := _AGO.fullmatch(words)) and (unit := _UNITS_S.get(ago["unit"])):
            number = int(ago["number"]) if ago["number"].isdigit() else 1
            return timestamp(_ns(now) - number * unit * SECOND_NS)
        if words and (found := _CLOCK.fullmatch(words)):
            return timestamp(_ns(_at(found["day"] or "today", found["time"] or "00:00", now)))
    except (ValueError, OverflowError):  # no such day or hour, or before the year 1
        pass
    raise InvalidArgument(f"invalid time {text!r}. Use {_EXAMPLES} or {last}.")


def moment_or_revision(text: str, now: datetime) -> str:
    """Return the time that ``text`` means, or ``revision:N`` unchanged.  Raises: InvalidArgument."""
    return text if _REVISION.fullmatch(text) else _moment_of(text, now, "revision:N")


def _at(day: str, clock: str, now: datetime) -> datetime:
    match day:
        case "today":
            date = now.date()
        case "yesterday":
            date = now.date() - timedelta(days=1)
        case _:
            date = datetime.strptime(day, "%Y-%m-%d").date()  # noqa: DTZ007 - a date has no zone
    time = datetime.strptime(clock, "%H:%M:%S" if clock.count(":") == 2 else "%H:%M").time()  # noqa: DTZ007
    return datetime.combine(date, time).replace(tzinfo=now.tzinfo).astimezone(now.tzinfo)


def _ns(moment: datetime) -> int:
    return round(moment.timestamp() * 1000) * (SECOND_NS // 1000)
