"""Points in time as clients write them in ``since`` and ``until``.

Source: moby 20.10, api/types/time/timestamp.go.
"""

import re
from datetime import UTC, datetime, timedelta

from skep.errors import InvalidArgument
from skep.model.times import SECOND_NS, duration_ns

_UNIX = re.compile(r"(-?\d{1,18})(?:\.(\d{1,9})\d*)?")
_DATE = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d)(?::(\d\d)(?::(\d\d)(?:\.(\d{1,9})\d*)?)?)?)?(Z|[+-]\d\d:\d\d)?"
)


def parse_moment(text: str, now_ns: int) -> int:
    """``text`` as nanoseconds since 1970: a Unix time, a date, or a duration before ``now_ns``.

    A date without a zone is UTC: a node has no zone of its own.

    Raises:
        InvalidArgument: it is none of these.
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
    except ValueError as error:
        raise InvalidArgument(f'parsing time "{text}": {error}') from error
    if zone and zone != "Z":
        sign = 1 if zone[0] == "+" else -1
        moment -= sign * timedelta(hours=int(zone[1:3]), minutes=int(zone[4:6]))
    return int(moment.timestamp()) * SECOND_NS + int((fraction or "").ljust(9, "0"))
