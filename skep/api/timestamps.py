"""``since`` and ``until`` of streams: Unix time, ``1763600000.123456789``.

Source: moby 20.10, api/types/time/timestamp.go (ParseTimestamps).
"""

import re

from aiohttp import web

from skep.api.errors import Untranslated
from skep.errors import InvalidArgument
from skep.model.times import SECOND_NS

_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")


def parse_unix_time(text: str) -> int | None:
    """Nanoseconds since the epoch; None for an empty text.

    Raises:
        Untranslated: it is no Unix time, in Go's words.
    """
    if not text:
        return None
    seconds, point, fraction = text.partition(".")
    nanoseconds = int(_number(fraction) * 10.0 ** (9 - len(fraction))) if point else 0
    return _number(seconds) * SECOND_NS + nanoseconds


def period_of(request: web.Request) -> tuple[int | None, int | None]:
    """``since`` and ``until`` of a request for events.

    Raises:
        Untranslated: one is no Unix time; InvalidArgument: it ends before it begins.
    """
    begin, end = request.query.get("since", ""), request.query.get("until", "")
    since, until = parse_unix_time(begin), parse_unix_time(end)
    if until is not None and until < (since or 0):
        raise InvalidArgument(f"`since` time ({begin}) cannot be after `until` time ({end})")
    return since, until


def _number(word: str) -> int:
    if not _NUMBER.fullmatch(word):
        raise Untranslated(f'strconv.ParseInt: parsing "{word}": invalid syntax')
    return int(word)
