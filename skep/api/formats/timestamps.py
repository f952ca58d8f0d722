"""Times in requests: ``since`` and ``until`` of streams, ``until`` of filters.

Source: moby 20.10, api/types/time/timestamp.go.
"""

import re
from datetime import UTC, datetime, timedelta

from aiohttp import web

from skep.api.errors import Untranslated
from skep.errors import InvalidArgument
from skep.model.values.times import SECOND_NS, duration_ns

_UNIX = re.compile(r"(-?\d{1,18})(?:\.(\d{1,9})\d*)?", re.ASCII)
_DATE = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d)(?::(\d\d)(?::(\d\d)(?:\.(\d{1,9})\d*)?)?)?)?(Z|[+-]\d\d:\d\d)?",
    re.ASCII,
)
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")


def parse_unix_time(text: str) -> int | None:
    """Return ``1763600000.123456789`` as nanoseconds since 1970, or None for an empty text.

    Raises:
        Untranslated: the text is not a Unix time; the message is Go's.
    """
    if not text:
        return None
    seconds, point, fraction = text.partition(".")
    nanoseconds = int(_number(fraction) * 10.0 ** (9 - len(fraction))) if point else 0
    return _number(seconds) * SECOND_NS + nanoseconds


def period_of(request: web.Request) -> tuple[int | None, int | None]:
    """Return ``since`` and ``until`` of a request for events.

    Raises:
        Untranslated: a parameter is not a Unix time; InvalidArgument: the period ends before it begins.
    """
    begin, end = request.query.get("since", ""), request.query.get("until", "")
    since, until = parse_unix_time(begin), parse_unix_time(end)
    if until is not None and until < (since or 0):
        raise InvalidArgument(f"`since` time ({begin}) cannot be after `until` time ({end})")
    return since, until


def parse_time(text: str, now_ns: int) -> int:
    """Return ``text`` as nanoseconds since 1970: a Unix time, a date, or a duration before ``now_ns``.

    A date without a zone is UTC, because a node has no zone.

    Raises:
        InvalidArgument: the text is none of these.
    """
    unix = _UNIX.fullmatch(text)
    if unix is not None:
        seconds, fraction = unix.groups()
        return int(seconds) * SECOND_NS + int((fraction or "").ljust(9, "0"))
    duration = duration_ns(text)
    if duration is not None:
        return now_ns - duration
    date = _DATE.fullmatch(text)
    if date is None:
        raise InvalidArgument(f'failed to parse value as time or duration: "{text}"')
    year, month, day, hour, minute, second, fraction, zone = date.groups()
    try:
        moment = datetime(
            *(int(year), int(month), int(day), int(hour or 0), int(minute or 0), int(second or 0)), tzinfo=UTC
        )
        if zone and zone != "Z":
            sign = 1 if zone[0] == "+" else -1
            moment -= sign * timedelta(hours=int(zone[1:3]), minutes=int(zone[4:6]))
    except (ValueError, OverflowError) as error:
        raise InvalidArgument(f'parsing time "{text}": {error}') from error
    return int(moment.timestamp()) * SECOND_NS + int((fraction or "").ljust(9, "0"))


def _number(word: str) -> int:
    if not _NUMBER.fullmatch(word):
        raise Untranslated(f'strconv.ParseInt: parsing "{word}": invalid syntax')
    return int(word)
